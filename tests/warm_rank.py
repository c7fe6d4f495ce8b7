"""What the ranks of tests import, once: a server that has done so forks them (see `processes`)."""

import gc

gc.disable()  # which finds nothing in modules, and would take a third of the time

import torch._dynamo  # noqa: E402, F401 - torch imports it at the first optimizer
from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: E402, F401 - DeepSpeed at the first engine

import megatron_nexus.training.run  # noqa: E402, F401

gc.freeze()  # the collections of the ranks need not look at it again
gc.enable()
