"""Show and check a tokenized corpus. `--help` lists the flags."""

from megatron_nexus.commands.inspect_data import main

if __name__ == "__main__":
    main()
