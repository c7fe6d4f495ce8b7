"""Which initial values of Nexus-Rank train best: rules x sizes x learning rates x budgets, and a picture.

    python benchmarks/initial_values.py runs/values            hours of one core; an interrupted run goes on

Each run trains the product's decoder in a plain PyTorch loop in bf16 with fp32 master weights on the built-
in corpus: AdamW, WSD with a linear decay to a tenth over the last fifth of the budget. Budgets are tokens
for each parameter; the shorter ones branch off the constant part of the longest, so that one trunk serves
all. All runs of a seed read the same samples, and all are validated on the same 65,536 tokens. A rule is
compared at the best of the learning rates that were tried.

Weights are drawn as the product draws them, then the three matrices of each Q, K and V are scaled to a
rule's deviations; every other matrix is N(0, 2 / (5 D)), residual writers by 1 / sqrt(2 layers) of that. The
rules of other families scale what they draw: the linear Q, K and V, the values of every Pattention, W_down
of SwiGLU, to a third and to three times their default.

D hidden size, M and A the widths of Nexus-Rank, B batch, T tokens.
"""

import argparse
import copy
import json
import math
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.data.default_corpus import cache_folder, prepare_default_corpus
from megatron_nexus.data.indexed_dataset import IndexedDataset
from megatron_nexus.models.decoder import DecoderStage, Loss
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.parameters import logical_parameters
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.param import Normal
from megatron_nexus.spec.shard import Shard
from megatron_nexus.training.machine import tune_malloc

VOCABULARY, LENGTH, BATCH, LAYERS = 1024, 128, 16, 2
VALIDATION_BATCHES = 32
GELU_GAIN = 1.5336
"""1 / sqrt(E gelu(z)^2) of a standard normal z."""
INNER = ("inner_norm_d", "inner_norm_width")
SCALES = {"": 1.0, "_third": 1 / 3, "_tripled": 3.0}
SCALED = {"linear": r"\.[qkv]\.weight$", "pattention": r"\.values$", "swiglu": r"\.down$"}
"""The matrices of a family whose default is questioned; its rules are `linear`, `linear_third` and so on."""
FAMILY_RULES = {f"{family}{suffix}": (family, scale) for family in SCALED for suffix, scale in SCALES.items()}
SHOWN = ("rule", "width", "lr", "seed", "budget", "loss", "spike", "seconds")

Record = dict[str, Any]
"""What `measure` yields: a line of results.jsonl."""


@dataclass(frozen=True)
class Trial:
    """One trunk and its branches."""

    rule: str
    width: int
    lr: float
    seed: int
    budgets: tuple[float, ...]
    warmup: float = 0.02
    """Share of the shortest budget's steps over which the learning rate rises, at least 10 steps."""


def model_of(width: int, rule: str) -> ModelConfig:
    """Two layers; M = 5/4 D, A = 3/2 D, as in the tiny preset; slots of Pattention as in tokenformer-tiny."""
    family = FAMILY_RULES.get(rule, ("nexus", 1.0))[0]
    model = ModelConfig(
        vocab_size=VOCABULARY,
        num_layers=LAYERS,
        hidden_size=width,
        num_attention_heads=width // 32,
        kv_channels=32,
        ffn_hidden_size=8 * width // 3 // 8 * 8,
        nexus_m=5 * width // 4,
        nexus_a=3 * width // 2,
        nexus_inner_norm=rule in INNER,
        nexus_inner_norm_scale="width" if rule == "inner_norm_width" else "hidden",
        init_method_std=math.sqrt(2 / (5 * width)),
    )
    match family:
        case "linear":
            return replace(model, projection="linear")
        case "pattention":
            return replace(
                model,
                projection="pattention",
                feed_forward="pattention",
                normalization="NonParametricLayerNorm",
                pattention_slots=3 * width // 2,
                ffn_hidden_size=4 * width,
            )
    return model


