"""The start of a run's ranks: torch.distributed, and whether each machine can do what flags ask for."""

import socket
import warnings

import torch

from megatron_nexus.checkpoint.location import Location
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import CheckpointError, ConfigError
from megatron_nexus.log import logger
from megatron_nexus.models.attention_backend import flex_problem
from megatron_nexus.models.nvidia_apex import require_apex
from megatron_nexus.parallel.mesh import Mesh, make_mesh
from megatron_nexus.parallel.world import World
from megatron_nexus.training.deepspeed_adam import build_deepspeed_adam
from megatron_nexus.training.machine import compile_problem, configure_torch, set_environment, untested_torch
from megatron_nexus.training.profiler import require_cuda_for_profile


def start_ranks(config: RunConfig, world: World, checkpoint: Location | None) -> Mesh:
    """Start torch.distributed, and check that this machine can do what the configuration asks for."""
    # DeepSpeed calls collectives by names that torch has deprecated; its users cannot fix that.
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).*deprecated")
    parallel = config.parallel
    set_environment(config)
    mesh = make_mesh(
        world,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        60.0 * parallel.distributed_timeout_minutes,
        by_node=parallel.hierarchical_grad_reduce,
    )
    configure_torch(config, mesh)
    if mesh.rank == 0 and (warning := untested_torch(torch.__version__)):
        logger.warning("%s", warning)
    _check_device(config, mesh)
    require_cuda_for_profile(config, mesh.device.type)
    _prepare_kernels(config, mesh)
    _require_one_start(mesh, checkpoint)
    return mesh


def _require_one_start(mesh: Mesh, checkpoint: Location | None) -> None:
    """Raise CheckpointError where ranks found different checkpoints, as on disks that they do not share."""
    found = mesh.control.distinct_str(str(checkpoint or "no checkpoint"))
    if len(found) > 1:
        listed = "; ".join(f"rank {rank}: {name}" for name, rank in found.items())
        raise CheckpointError(
            f"--load means different checkpoints ({listed}): use a disk that all ranks share"
        )


def _check_device(config: RunConfig, mesh: Mesh) -> None:
    if (
        config.training.precision == "bf16"
        and mesh.device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        name = torch.cuda.get_device_name(mesh.device)
        raise ConfigError(f"--bf16: {name} on {socket.gethostname()} has no bf16: use --fp32")


def _prepare_kernels(config: RunConfig, mesh: Mesh) -> None:
    """Have the chosen implementations at hand, or raise ConfigError; a collective call."""
    if config.training.compile and (problem := compile_problem(config, torch.__version__, mesh.device.type)):
        raise ConfigError([problem])
    if problem := flex_problem(config, mesh.device.type):
        raise ConfigError([problem])
    chosen = {"--norm-impl": config.training.norm_impl, "--optimizer-impl": config.optimizer.optimizer_impl}
    require_apex([flag for flag, choice in chosen.items() if choice == "apex"], mesh.device)
    if config.optimizer.optimizer_impl == "deepspeed":
        build_deepspeed_adam(mesh)
