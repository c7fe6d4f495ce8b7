"""What is read: tokenizers, token files, the order of samples and the batches made of them."""