def deviations(rule: str, projection: str, model: ModelConfig) -> tuple[float, float, float]:
    """Standard deviations of W_M, W_A and W_D of the projection "q", "k" or "v"."""
    d, m, a, std = model.hidden_size, model.nexus_m, model.nexus_a, model.init_method_std
    linear = std * math.sqrt(d)  # the RMS of a linear projection's outputs
    first, second, third = d**-0.5, GELU_GAIN * m**-0.5, GELU_GAIN * a**-0.5
    match rule.removeprefix("centred_"):
        case "same_std" | "inner_norm_d" | "inner_norm_width":
            return std, std, std
        case "fan_in":
            return d**-0.5, m**-0.5, a**-0.5
        case "even":  # as matched, the factor shared out evenly over the three
            share = linear ** (1 / 3)
            return first * share, second * share, third * share
    by = {  # what the outputs of W_D are divided by
        "matched": 1.0,
        "matched_third": 3.0,
        "matched_tenth": 10.0,
        "small_qk": 1.0 if projection == "v" else 10.0,
        "small_v": 10.0 if projection == "v" else 1.0,
        "third_v": 3.0 if projection == "v" else 1.0,
        "zero_q": math.inf if projection == "q" else 1.0,
    }
    return first, second, third * linear / by[rule.removeprefix("centred_")]


def build(trial: Trial) -> tuple[DecoderStage, Loss, ModelConfig]:
    model = model_of(trial.width, trial.rule)
    tp, shard = TensorParallel(None), Shard(0, 1, 1)
    stage = DecoderStage(model, range(LAYERS + 2), LayerContext(tp, shard, trial.seed))
    with torch.no_grad():
        for name, (spec, parameter) in logical_parameters(stage).items():
            family, scale = FAMILY_RULES.get(trial.rule, ("", 1.0))
            if family:
                if re.search(SCALED[family], name):
                    parameter.mul_(scale)
                continue
            *_, projection, matrix = ("", *name.split("."))
            if projection in ("q", "k", "v") and matrix in ("w_m", "w_a", "w_d"):
                assert isinstance(spec.init, Normal), name
                wanted = deviations(trial.rule, projection, model)[("w_m", "w_a", "w_d").index(matrix)]
                parameter.mul_(wanted / spec.init.std)
                if trial.rule.startswith("centred") and matrix != "w_m":
                    parameter.sub_(parameter.mean(dim=1, keepdim=True))
    return stage, Loss(model, tp, shard), model


def tokens_of_corpus() -> Tensor:
    corpus = prepare_default_corpus(cache_folder(""), VOCABULARY)
    data = IndexedDataset(corpus.prefix)
    return torch.from_numpy(data.tokens(0, corpus.tokens).astype("int64"))


