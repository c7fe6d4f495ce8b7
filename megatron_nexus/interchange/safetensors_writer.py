"""Plain safetensors files of logical tensors.

Tensors stand in the order that is asked for and are written from first element to last, in blocks: memory is
needed for one block, whatever the size of the model.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch

from megatron_nexus.checkpoint.chunks import full_box, split_box
from megatron_nexus.checkpoint.data_file import header_of
from megatron_nexus.checkpoint.non_finite import NonFiniteValues
from megatron_nexus.checkpoint.storage import LocalFolder
from megatron_nexus.checkpoint.store import StateReader
from megatron_nexus.spec.param import ParamSpec

Precision = Literal["fp32", "bf16"]

BLOCK_ELEMENTS = 1 << 22
"""Elements read at once: 16 MiB of float32."""
ITEM_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}
SAFETENSORS_DTYPE: dict[Precision, str] = {"fp32": "F32", "bf16": "BF16"}


def plain_bytes(specs: Mapping[str, ParamSpec], precision: Precision) -> int:
    """Return the bytes of a file's tensors."""
    return sum(spec.numel for spec in specs.values()) * ITEM_BYTES[precision]


def write_safetensors(
    path: Path,
    reader: StateReader,
    state: str,
    precision: Precision,
    names: Mapping[str, str],
    metadata: Mapping[str, str],
    advance: Callable[[int], None],
    non_finite: NonFiniteValues,
) -> None:
    """Write one state of the tensors in `names`, each under the name that this has for its logical one.

    What is written is durable.

    `metadata` goes into the header; `advance` gets the bytes written, `non_finite` each value.

    Raises:
        CheckpointError: an element is not stored exactly once, or is damaged.
        OSError: the file cannot be written.
    """
    specs = {name: reader.manifest.specs[name] for name in names}
    with LocalFolder(path.parent).create(path.name) as write:
        tensors = [
            (names[name], SAFETENSORS_DTYPE[precision], spec.shape, spec.numel * ITEM_BYTES[precision])
            for name, spec in specs.items()
        ]
        write(header_of(tensors, {"format": "pt", **metadata}))
        for name, spec in specs.items():
            for box in split_box(full_box(spec.shape), BLOCK_ELEMENTS):
                held = reader.read_box(name, state, box)
                non_finite.add(name, held)
                values = torch.from_numpy(held).reshape(-1)
                if precision == "bf16":
                    values = values.to(torch.bfloat16).view(torch.int16)
                contents = values.numpy().data.cast("B")
                write(contents)
                advance(len(contents))
