"""Show and check a checkpoint. `--help` lists the flags."""

from megatron_nexus.commands.inspect_checkpoint import main

if __name__ == "__main__":
    main()
