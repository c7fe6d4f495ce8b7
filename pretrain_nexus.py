"""Pretrain a Nexusformer.

    deepspeed pretrain_nexus.py --tp 2 --pp 2

Every rank runs this file: read the configuration, check it, then train. Where nothing started enough ranks
on a machine of CPUs, the first process starts them and watches. `--help` lists the flags.
"""

import signal

# Until the run listens itself, Ctrl-C ends a process at once: there is nothing to save or to tell.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from megatron_nexus.command import main  # noqa: E402

if __name__ == "__main__":
    main()
