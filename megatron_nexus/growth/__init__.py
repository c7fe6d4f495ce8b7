"""How a model is enlarged: the larger sizes, the new weights, and the proof that the function stayed."""
