"""How training state is kept: chunks of logical tensors on disk, readable at any topology."""
