"""The contestants of train_step.py: what each process builds, and its loop.

All train decoders of the same number of parameters over the same vocabulary on the same random tokens,
with the same AdamW and the same clipping. Each takes one optimizer step per micro-batch, the arrangement
in which whatever is done once a step costs most. Frameworks are imported by the process that needs them.

T tokens, B batch, D hidden, V vocabulary.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from gate import Gate
from small_gpt import SmallGPT
from torch import Tensor, nn

from megatron_nexus.config.command_line import build, given_flags
from megatron_nexus.config.run_config import OptimizerConfig, Precision, RunConfig
from megatron_nexus.data.indexed_dataset import IndexedDataset
from megatron_nexus.models.decoder import training_flops_per_token
from megatron_nexus.training.machine import tune_malloc

PRESET = "nexusformer-20m"
MICRO_BATCH = 4
BATCHES_IN_MEMORY = 16
GEMM_SIZE = 2048
GEMM_PRODUCTS = 4

# The peers have the real model's depth, width, heads, vocabulary and untied head; what Nexus-Rank adds to
# Q, K and V goes to their feed-forward, so they spend the same FLOPs per token in fewer, larger products.
PEER_FEED_FORWARD = 1984
# A tied head saves a matrix that a lookup does not multiply with: at equal parameters more FLOPs per token.
SMALL_GPT_LAYERS, SMALL_GPT_HIDDEN, SMALL_GPT_HEADS = 6, 512, 8

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Job:
    """What one process is to be: `kind` names its builder; `tunes_malloc`: malloc keeps freed memory."""

    kind: str
    precision: Precision
    tunes_malloc: bool
    compiled: bool
    fused: bool
    corpus: Path
    folder: Path


def serve(job: Job, connection: Connection) -> None:
    """Build the job's contestant and train whenever the parent asks; never returns."""
    console = Path(job.folder / f"{job.kind}.log").open("w", buffering=1)  # noqa: SIM115 - until the end
    os.dup2(console.fileno(), sys.stdout.fileno())
    os.dup2(console.fileno(), sys.stderr.fileno())
    torch.manual_seed(1234)
    if job.tunes_malloc:
        tune_malloc()
    config = configuration(job)
    LOOPS[job.kind](job, config, connection)


def configuration(job: Job) -> RunConfig:
    """The configuration of the real path, by its command line; the others take their sizes from it.

    `same_architecture` is litgpt's decoder in our code: linear Q, K and V, and the peers' feed-forward.
    """
    flags: dict[str, object] = {
        "preset": PRESET,
        "precision": job.precision,
        "micro-batch-size": MICRO_BATCH,
        "global-batch-size": MICRO_BATCH,
        "train-iters": 1_000_000,
        "eval-interval": 0,
        "data-path": job.corpus,
        "save": job.folder / "run",
    }
    if job.kind == "same_architecture":
        flags |= {"projection": "linear", "nexus-m": 0, "nexus-a": 0, "ffn-hidden-size": PEER_FEED_FORWARD}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    return build(given_flags([*words, *(["--compile"] if job.compiled else [])]))


def batches(job: Job, config: RunConfig) -> Iterator[Batch]:
    """Micro-batches of the corpus for the loops that have no data pipeline: ready in memory."""
    length = config.training.seq_length
    size = MICRO_BATCH * length
    tokens = torch.from_numpy(IndexedDataset(job.corpus).tokens(0, BATCHES_IN_MEMORY * size + 1).astype(int))
    pairs = zip(tokens[:-1].split(size), tokens[1:].split(size), strict=True)
    return itertools.cycle([(a.view(MICRO_BATCH, length), b.view(MICRO_BATCH, length)) for a, b in pairs])


# ------------------------------------------------------------------------------------------- nexus train


