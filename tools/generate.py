"""Let a trained model go on with a text. `--help` lists the flags."""

from megatron_nexus.commands.generate import main

if __name__ == "__main__":
    main()
