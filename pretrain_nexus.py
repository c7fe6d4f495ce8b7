"""Pretrain a Nexusformer.

    deepspeed pretrain_nexus.py --tp 2 --pp 2

Every rank runs this file: read the configuration, check it, then train. Where nothing started enough ranks
on a machine of CPUs, the first process starts them and watches. `--help` lists the flags.
"""

from megatron_nexus.command import main

if __name__ == "__main__":
    main()
