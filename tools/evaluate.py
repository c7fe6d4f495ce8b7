"""Evaluate a trained model on tasks and held-out texts. `--help` lists the flags."""

from megatron_nexus.commands.evaluate import main

if __name__ == "__main__":
    main()
