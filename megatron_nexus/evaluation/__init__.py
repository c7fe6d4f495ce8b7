"""Evaluation of a model: generation, scores of tasks, perplexity."""
