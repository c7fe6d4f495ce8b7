"""Export a checkpoint for Hugging Face's transformers: see `--help`."""

from megatron_nexus.commands.export_hf import main

if __name__ == "__main__":
    main()
