"""Which samples an unlearning run forgets and retains: what the methods under comparison choose.

    random            both sets by chance
    BM25              words in common with the queries; retain: those with the fewest
    exact             cosine of gradients with the queries'; retain: the most opposed (the paper's antipode)
    exact, any        the same forget set; retain by chance among the others
    K 64 ...          as exact, of count sketches of K numbers, of `nexus retrieve`
    oracle            targets; retain by chance among the others
    oracle + 25 %     three quarters of it targets, the rest by chance; retain as the oracle's

Gradients are of the mean negative log-likelihood of an answer's tokens, at the base model, in float32.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from corpora import TASKS, Corpus, Sample
from models import Base
from rank_bm25 import BM25Okapi

from megatron_nexus.analysis.sketch import make_bins
from megatron_nexus.checkpoint.chunks import full_box
from megatron_nexus.models.decoder import decoder_specs
from megatron_nexus.models.parameters import logical_parameters

SIZE = 64
"""Samples in a forget set, and in a retain set."""


@dataclass(frozen=True)
class Selection:
    """A forget set and a retain set, as numbers of samples of the corpus."""

    name: str
    forget: list[int]
    retain: list[int]

    def quality(self, corpus: Corpus, task: str) -> dict[str, float]:
        """Return precision (targets in the forget set) and leak (targets in the retain set), as shares."""
        shares = [
            sum(corpus.samples[number].kind == task for number in side) / len(side)
            for side in (self.forget, self.retain)
        ]
        return dict(zip(("precision", "leak"), shares, strict=True))


def select_all(
    base: Base, corpus: Corpus, seed: int, sketch_sizes: Sequence[int]
) -> dict[str, list[Selection]]:
    """Return the selections of each task."""
    scores = gradient_scores(base, corpus, seed, sketch_sizes)
    return {task: _select(corpus, task, seed, scores[task]) for task in TASKS}


def _select(corpus: Corpus, task: str, seed: int, scores: dict[str, np.ndarray]) -> list[Selection]:
    rng = random.Random(f"{seed} {task}")
    everything = range(len(corpus.samples))
    targets = [n for n in everything if corpus.samples[n].kind == task]
    others = [n for n in everything if corpus.samples[n].kind != task]

    def ends(values: np.ndarray) -> tuple[list[int], list[int]]:
        order = sorted(everything, key=lambda n: (-values[n], rng.random()))
        return order[:SIZE], order[-SIZE:][::-1]

    def apart(forget: list[int]) -> list[int]:
        return rng.sample(sorted(set(everything) - set(forget)), SIZE)

    shuffled = rng.sample(everything, 2 * SIZE)
    found = [
        Selection("random", shuffled[:SIZE], shuffled[SIZE:]),
        Selection("BM25", *ends(bm25_scores(corpus, task))),
        *(Selection(name, *ends(values)) for name, values in scores.items()),
    ]
    exact, _ = ends(scores["exact"])
    found.append(Selection("exact, any retain", exact, apart(exact)))
    retain = rng.sample(others, SIZE)
    left = sorted(set(others) - set(retain))
    diluted = rng.sample(targets, SIZE * 3 // 4) + rng.sample(left, SIZE // 4)
    found += [Selection("oracle", targets[:SIZE], retain), Selection("oracle + 25 %", diluted, retain)]
    return found


def bm25_scores(corpus: Corpus, task: str) -> np.ndarray:
    """Return the mean BM25 score of each sample with the queries, of words in lower case."""

    def words(sample: Sample) -> list[str]:
        return "".join(c if c.isalnum() else " " for c in sample.text.lower()).split()

    index = BM25Okapi([words(sample) for sample in corpus.samples])
    scores: np.ndarray = np.mean([index.get_scores(words(query)) for query in corpus.queries[task]], axis=0)
    return scores


def gradient_scores(
    base: Base, corpus: Corpus, seed: int, sketch_sizes: Sequence[int]
) -> dict[str, dict[str, np.ndarray]]:
    """Return the mean cosine of each sample with the queries of each task, exact and of sketches by name."""
    model = base.load()
    parameters = logical_parameters(model.decoder)
    specs = decoder_specs(base.config.model)
    codes = {}
    for size in sketch_sizes:
        bins = make_bins(specs, size, seed)
        of_each = [bins.codes(spec, full_box(spec.shape)).ravel() for spec, _ in parameters.values()]
        codes[size] = bins, torch.from_numpy(np.concatenate(of_each)).long()

    def forms(sample: Sample) -> dict[str, torch.Tensor]:
        model.decoder.zero_grad(set_to_none=True)
        model.answer_loss([sample]).backward()
        flat = torch.cat([p.grad.flatten() for _, p in parameters.values() if p.grad is not None])
        made = {"exact": flat}
        for size, (bins, code) in codes.items():
            sums = torch.zeros(bins.sums).index_add_(0, code, flat)
            made[f"K {size:,}"] = bins.fold(sums)
        return {name: vector / vector.norm() for name, vector in made.items()}

    asked = {task: [forms(query) for query in corpus.queries[task]] for task in TASKS}
    means = {
        task: {name: torch.stack([q[name] for q in queries]).mean(0) for name in queries[0]}
        for task, queries in asked.items()
    }
    found = {task: {name: np.zeros(len(corpus.samples)) for name in of} for task, of in means.items()}
    for number, sample in enumerate(corpus.samples):
        for name, vector in forms(sample).items():
            for task in TASKS:
                found[task][name][number] = float(means[task][name] @ vector)
    return found
