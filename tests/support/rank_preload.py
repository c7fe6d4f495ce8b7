"""What the ranks of tests import, once: a server that has done so forks them (see `processes`)."""

from megatron_nexus.base.gc_paused import gc_paused

with gc_paused():
    import torch._dynamo  # noqa: F401 - torch imports it at the first optimizer

    import megatron_nexus.training.run  # noqa: F401
    from megatron_nexus.training.deepspeed_muon import import_muon_uncompiled

    import_muon_uncompiled()
