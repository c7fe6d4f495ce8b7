"""What makes an exported Nexusformer load in transformers: files that are copied, and stand alone."""
