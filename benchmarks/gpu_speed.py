"""Stages of gpu_kit.py that measure: the device, the model, the whole step, variants, peers."""

import time
from collections.abc import Iterator
from functools import partial

import torch
from gpu_stage import (
    CUDA,
    DEVICE,
    RECORD,
    Kit,
    Row,
    engine_of,
    make_model,
    peak_gib,
    planned_gib,
    predicted_model_rate,
    predicted_product_rate,
    predicted_step_rate,
    reset_memory,
    seconds_of,
    synchronize,
    tokens_of,
)
from gpu_variants import document_variants, loss_variants, nexus_variants
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_nexus.config.command_line import build
from megatron_nexus.config.presets import Value
from megatron_nexus.models.decoder import DecoderStage, Loss, training_flops_per_token
from megatron_nexus.planner.roofline import BANDWIDTH_SHARE


def env(kit: Kit) -> Iterator[Row]:
    """Rates of the device: products, copies, attention by head size, and which back end attention takes."""
    size = 8192 if CUDA else 512
    a, b = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    kit.gemm_flops_per_s = 2 * size**3 / seconds_of(lambda: a @ b, 20 if CUDA else 3)
    yield Row(
        f"GEMM {size}^3 bf16",
        kit.gemm_flops_per_s / 1e12,
        "TFLOP/s",
        predicted_product_rate(size, size, size),
    )
    x = torch.empty(2**28 if CUDA else 2**22, device=DEVICE)
    y = torch.empty_like(x)
    rate = 2 * x.nbytes / seconds_of(lambda: y.copy_(x), 10) / 1e9
    yield Row("device copy", rate, "GB/s", 1e3 * BANDWIDTH_SHARE * RECORD.bandwidth if RECORD else None)
    if CUDA:
        for pinned in (True, False):
            host = torch.empty(2**26, pin_memory=pinned)
            there = torch.empty(2**26, device=DEVICE)
            rate = host.nbytes / seconds_of(partial(host.copy_, there), 5) / 1e9
            yield Row(f"GPU to {'pinned' if pinned else 'pageable'} host", rate, "GB/s", 50 if pinned else 5)
    shapes = {
        "240m": (12, 12, 64),
        "480m": (10, 10, 80),
        "qwen3-240m": (16, 8, 64),
        "transformer++-640m": (24, 24, 68),
    }
    for name, (heads, groups, channels) in shapes.items():
        length, batch = (4096, 4) if CUDA else (128, 1)
        q = torch.randn(batch, heads, length, channels, device=DEVICE).bfloat16().requires_grad_()
        k = torch.randn(batch, groups, length, channels, device=DEVICE).bfloat16().requires_grad_()
        v = torch.randn(length, batch, groups, channels, device=DEVICE).bfloat16().permute(1, 2, 0, 3)
        v = v.requires_grad_()  # the layout in which the model hands it over

        def attend(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            mixed = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1]
            )
            mixed.sum().backward()

        flops = 3.5 * 2 * batch * heads * channels * length**2
        backend = ""
        if CUDA:
            choice = torch._fused_sdp_choice(q, k, v, None, 0.0, True, scale=0.1, enable_gqa=groups < heads)
            backend = f", {torch.nn.attention.SDPBackend(choice).name}"
        yield Row(
            f"attention {name}{backend}", flops / seconds_of(attend, 5 if CUDA else 1) / 1e12, "TFLOP/s"
        )
    if CUDA:
        for m, k_, n in (
            (16384, 768, 780),
            (16384, 768, 832),
            (16384, 768, 2496),
            (16384, 832, 960),
            (16384, 2048, 5632),
        ):
            a, b = torch.randn(m, k_, device=DEVICE).bfloat16(), torch.randn(n, k_, device=DEVICE).bfloat16()
            rate = 2 * m * k_ * n / seconds_of(partial(torch.mm, a, b.t()), 20) / 1e12
            yield Row(f"GEMM {m} x {k_} x {n}", rate, "TFLOP/s", predicted_product_rate(m, k_, n))


def speed(kit: Kit) -> Iterator[Row]:
    """Forward and backward of the model alone, eager and compiled."""
    sizes = ("nexusformer-240m", "nexusformer-640m", "qwen3-240m") if CUDA else ("nexusformer-tiny",)
    for preset in sizes:
        config = build({"preset": preset})
        length, micro_batch = (config.training.seq_length, 4) if CUDA else (32, 1)
        flops = training_flops_per_token(config.model, length)
        tokens = tuple(x.to(DEVICE) for x in tokens_of(config, micro_batch, length))
        rates = {}
        for how in ("eager", "compiled"):
            if kit.left_s < 60 and CUDA:
                return
            reset_memory()
            torch.compiler.reset()
            stage, loss = make_model(config, torch.bfloat16, compiled=how == "compiled")

            def step(
                stage: DecoderStage = stage, loss: Loss = loss, batch: tuple[Tensor, ...] = tokens
            ) -> None:
                stage.zero_grad(set_to_none=True)
                loss(stage(batch[0]), batch[1]).backward()

            began = time.monotonic()
            step()
            synchronize()
            warm_s = time.monotonic() - began
            rates[how] = micro_batch * length / seconds_of(step, 10 if CUDA else 2)
            name = f"{preset} {how}"
            flags: dict[str, Value] = {"preset": preset, "precision": "bf16", "compile": how == "compiled"}
            planned = build({**flags, "micro_batch_size": micro_batch, "seq_length": length})
            yield Row(name, rates[how], "tokens/s", predicted_model_rate(planned))
            if kit.gemm_flops_per_s:
                yield Row(f"{name}: of the GEMM rate", 100 * rates[how] * flops / kit.gemm_flops_per_s, "%")
            yield Row(f"{name}: first step", warm_s, "s")
            if CUDA:
                yield Row(f"{name}: peak", peak_gib(), "GiB")
            del stage, step
        yield Row(
            f"{preset}: compiled / eager",
            rates["compiled"] / rates["eager"],
            "x",
            at_least=1.15 if preset == "nexusformer-240m" else None,
        )


