"""What the warm server imports once, for all processes that it forks (see `warm_server`)."""

from megatron_nexus.base.gc_paused import gc_paused

with gc_paused():
    import matplotlib.pyplot  # noqa: F401
    import torch._dynamo  # noqa: F401 - torch imports it at the first optimizer

    import megatron_nexus.training.run  # noqa: F401
    from megatron_nexus.training.deepspeed_muon import import_muon_uncompiled

    import_muon_uncompiled()
