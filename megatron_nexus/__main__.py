"""`python -m megatron_nexus` is the command `nexus`."""

from megatron_nexus.cli.main import main

if __name__ == "__main__":
    main()