def real_path(job: Job, config: RunConfig, connection: Connection) -> None:
    """`pretrain_nexus.py` from its configuration on: mesh, corpus, DeepSpeed engine, loop, metrics file."""
    from megatron_nexus import log
    from megatron_nexus.config.exit_signals import parse_exit_signals
    from megatron_nexus.config.rules import check
    from megatron_nexus.parallel.mesh import make_mesh
    from megatron_nexus.parallel.world import read_world
    from megatron_nexus.training.corpus import open_corpus
    from megatron_nexus.training.engine import Engine
    from megatron_nexus.training.faults import StopRequest
    from megatron_nexus.training.loop import Trainer
    from megatron_nexus.training.machine import gemm_flops_per_s

    class GatedStop(StopRequest):
        """The loop asks at the end of every step whether to stop: there it waits for the parent."""

        def __init__(self, gate: Gate) -> None:
            super().__init__(parse_exit_signals(config.checkpoint.exit_signal))
            self._gate = gate

        @property
        def is_asked(self) -> bool:
            self._gate.passed()
            return super().is_asked

    log.configure(is_main_rank=True)
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed reads it; the command sets it too
    world = read_world(os.environ)
    check(config, world.size)
    mesh = make_mesh(world, tp_size=1, pp_size=1)
    corpus = open_corpus(config, mesh, world.local_rank)
    rate = gemm_flops_per_s(mesh, job.precision)
    engine = Engine(config, mesh)
    save = job.folder / "run"
    save.mkdir()
    trainer = Trainer(config, mesh, engine, corpus, save, save, rate)
    count = sum(parameter.numel() for _, parameter in engine.parameters.values())
    trainer.fit(GatedStop(Gate(connection, facts(config, count, trainer.flops_per_token))))


# -------------------------------------------------------------------------------------- plain loops


def adamw(parameters: list[Tensor], optimizer: OptimizerConfig, fused: bool) -> torch.optim.AdamW:
    """The optimizer of `nexus train`: matrices decay, gains do not; not fused: torch's choice."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": optimizer.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (optimizer.adam_beta1, optimizer.adam_beta2)
    return torch.optim.AdamW(
        groups, lr=optimizer.lr, betas=betas, eps=optimizer.adam_eps, fused=fused or None
    )


def train(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    module: nn.Module,
    data: Iterator[Batch],
    job: Job,
    optimizer_config: OptimizerConfig,
    gate: Gate,
) -> None:
    """The loop that nobody can write shorter.

    bf16 means what it means in `nexus train`: weights in fp32, products in bf16, gradients in fp32. A bf16
    copy of the weights, made again after every step, is faster than autocast, which makes it in every pass.
    """
    if job.precision == "bf16":
        masters = [parameter.detach().clone() for parameter in module.parameters()]
        module.to(torch.bfloat16)
    else:
        masters = list(module.parameters())
    optimizer = adamw(masters, optimizer_config, job.fused)
    parameters = list(module.parameters())
    for tokens_BT, labels_BT in data:
        loss = loss_of(tokens_BT, labels_BT)
        loss.backward()
        if job.precision == "bf16":
            for master, parameter in zip(masters, parameters, strict=True):
                assert parameter.grad is not None
                master.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(masters, optimizer_config.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        if job.precision == "bf16":
            with torch.no_grad():
                torch._foreach_copy_([*parameters], [*masters])
        loss.item()
        gate.passed()


def bare(job: Job, config: RunConfig, connection: Connection) -> None:
    """The model of `nexus train` without DeepSpeed, loop, data pipeline and metrics."""
    from megatron_nexus.models.decoder import DecoderStage, Loss
    from megatron_nexus.models.layer_context import LayerContext
    from megatron_nexus.parallel.tensor_parallel import TensorParallel
    from megatron_nexus.spec.shard import Shard

    tp, shard = TensorParallel(None), Shard(0, 1, 1)
    layers = range(config.model.num_layers + 2)
    stage = DecoderStage(config.model, layers, LayerContext(tp, shard, config.training.seed))
    loss = Loss(config.model, tp, shard)
    flops = training_flops_per_token(config.model, config.training.seq_length)
    gate = Gate(connection, facts(config, parameter_count(stage), flops))
    data = batches(job, config)
    train(lambda tokens, labels: loss(stage(tokens), labels), stage, data, job, config.optimizer, gate)


def qwen3(job: Job, config: RunConfig, connection: Connection) -> None:
    """transformers' Qwen3 in the plain loop: the model at its fastest, without the Trainer around it."""
    model = qwen3_model(config)
    gate = Gate(connection, facts(config, parameter_count(model), untied_flops(model, config)))

    def loss_of(tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
        return nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten())

    train(loss_of, model, batches(job, config), job, config.optimizer, gate)


