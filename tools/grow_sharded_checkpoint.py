"""Grow or reshard a checkpoint: see `--help`."""

from megatron_nexus.commands.grow_sharded_checkpoint import main

if __name__ == "__main__":
    main()
