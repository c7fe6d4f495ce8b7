"""`python -m megatron_nexus` is `pretrain_nexus.py`."""

from megatron_nexus.command import main

if __name__ == "__main__":
    main()