def rows(tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    picked = tokens[starts[:, None] + torch.arange(LENGTH + 1)]
    return picked[:, :-1], picked[:, 1:]


def adamw(parameters: list[nn.Parameter], lr: float) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


class Run:
    """A model in training; `branch` copies it with its optimizer."""

    def __init__(self, trial: Trial, tokens: Tensor) -> None:
        self.trial, self.tokens = trial, tokens
        self.held = VALIDATION_BATCHES * BATCH * LENGTH + 1  # the last tokens are for validation
        self.stage, self.loss, _ = build(trial)
        self.masters = [nn.Parameter(p.detach().clone()) for p in self.stage.parameters()]
        self.stage.to(torch.bfloat16)
        self.optimizer = adamw(self.masters, trial.lr)
        self.step, self.largest_norm, self.worst, self.smooth = 0, 0.0, 0.0, 0.0
        order = torch.Generator().manual_seed(trial.seed)
        count = (len(tokens) - self.held - 1) // LENGTH
        self.starts = torch.randperm(count, generator=order) * LENGTH

    def branch(self) -> "Run":
        other = copy.copy(self)
        other.stage = copy.deepcopy(self.stage)
        other.masters = [nn.Parameter(p.detach().clone()) for p in self.masters]
        other.optimizer = adamw(other.masters, self.trial.lr)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return other

    def advance(self, lr: float) -> None:
        first = self.step * BATCH % (len(self.starts) - BATCH)
        inputs_BT, labels_BT = rows(self.tokens, self.starts[first : first + BATCH])
        loss = self.loss(self.stage(inputs_BT), labels_BT)
        loss.backward()
        parameters = list(self.stage.parameters())
        for master, parameter in zip(self.masters, parameters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        norm = float(nn.utils.clip_grad_norm_(self.masters, 1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_([*parameters], [*self.masters])
        self.step += 1
        value = loss.item()
        self.smooth = value if self.step == 1 else 0.95 * self.smooth + 0.05 * value
        if self.step > 100:
            self.worst = max(self.worst, value - self.smooth)  # a spike
            self.largest_norm = max(self.largest_norm, norm)

    @torch.no_grad()
    def validate(self) -> float:
        begin = len(self.tokens) - self.held
        total = 0.0
        for index in range(VALIDATION_BATCHES):
            starts = begin + (index * BATCH + torch.arange(BATCH)) * LENGTH
            total += float(self.loss(self.stage(rows(self.tokens, starts)[0]), rows(self.tokens, starts)[1]))
        return total / VALIDATION_BATCHES


def measure(trial: Trial, tokens: Tensor) -> Iterator[Record]:
    """The record of each budget: validation loss in nats per token, spikes."""
    began = time.monotonic()
    run = Run(trial, tokens)
    parameters = sum(p.numel() for p in run.stage.parameters())
    ends = {budget: round(budget * parameters / (BATCH * LENGTH)) for budget in sorted(trial.budgets)}
    last = max(ends.values())
    warmup = max(10, round(trial.warmup * min(ends.values())))
    for budget, end in ends.items():
        decay = max(1, end // 5)
        while run.step < end - decay:
            run.advance(trial.lr * min(1.0, (run.step + 1) / warmup))
        tail = run if end == last else run.branch()
        for k in range(decay):
            tail.advance(trial.lr * (1 - 0.9 * (k + 1) / decay))
        yield {
            **asdict(trial),
            "budget": budget,
            "parameters": parameters,
            "steps": end,
            "loss": tail.validate(),
            "spike": tail.worst,
            "largest_norm": tail.largest_norm,
            "seconds": time.monotonic() - began,
        }


def short_attention(
    q_BNTH: Tensor, k: Tensor, v: Tensor, mask: None, is_causal: bool, scale: float, enable_gqa: bool
) -> Tensor:
    """Causal attention by plain products: at 128 tokens and in bf16 a quarter of a step faster than fused."""
    assert mask is None and is_causal and not enable_gqa
    batch, heads, length, size = q_BNTH.shape
    hidden = torch.full((length, length), -math.inf, dtype=q_BNTH.dtype).triu(1)
    q, k, v = (x.reshape(batch * heads, length, size) for x in (q_BNTH, k, v))
    scores = torch.baddbmm(hidden.expand(batch * heads, -1, -1), q, k.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), v).view(batch, heads, length, size)


def work(trial: Trial) -> list[Record]:
    torch.set_num_threads(1)
    tune_malloc()
    F.scaled_dot_product_attention = short_attention  # type: ignore[assignment]
    return list(measure(trial, tokens_of_corpus()))


Losses = dict[tuple[int, float], dict[str, dict[float, list[float]]]]
"""By width and budget, then rule, then learning rate: the losses of the seeds."""


def warmup_of(record: Record) -> float:
    return float(record.get("warmup", Trial.warmup))


def name_of(record: Record) -> str:
    """The rule, and its warm-up where that is not the usual one."""
    warmup = warmup_of(record)
    return str(record["rule"]) + (f", warm-up {warmup:g}" if warmup != Trial.warmup else "")


def losses_of(records: Sequence[Record]) -> Losses:
    found: Losses = {}
    for r in sorted(records, key=lambda r: (r["width"], r["budget"], r["rule"], r["lr"], r["seed"])):
        cell = found.setdefault((r["width"], r["budget"]), {}).setdefault(name_of(r), {})
        cell.setdefault(r["lr"], []).append(r["loss"])
    return found


def tell(records: Sequence[Record]) -> None:
    """Each rule at its best learning rate, in Markdown; s.e. over seeds where there are several."""
    parameters = {r["width"]: r["parameters"] for r in records}
    for (width, budget), rules in losses_of(records).items():
        steps = round(budget * parameters[width] / (BATCH * LENGTH))
        print(
            f"\nD {width}, {parameters[width]:,} parameters, {budget:g} tokens a parameter, {steps:,} steps\n"
        )
        rates = sorted({lr for lrs in rules.values() for lr in lrs})
        print(
            f"| rule | best | {' | '.join(f'lr {lr:g}' for lr in rates)} |\n|---|{'---:|' * (1 + len(rates))}"
        )
        means = {rule: {lr: statistics.mean(x) for lr, x in lrs.items()} for rule, lrs in rules.items()}
        for rule in sorted(means, key=lambda rule: min(means[rule].values())):
            swept = [cell(rules[rule].get(lr, [])) for lr in rates]
            print(f"| {rule} | {min(means[rule].values()):.4f} | {' | '.join(swept)} |")


def cell(values: Sequence[float]) -> str:
    """The mean, with several seeds its standard error and their number."""
    if len(values) < 2:
        return "".join(f"{value:.4f}" for value in values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.4f} ± {error:.4f} ({len(values)})"


def draw(records: Sequence[Record], path: Path) -> None:
    """For each width and budget the loss against the learning rate, a line for each rule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = losses_of(records)
    widths, budgets = sorted({w for w, _ in found}), sorted({b for _, b in found})
    names = sorted({name_of(r) for r in records})
    figure, grid = pyplot.subplots(
        len(widths),
        len(budgets),
        figsize=(4 * len(budgets), 3 * len(widths)),
        dpi=80,
        layout="constrained",
        squeeze=False,
    )
    for width, row in zip(widths, grid, strict=True):
        for budget, axes in zip(budgets, row, strict=True):
            rules = found.get((width, budget), {})
            axes.set_visible(bool(rules))
            for rule, lrs in rules.items():
                place = names.index(rule)
                means = [statistics.mean(values) for values in lrs.values()]
                marker = "os^vD<>p*"[place // 10]
                axes.plot(list(lrs), means, f"{marker}-", color=f"C{place % 10}", label=rule)
            axes.set_xscale("log", base=2)
            axes.set(title=f"D {width}, {budget:g} tokens a parameter", xlabel="learning rate")
            axes.grid(alpha=0.3)
    for row in grid:
        row[0].set_ylabel("validation loss, nats per token")
    handles = {h.get_label(): h for row in grid for axes in row for h in axes.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where results.jsonl and the picture lie")
    parser.add_argument("--rules", nargs="*", default=[])
    parser.add_argument("--widths", nargs="*", type=int, default=[32])
    parser.add_argument("--lrs", nargs="*", type=float, default=[])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1])
    parser.add_argument("--budgets", nargs="*", type=float, default=[1, 5, 20], help="tokens a parameter")
    parser.add_argument("--warmup", type=float, default=Trial.warmup, help="share of the steps")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of a thread each")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    results = given.folder / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    keys = {(r["rule"], r["width"], r["lr"], r["seed"], r["budget"], warmup_of(r)) for r in done}
    trials = [
        Trial(rule, width, lr, seed, tuple(given.budgets), given.warmup)
        for width in given.widths
        for seed in given.seeds
        for lr in given.lrs
        for rule in given.rules
        if any((rule, width, lr, seed, budget, given.warmup) not in keys for budget in given.budgets)
    ]
    tokens_of_corpus()  # before several processes want to prepare it
    with ProcessPoolExecutor(given.jobs) as pool:
        for future in as_completed([pool.submit(work, trial) for trial in trials]):
            with results.open("a") as file:
                for record in future.result():
                    file.write(json.dumps(record) + "\n")
                    print(*(f"{key} {record[key]}" for key in SHOWN), flush=True)
                    done.append(record)
    tell(done)
    draw(done, given.folder / "initial_values.png")
    print(f"\npicture: {given.folder / 'initial_values.png'}")


if __name__ == "__main__":
    main()
