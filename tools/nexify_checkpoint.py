"""Grow or reshard a checkpoint: see `--help`."""

from megatron_nexus.commands.nexify_checkpoint import main

if __name__ == "__main__":
    main()
