"""Write a checkpoint in the format of others: see `--help`."""

from megatron_nexus.commands.convert_checkpoint import main

if __name__ == "__main__":
    main()
