"""How a model is judged: text that it goes on with, scores of tasks, perplexity."""
