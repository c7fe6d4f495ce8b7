"""What every other package may use: files, locks, processes, JSON. Knows nothing of models or training."""
