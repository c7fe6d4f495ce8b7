"""How far a grown model is from the one it was grown from, on held-out text, from their checkpoints.

    KL(parent || model) = mean over tokens of sum_v p(v) (log p(v) - log q(v))        nats per token

p is the parent at the growth, q a later checkpoint: of the grown run, or of the parent trained on. A larger
vocabulary of q has tokens to which p gives nothing, which add nothing to the sum.

T tokens, B rows, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.manifest import MANIFEST_FILE, read_manifest
from megatron_nexus.checkpoint.run_dir import complete_checkpoints
from megatron_nexus.checkpoint.saved_run import open_saved_run
from megatron_nexus.data.run_tokenizer import find_tokenizer
from megatron_nexus.data.tokenizer import encode_prompt
from megatron_nexus.errors import ConfigError, DataError
from megatron_nexus.evaluation.loaded_model import LoadedModel, choose_device, load_model, require_finite
from megatron_nexus.growth.checkpoint_tokenizer import tokenizer_record
from megatron_nexus.growth.generations import growths_of
from megatron_nexus.log import Progress
from megatron_nexus.models.layer_context import DTYPES
from megatron_nexus.reports.family import Seam
from megatron_nexus.reports.html_parts import Content, cell_of, paragraph, section, table

MOST_TOKENS = 16_384
MOST_CHECKPOINTS = 6
"""Most checkpoints of a run, evenly spread, the last among them."""
TOKENS_PER_PASS = 2048


@dataclass(frozen=True)
class Divergence:
    """A checkpoint compared with the parent at the growth: nats per token, and the standard error."""

    run: str
    of: str
    """"grown", or "parent, trained on"."""
    step: int
    kl: float
    kl_error: float | None
    loss: float
    parent_loss: float
    tokens: int


def measure_divergences(seams: Sequence[Seam], text: str, tokenizer_model: Path | None) -> list[Divergence]:
    """Return the divergences of the checkpoints of each grown run.

    Raises:
        ConfigError: no run has grown, or a parent's checkpoint is gone.
        CheckpointError, DataError: a checkpoint or the tokenizer cannot be read, or the text is too short.
    """
    if not seams:
        raise ConfigError("--held-out compares grown models with their parents: none of the runs has grown")
    return [one for seam in seams for one in _of_seam(seam, text, tokenizer_model)]


def _parent_checkpoint(seam: Seam) -> Path:
    """Return the checkpoint that was grown, also where the folders of runs have moved together."""
    named = seam.growth.parent
    folders = [named, seam.run.folder.parent / seam.growth.parent_run.name / named.name]
    if seam.parent is not None:
        folders.append(seam.parent.folder / named.name)
    for folder in folders:
        if (folder / MANIFEST_FILE).is_file():
            return folder
    raise ConfigError(
        f"--held-out needs the checkpoint {named}, from which {seam.run.name} was grown: copy it there, "
        "or drop the flag"
    )


def _of_seam(seam: Seam, text: str, tokenizer_model: Path | None) -> Iterator[Divergence]:
    parent = open_saved_run(_parent_checkpoint(seam))
    tokenizer = find_tokenizer(parent.config, tokenizer_record(parent.manifest), tokenizer_model)
    if tokenizer is None:
        raise DataError(f"{parent.checkpoint} knows no tokenizer: name it with --tokenizer-model")
    length = parent.config.training.seq_length
    rows = _rows(encode_prompt(tokenizer, text), length)
    if not rows:
        raise DataError(
            f"--held-out: the text has fewer than {length + 1} tokens, one sample: give more text"
        )
    before = _load(parent.checkpoint)
    later = [("grown", folder) for folder in _chosen(seam.run.folder, seam)]
    if seam.parent is not None:
        later += [("parent, trained on", folder) for folder in _chosen(seam.parent.folder, seam)]
    with Progress("comparing with the parent", len(later), "checkpoints") as progress:
        for of, folder in later:
            yield compare(seam.run.name, of, before, _load(folder), rows)
            progress.advance(1)


def _rows(tokens: Sequence[int], length: int) -> list[list[int]]:
    """Return samples of `length` + 1 tokens that lie side by side."""
    begins = range(0, min(len(tokens) - length, MOST_TOKENS), length)
    return [list(tokens[begin : begin + length + 1]) for begin in begins]


def _chosen(folder: Path, seam: Seam) -> list[Location]:
    """Return checkpoints of a run from the growth on, its own or its parent's, evenly spread."""
    found = complete_checkpoints(folder)
    since = [found[step] for step in sorted(found) if step >= seam.growth.step]
    if folder == seam.run.folder:  # of an older growth none
        since = [f for f in since if len(growths_of(read_manifest(f).lineage)) == len(seam.run.growths)]
    else:
        since = [f for f in since if read_manifest(f).progress.step > seam.growth.step]
    places = {round(i * (len(since) - 1) / max(1, MOST_CHECKPOINTS - 1)) for i in range(MOST_CHECKPOINTS)}
    return [since[place] for place in sorted(places)] if since else []


