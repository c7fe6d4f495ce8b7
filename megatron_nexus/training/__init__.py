"""How a model is learnt: engine, loop, schedule, metrics."""
