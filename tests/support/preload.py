"""What the warm server imports once, for all processes that it forks (see `warm_server`)."""

import functools

from megatron_nexus.base.imports import gc_paused, hidden_modules

with gc_paused(), hidden_modules("mlflow"):
    import matplotlib.pyplot  # noqa: F401
    import torch._dynamo  # noqa: F401 - torch imports it at the first optimizer

    import megatron_nexus.training.run  # noqa: F401
    from megatron_nexus.training.deepspeed_muon import import_muon_uncompiled

    import_muon_uncompiled()

    # DeepSpeed asks for it in each process that loads its Adam: 1.2 CPU seconds.
    import cpuinfo

    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    cpuinfo.get_cpu_info()

    # DeepSpeed imports these at the first engine, in .2 s.
    import deepspeed.module_inject.auto_ep_layer
    import deepspeed.ops.op_builder.all_ops
    import deepspeed.runtime.superoffload.superoffload_stage3
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
