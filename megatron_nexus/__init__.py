"""megatron_nexus: pretrain a Nexusformer on a cluster, grow it, go on training.

Read the package from the top: config -> spec -> parallel, data -> models, checkpoint -> training.
"""

__version__ = "0.2.0"
