"""How training state is kept: pieces of logical tensors on disk, readable at any topology."""
