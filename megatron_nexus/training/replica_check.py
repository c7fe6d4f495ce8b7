"""Replica check: compares the weights that several ranks hold alike, and names the rank whose copy differs.

Data-parallel ranks hold the same weights at ZeRO 0 to 2, tensor-parallel ranks the same norm gains. A copy
that differs comes from a fault of a memory, a link or a kernel, and nothing else would tell: every rank goes
on, with gradients of another model. Weights are compared by CRC-32 on the host. Which of two data-parallel
copies is wrong is found by casting and gathering the master weights again: it is the one that this changes.
"""

import json
import socket
import zlib
from collections import Counter

import torch

from megatron_nexus.base.json_text import parse_json
from megatron_nexus.errors import EXIT_CODE_RESTART, RestartError
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.engine import Engine

_SHOWN = 3


def diverged_ranks(engine: Engine, mesh: Mesh) -> dict[int, str]:
    """Return the ranks whose weights are not those of their replicas, each with what differs.

    A collective call, whose result is the same on every rank. It mends the weights of data-parallel ranks.
    """
    before = _checksums(engine)
    replicated = {name: before[name] for name, (spec, _) in engine.parameters.items() if not spec.is_sharded}
    mine = json.dumps([_checksum(before), _checksum(replicated)])
    copies: dict[tuple[str, int, int], list[str]] = {}
    of_rank: dict[int, list[tuple[str, int, int]]] = {}
    for rank, text in enumerate(mesh.control.all_gather_str(mine)):
        whole, shared = parse_json(text)
        stage, tp_rank = rank // (mesh.dp_size * mesh.tp_size), rank % mesh.tp_size
        of_rank[rank] = [("data", stage, tp_rank), ("tensor", stage, rank // mesh.tp_size)]
        for key, value in zip(of_rank[rank], (whole, shared), strict=True):
            copies.setdefault(key, []).append(value)
    if all(len(set(values)) == 1 for values in copies.values()):
        return {}
    engine.state.refresh_model()
    after = _checksums(engine)
    wrong = [name for name in before if before[name] != after[name]]
    said = ""
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        said = f"{', '.join(wrong[:_SHOWN])}{more}, not as its master weights"
    elif len(set(shared := copies[of_rank[mesh.rank][1]])) > 1:
        # The master weights of a tensor-parallel rank themselves: the odd one out, or all of two.
        common, count = Counter(shared).most_common(1)[0]
        if parse_json(mine)[1] != common or 2 * count <= len(shared):
            said = "norm gains that are not those of its tensor-parallel ranks"
    said = f"{socket.gethostname()}: {said}" if said else ""
    return {rank: text for rank, text in enumerate(mesh.control.all_gather_str(said)) if text}


def diverged_error(step: int, found: dict[int, str]) -> RestartError:
    """Return the error of ranks whose weights differ."""
    wrong = "; ".join(f"rank {rank} on {text}" for rank, text in found.items())
    return RestartError(
        f"before step {step} weights differ from those of their replicas "
        f"(--check-weight-hash-across-dp-replicas-interval): {wrong}: a memory, a link or a kernel fails: "
        f"take that machine out of the job; exit code {EXIT_CODE_RESTART}: start the same command again, "
        "with --load auto"
    )


def _checksums(engine: Engine) -> dict[str, int]:
    return {
        name: zlib.crc32(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, (_, parameter) in engine.parameters.items()
    }


def _checksum(of_each: dict[str, int]) -> str:
    return f"{zlib.crc32(json.dumps(of_each).encode()):08x}"