def loop(kit: Kit) -> Iterator[Row]:
    """The real engine with four micro-batches a step, eager and compiled: tokens/s."""
    goals = {"nexusformer-240m": 45.0, "nexusformer-640m": 50.0} if CUDA else {"nexusformer-tiny": None}
    for preset, goal in goals.items():
        for compiled in (False, True) if CUDA else (False,):
            if kit.left_s < 45 and CUDA:
                return
            flags: dict[str, Value] = {"preset": preset, "global_batch_size": 16, "compile": compiled}
            with engine_of(kit, flags) as (made, config, batches):
                seconds = seconds_of(partial(made.train_step, batches, 1e-4), 5 if CUDA else 1)
                rate = config.training.global_batch_size * config.training.seq_length / seconds
                flops = training_flops_per_token(config.model, config.training.seq_length)
                name = f"{preset} {'compiled' if compiled else 'eager'}, whole step"
                yield Row(name, rate, "tokens/s", predicted_step_rate(config))
                if kit.gemm_flops_per_s:
                    yield Row(
                        f"{name}: of the GEMM rate",
                        100 * rate * flops / kit.gemm_flops_per_s,
                        "%",
                        at_least=goal if compiled else None,
                    )
                if CUDA:
                    yield Row(f"{name}: peak", peak_gib(), "GiB", planned_gib(config))


def variants(kit: Kit) -> Iterator[Row]:
    """Parts in question, one by one: the attention's back ends, the loss, sizes of micro-batches."""
    yield from loss_variants()
    yield from nexus_variants()
    if not CUDA:
        return
    for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
        q, k, v = (torch.randn(4, 12, 4096, 64, device=DEVICE).bfloat16().requires_grad_() for _ in range(3))

        def attend(q: Tensor = q, k: Tensor = k, v: Tensor = v, backend: str = backend) -> None:
            with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
                F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

        yield Row(f"attention of 240m by {backend}", 1e3 * seconds_of(attend, 5), "ms")
    yield from document_variants()
    for micro_batch in (1, 2, 4, 8):
        config = build({"preset": "nexusformer-240m", "micro_batch_size": micro_batch})
        reset_memory()
        stage, loss = make_model(config, torch.bfloat16)
        batch = tuple(x.to(DEVICE) for x in tokens_of(config, micro_batch, config.training.seq_length))

        def step(stage: DecoderStage = stage, loss: Loss = loss, batch: tuple[Tensor, ...] = batch) -> None:
            stage.zero_grad(set_to_none=True)
            loss(stage(batch[0]), batch[1]).backward()

        rate = micro_batch * config.training.seq_length / seconds_of(step, 5)
        name = f"nexusformer-240m eager, micro-batch {micro_batch}"
        yield Row(name, rate, "tokens/s", predicted_model_rate(config))
        del stage, step


def peers(kit: Kit) -> Iterator[Row]:
    """transformers' Qwen3 of qwen3-240m's shape, eager and compiled, and ours on the same device."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    preset = "qwen3-240m" if CUDA else "qwen3-tiny"
    config = build({"preset": preset})
    m, length, micro_batch = config.model, config.training.seq_length if CUDA else 32, 4 if CUDA else 1
    tokens, labels = (x.to(DEVICE) for x in tokens_of(config, micro_batch, length))
    rates = {}
    for how in ("eager", "compiled") if CUDA else ("eager",):
        torch.compiler.reset()
        theirs: nn.Module = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=m.vocab_size,
                hidden_size=m.hidden_size,
                intermediate_size=m.ffn_hidden_size,
                num_hidden_layers=m.num_layers,
                num_attention_heads=m.num_attention_heads,
                num_key_value_heads=m.query_groups,
                head_dim=m.kv_channels,
                max_position_embeddings=length,
                tie_word_embeddings=False,
                use_cache=False,
            )
        )
        theirs.to(DEVICE, torch.bfloat16)
        ours, loss = make_model(config, torch.bfloat16, compiled=how == "compiled")
        if how == "compiled":
            theirs.compile()

        def their_step(model: nn.Module = theirs) -> None:
            model.zero_grad(set_to_none=True)
            logits = model(tokens).logits
            F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()).backward()

        def our_step(stage: DecoderStage = ours, loss: Loss = loss) -> None:
            stage.zero_grad(set_to_none=True)
            loss(stage(tokens), labels).backward()

        repeats = 10 if CUDA else 2
        rates[how] = [micro_batch * length / seconds_of(step, repeats) for step in (our_step, their_step)]
        yield Row(f"{preset} of transformers, {how}", rates[how][1], "tokens/s")
        goal = 1.0 if CUDA and how == "compiled" else None
        yield Row(f"{preset}: ours / transformers', {how}", rates[how][0] / rates[how][1], "x", at_least=goal)
        del theirs, ours, our_step, their_step
        reset_memory()