def _load(checkpoint: Location) -> LoadedModel:
    saved = open_saved_run(checkpoint)
    device, training = choose_device(""), saved.config.training
    return load_model(checkpoint, saved.config.model, training.seq_length, device, DTYPES[training.precision])


@torch.no_grad()
def compare(run: str, of: str, parent: LoadedModel, child: LoadedModel, rows: list[list[int]]) -> Divergence:
    """Return how far `child` is from `parent` on samples of one length, each with its label at the end."""
    divergences: list[float] = []
    losses: list[list[float]] = [[], []]
    at_once = max(1, TOKENS_PER_PASS // (len(rows[0]) - 1))
    for begin in range(0, len(rows), at_once):
        ids_BT = torch.tensor(rows[begin : begin + at_once], device=child.device)
        p_TBV, q_TBV = (_log_probabilities(model, ids_BT[:, :-1]) for model in (parent, child))
        shared = q_TBV[..., : p_TBV.shape[-1]]
        kl_TB = (p_TBV.exp() * (p_TBV - shared)).sum(dim=-1)
        divergences += kl_TB.mean(dim=0).tolist()
        labels_TB1 = ids_BT[:, 1:].t()[..., None]
        for found, log_p_TBV in zip(losses, (p_TBV, q_TBV), strict=True):
            found += (-log_p_TBV.gather(-1, labels_TB1)).mean(dim=(0, 2)).tolist()
    error = stdev(divergences) / len(rows) ** 0.5 if len(rows) > 1 else None
    step = read_manifest(child.checkpoint).progress.step
    count = len(rows) * (len(rows[0]) - 1)
    return Divergence(run, of, step, mean(divergences), error, mean(losses[1]), mean(losses[0]), count)


def _log_probabilities(loaded: LoadedModel, tokens_BT: Tensor) -> Tensor:
    """Return the log-probabilities [T, B, V] of every next token, in float32."""
    logits_TBV = require_finite(loaded.decoder(tokens_BT), loaded)
    return logits_TBV.float().log_softmax(dim=-1)


def divergence_section(found: Sequence[Divergence]) -> str:
    """Return the table of divergences; "" where there are none."""
    if not found:
        return ""
    head = (
        "run",
        "checkpoint of",
        "step",
        "KL(parent || model)",
        "+- standard error",
        "loss",
        "minus parent's",
    )
    rows: list[list[Content]] = [
        [
            *(one.run, one.of, cell_of(one.step, ",")),
            *(cell_of(one.kl, ".5f"), cell_of(one.kl_error, ".5f")),
            *(cell_of(one.loss, ".4f"), cell_of(one.loss - one.parent_loss, "+.4f")),
        ]
        for one in found
    ]
    said = (
        f"Nats per token on {found[0].tokens:,} tokens of held-out text: each checkpoint against the parent "
        "at the growth. The error is over samples."
    )
    return section("Distance from the parent on held-out text", paragraph(said), table(head, rows))