def qwen3_trainer(job: Job, config: RunConfig, connection: Connection) -> None:
    """transformers' Qwen3 as its users train it: transformers.Trainer, bf16 by autocast."""
    import transformers

    model = qwen3_model(config)
    gate = Gate(connection, facts(config, parameter_count(model), untied_flops(model, config)))

    class Gated(transformers.TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            gate.passed()

    optimizer = config.optimizer
    arguments = transformers.TrainingArguments(
        output_dir=str(job.folder / "trainer"),
        use_cpu=True,
        bf16=job.precision == "bf16",
        per_device_train_batch_size=MICRO_BATCH,
        max_steps=config.training.train_iters,
        optim="adamw_torch_fused",
        learning_rate=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_epsilon=optimizer.adam_eps,
        max_grad_norm=optimizer.clip_grad,
        logging_steps=config.logging.log_interval,
        save_strategy="no",
        report_to=[],
    )
    rows = torch.cat([tokens for tokens, _ in itertools.islice(batches(job, config), BATCHES_IN_MEMORY)])
    data = [{"input_ids": row, "labels": row} for row in rows]  # the model itself shifts the labels
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[Gated()]).train()


def qwen3_model(config: RunConfig) -> nn.Module:
    """Qwen3 with the real model's sizes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = config.model
    sizes = Qwen3Config(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_attention_heads,
        head_dim=model.kv_channels,
        intermediate_size=PEER_FEED_FORWARD,
        max_position_embeddings=config.training.seq_length,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    made: nn.Module = Qwen3ForCausalLM(sizes)
    return made


def litgpt(job: Job, config: RunConfig, connection: Connection) -> None:
    """litgpt's GPT with the loss of its pretraining; `compiled` as its `pretrain` command does it."""
    from litgpt.model import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    model = config.model
    sizes = Config(
        block_size=config.training.seq_length,
        vocab_size=model.vocab_size,
        padded_vocab_size=model.vocab_size,
        n_layer=model.num_layers,
        n_embd=model.hidden_size,
        n_head=model.num_attention_heads,
        intermediate_size=PEER_FEED_FORWARD,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
    )
    decoder = GPT(sizes)
    gate = Gate(connection, facts(config, parameter_count(decoder), untied_flops(decoder, config)))
    forward = torch.compile(decoder) if job.compiled else decoder
    data = batches(job, config)
    train(lambda a, b: chunked_cross_entropy(forward(a), b), decoder, data, job, config.optimizer, gate)


def small_gpt(job: Job, config: RunConfig, connection: Connection) -> None:
    """A decoder of GPT-2's shape."""
    length, layers, hidden = config.training.seq_length, SMALL_GPT_LAYERS, SMALL_GPT_HIDDEN
    model = SmallGPT(config.model.vocab_size, length, layers, hidden, SMALL_GPT_HEADS)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1) - length * hidden
    flops = 6 * matrices + 12 * layers * hidden * length
    gate = Gate(connection, facts(config, parameter_count(model), flops))
    train(model, model, batches(job, config), job, config.optimizer, gate)


# --------------------------------------------------------------------------------------- the machine


def gemm(job: Job, config: RunConfig, connection: Connection) -> None:
    """What the machine can do: a step is a few products of square matrices."""
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    gate = Gate(connection, {"flops_per_step": 2.0 * GEMM_SIZE**3 * GEMM_PRODUCTS})
    while True:
        for _ in range(GEMM_PRODUCTS):
            torch.mm(a, b, out=product)
        gate.passed()


# ------------------------------------------------------------------------------------------- counting


def parameter_count(module: nn.Module) -> int:
    """Elements of all parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def untied_flops(module: nn.Module, config: RunConfig) -> int:
    """Training FLOPs per token of a decoder whose embedding is a lookup only, counted as `spec.cost` does."""
    model = config.model
    embedding = model.vocab_size * model.hidden_size
    matrices = sum(p.numel() for p in module.parameters() if p.dim() > 1) - embedding
    return 6 * matrices + 12 * model.num_layers * model.attention_width * config.training.seq_length


def facts(config: RunConfig, parameters: int, flops_per_token: int) -> dict[str, float]:
    """What the parent needs to turn seconds into rates."""
    tokens = MICRO_BATCH * config.training.seq_length
    return {
        "parameters": parameters,
        "flops_per_token": flops_per_token,
        "tokens_per_step": tokens,
        "flops_per_step": tokens * flops_per_token,
    }


LOOPS: dict[str, Callable[[Job, RunConfig, Connection], None]] = {
    "real_path": real_path,
    "same_architecture": real_path,
    "bare": bare,
    "qwen3": qwen3,
    "qwen3_trainer": qwen3_trainer,
    "litgpt": litgpt,
    "small_gpt": small_gpt,
    "gemm": gemm,
}
