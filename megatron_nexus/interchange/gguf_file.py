"""GGUF, the file format of llama.cpp: models of Llama and Qwen3, quantised or not. Sealed: `gguf`.

llama.cpp turns neighbouring channels (2 i, 2 i + 1) of a Llama's heads, not (i, i + H / 2) as transformers
and we do, so the rows of its Q and K stand in another order, which is undone here. Those of Qwen3 stand as
they are. Rows are dequantised as they are asked for.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf import MODEL_ARCH, GGUFReader, ReaderTensor, get_tensor_name_map
from gguf.quants import dequantize

from megatron_nexus.base.durable import naming_errors
from megatron_nexus.errors import CheckpointError
from megatron_nexus.interchange.architecture import LLAMA, QWEN3, JsonObject
from megatron_nexus.interchange.gguf_tokenizer import write_gguf_tokenizer
from megatron_nexus.interchange.names import ENDS, PARTS
from megatron_nexus.interchange.source_model import Array, SourceModel


class BoundedReader(GGUFReader):
    """A reader that refuses to read beyond the file: the library trusts every length, such as one of 2^60."""

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        if int(count) * np.dtype(dtype).itemsize > len(self.data) - offset:
            raise ValueError(f"{count:,} values are said to follow byte {offset:,}, where it ends before")
        return super()._get(offset, dtype, count, override_order)

    def check_places(self) -> None:
        """Raise ValueError where a tensor does not begin, aligned, where the one before it ends."""
        end, align = self.data_offset, int(self.alignment)
        if align < 1 or align & (align - 1):
            raise ValueError(f"general.alignment {align} is not a power of two")
        for tensor in self.tensors:
            begin = -(-end // align) * align
            if tensor.data_offset != begin:
                raise ValueError(f"{tensor.name} begins at byte {tensor.data_offset:,}, and not at {begin:,}")
            end = begin + tensor.n_bytes


def open_gguf(path: Path) -> SourceModel:
    """Open the model in a file.

    Raises CheckpointError: it is not a GGUF file, or of a kind that is not known here; OSError.
    """
    try:
        with naming_errors(path):
            reader = BoundedReader(path)
        reader.check_places()
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a GGUF file ({error}): copy it again") from error
    try:
        config = _config(fields, {tensor.name for tensor in reader.tensors})
    except KeyError as error:
        raise CheckpointError(
            f"{path} does not say {error.args[0]}: it is damaged or of a kind that is not known here"
        ) from error
    weights = GgufWeights(path, reader.tensors, config)
    writer = partial(write_gguf_tokenizer, fields) if "tokenizer.ggml.model" in fields else None
    return SourceModel(path.stem, "gguf", config, weights, writer)


def _config(fields: Mapping[str, object], tensors: set[str]) -> JsonObject:
    """Return the `config.json` that Hugging Face would have for the model. Raises KeyError."""
    kind = fields["general.architecture"]
    if kind not in (LLAMA.model_type, QWEN3.model_type):
        return {"model_type": kind}  # the importer says what it knows
    heads, hidden = fields[f"{kind}.attention.head_count"], fields[f"{kind}.embedding_length"]
    assert isinstance(heads, int) and isinstance(hidden, int), "of the types that GGUF gives them"
    size = fields.get(f"{kind}.attention.key_length", hidden // heads)
    assert isinstance(size, int), "of the type that GGUF gives it"
    turning = fields.get(f"{kind}.rope.dimension_count", size)
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors:
        scaling = "by factors of its own (rope_freqs.weight)"
    tokens, epsilon = fields["tokenizer.ggml.tokens"], fields[f"{kind}.attention.layer_norm_rms_epsilon"]
    assert isinstance(tokens, list) and isinstance(epsilon, float), "of the types that GGUF gives them"
    return {
        "model_type": kind,
        "vocab_size": fields.get(f"{kind}.vocab_size", len(tokens)),
        "hidden_size": hidden,
        "intermediate_size": fields[f"{kind}.feed_forward_length"],
        "num_hidden_layers": fields[f"{kind}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get(f"{kind}.attention.head_count_kv", heads),
        "head_dim": size,
        "max_position_embeddings": fields[f"{kind}.context_length"],
        # Kept as float32: 1e-5 comes back as 9.999999747e-06.
        "rms_norm_eps": float(str(np.float32(epsilon))),
        "rope_parameters": {
            "rope_type": "default" if scaling == "none" else scaling,
            "rope_theta": fields.get(f"{kind}.rope.freq_base", 10000.0),
            "partial_rotary_factor": 1.0 if turning == size else f"{turning} of {size} channels",
        },
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def _huggingface_names(kind: str, layers: int) -> dict[str, str]:
    """Return the library's `model.layers.3.self_attn.q_proj.weight` by `blk.3.attn_q.weight`, and so on."""
    known = get_tensor_name_map(MODEL_ARCH[kind.upper()], layers)
    parts = {f"model.layers.{index}.{part}.weight" for index in range(layers) for part in PARTS.values()}
    ours = {name: known.get_name(name.removesuffix(".weight")) for name in (*ENDS.values(), *parts)}
    return {f"{theirs}.weight": name for name, theirs in ours.items() if theirs}


def _row_order(heads: int, size: int) -> npt.NDArray[np.int64]:
    """Return the file's row for each of our rows of Q or K: channel i + k H / 2 is 2 i + k there."""
    channels = np.arange(size).reshape(size // 2, 2).T.reshape(-1)
    return (np.arange(heads)[:, None] * size + channels).reshape(-1)


class GgufWeights:
    """The tensors of a file, mapped into memory and dequantised some rows at a time."""

    def __init__(self, path: Path, tensors: list[ReaderTensor], config: JsonObject) -> None:
        self._path = path
        kind, layers = str(config["model_type"]), config.get("num_hidden_layers")
        known = isinstance(layers, int) and 0 < layers <= len(tensors)
        names = _huggingface_names(kind, int(str(layers))) if known else {}
        self._tensors = {names.get(tensor.name, tensor.name): tensor for tensor in tensors}
        # GGUF counts the axes from the innermost.
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        self._heads: dict[str, object] = {}
        if kind == LLAMA.model_type:
            self._heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def read_rows(self, name: str, first: int, last: int) -> Array:
        """Return rows [first, last) of a tensor, or elements of a vector, as float32.

        Raises CheckpointError where a type of quantisation is not known.
        """
        tensor, shape = self._tensors[name], self.shapes[name]
        heads = next((count for part, count in self._heads.items() if f".{part}." in name), None)
        rows: slice | npt.NDArray[np.int64] = slice(first, last)
        if isinstance(heads, int):
            rows = _row_order(heads, shape[0] // heads)[first:last]
        # A vector is one row of the file.
        stored = tensor.data[rows] if len(shape) > 1 else tensor.data
        try:
            values = dequantize(stored, tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self._path}: {name} is quantised as {tensor.tensor_type.name}, of which nothing is "
                "known here: give another file of the model"
            ) from error
        return np.asarray(values if len(shape) > 1 else values[first:last], dtype=np.float32)
