"""True parameters, FLOPs and bytes of a model beside the paper's numbers. `--help` lists the flags."""

from megatron_nexus.commands.count_model import main

if __name__ == "__main__":
    main()
