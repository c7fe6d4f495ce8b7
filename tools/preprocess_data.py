"""Text files to a tokenized corpus in Megatron-LM's format. `--help` lists the flags."""

from megatron_nexus.commands.preprocess_data import main

if __name__ == "__main__":
    main()
