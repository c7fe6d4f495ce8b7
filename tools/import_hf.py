"""Import a model of Hugging Face's or llama.cpp's: see `--help`."""

from megatron_nexus.commands.import_hf import main

if __name__ == "__main__":
    main()
