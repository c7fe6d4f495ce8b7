"""How a model travels: checkpoints to and from the formats of Hugging Face and llama.cpp."""
