"""The reference: the whole model in one process, from the equations, sharing no code with the package.

It reads a dict of logical tensors by name and computes in their dtype.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def rms_norm(x: Tensor, gain: Tensor, model: dict) -> Tensor:
    size = model["base_hidden_size"] or model["hidden_size"]
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / size + model["norm_epsilon"]) * gain


def norm(x: Tensor, w: dict[str, Tensor], name: str, model: dict) -> Tensor:
    """The norm `name` of the model's kind."""
    if model["normalization"] == "RMSNorm":
        return rms_norm(x, w[f"{name}.gain"], model)
    # Off the direction (1, .., 1) of the units that the model was born with.
    born = model["base_hidden_size"] or model["hidden_size"]
    ones = (torch.arange(x.shape[-1]) < born).to(x.dtype) / math.sqrt(born)
    rest = x - (x @ ones)[..., None] * ones
    return rest / torch.sqrt((rest * rest).sum(-1, keepdim=True) / born + model["norm_epsilon"])


def pattention(x: Tensor, w: dict[str, Tensor], name: str, born: int) -> Tensor:
    """Slots that have grown later do not move the scale sqrt(born)."""
    a = x @ w[f"{name}.keys"].T
    length = a.norm(dim=-1, keepdim=True)
    unit = torch.where(length == 0, 0.0, a / torch.where(length == 0, 1.0, length))
    return gelu(unit * math.sqrt(born)) @ w[f"{name}.values"].T


def nexus_rank(x: Tensor, w: dict[str, Tensor], name: str, model: dict, ffn: bool = False) -> Tensor:
    """With an inner norm each stage has the length sqrt(D), or that of its width, as before growth."""
    m, a = ("ffn_nexus_m", "ffn_hidden_size") if ffn else ("nexus_m", "nexus_a")

    def act(h: Tensor, width: str) -> Tensor:
        if model["nexus_inner_norm"]:
            width = "hidden_size" if model["nexus_inner_norm_scale"] == "hidden" else width
            # A root of zero has no derivative, and padded or newly inserted units are zero.
            length = (h * h).sum(-1, keepdim=True).clamp_min(1e-30).sqrt()
            h = h / (length + 1e-5) * math.sqrt(model[f"base_{width}"] or model[width])
        return gelu(h)

    h_m = act(x @ w[f"{name}.w_m"].T, m)
    h_a = act(h_m @ w[f"{name}.w_a"].T, a)
    return h_a @ w[f"{name}.w_d"].T


def frequency(model: dict, i: Tensor, size: int) -> Tensor:
    """base^(-2 i / size); Llama 3.1 divides those that turn slowly, and blends in between."""
    f = model["rotary_base"] ** (-2.0 * i / size)
    if not model["use_rope_scaling"]:
        return f
    low, high = model["rope_low_freq_factor"], model["rope_high_freq_factor"]
    wavelength, length = 2.0 * math.pi / f, model["original_max_position_embeddings"]
    divided = f / model["rope_scaling_factor"]
    smooth = (length / wavelength - low) / (high - low)
    between = (1.0 - smooth) * divided + smooth * f
    return torch.where(
        wavelength < length / high, f, torch.where(wavelength > length / low, divided, between)
    )


def rotary(x: Tensor, model: dict) -> Tensor:
    """x [batch, heads, tokens, size]: pairs (i, i + size / 2) turn by t * frequency i."""
    tokens, size = x.shape[-2:]
    t = torch.arange(tokens, dtype=torch.float64)[:, None]
    i = torch.arange(size // 2, dtype=torch.float64)[None, :]
    angle = t * frequency(model, i, size)
    turn = torch.complex(angle.cos().to(x.dtype), angle.sin().to(x.dtype))
    z = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
    return torch.cat([z.real, z.imag], dim=-1)


def head_norm(x: Tensor, gain: Tensor, model: dict) -> Tensor:
    """x [..., size]; the mean is over the channels that a head was born with."""
    born = model["base_kv_channels"] or model["kv_channels"]
    mean = (x[..., :born] ** 2).sum(-1, keepdim=True) / born
    return x / torch.sqrt(mean + model["norm_epsilon"]) * gain


def project(y: Tensor, w: dict[str, Tensor], name: str, model: dict) -> Tensor:
    if model["projection"] == "pattention":
        return pattention(y, w, name, model["base_pattention_slots"] or model["pattention_slots"])
    out = 0.0
    if model["projection"] in ("linear", "linear_nexus"):
        out = out + y @ w[f"{name}.weight"].T
        if model["add_qkv_bias"]:
            out = out + w[f"{name}.bias"]
    if model["projection"] in ("nexus", "linear_nexus"):
        out = out + nexus_rank(y, w, name, model)
    return out


def attention(y: Tensor, w: dict[str, Tensor], a: str, model: dict) -> Tensor:
    """Normed input [batch, tokens, D] -> the attention's output [batch, tokens, D]."""
    batch, length = y.shape[:2]
    heads, size = model["num_attention_heads"], model["kv_channels"]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    if model["sliding_window"]:
        mask = mask.triu(1 - model["sliding_window"])
    layer = int(a.split(".")[1]) + 1 if "." in a else 1
    turns = not (model["no_rope_freq"] and layer % model["no_rope_freq"] == 0)
    q, k, v = (project(y, w, f"{a}.{p}", model) for p in "qkv")
    if model["qk_layernorm_all_heads"]:
        q, k = (
            x / torch.sqrt((x * x).mean(-1, keepdim=True) + model["norm_epsilon"]) * w[f"{a}.{p}_norm.gain"]
            for x, p in ((q, "q"), (k, "k"))
        )
    q, k, v = (x.view(batch, length, -1, size).transpose(1, 2) for x in (q, k, v))
    if model["qk_layernorm"] and not model["qk_layernorm_all_heads"]:
        q, k = (head_norm(x, w[f"{a}.{p}_norm.gain"], model) for x, p in ((q, "q"), (k, "k")))
    # Neighbours share a head of keys and values.
    k, v = (torch.stack([x[:, i * x.shape[1] // heads] for i in range(heads)], 1) for x in (k, v))
    turning = model["base_kv_channels"] or size

    def shares(q: Tensor, k: Tensor) -> Tensor:
        q, k = (
            torch.cat([rotary(x[..., :turning], model), x[..., turning:]], dim=-1) if turns else x
            for x in (q, k)
        )
        return (q @ k.transpose(-1, -2) / math.sqrt(turning)).masked_fill(~mask, -torch.inf).softmax(-1)

    q_m, k_m = q, k
    for _ in range(1, model["attention_order"]):
        if model["attention_inner"] == "cross":
            read_q = read_k = shares(q_m, k_m)
        else:  # channels that a head has grown are not counted
            born = (torch.arange(size) < turning).to(q.dtype)
            read_q, read_k = shares(q_m * born, q_m), shares(k_m * born, k_m)
        q_m, k_m = read_q @ q, read_k @ k
        if model["attention_gate"]:
            a_q, a_k = (
                torch.stack([gate[i * len(gate) // heads] for i in range(heads)])[:, None, None]
                for gate in (w[f"{a}.q_gate.weight"], w[f"{a}.k_gate.weight"])
            )
            q_m, k_m = (1 - a_q) * q + a_q * q_m, (1 - a_k) * k + a_k * k_m
    z = (shares(q_m, k_m) @ v).transpose(1, 2).reshape(batch, length, heads * size)
    if model["projection"] == "pattention":
        return project(z, w, f"{a}.output", model)
    if model["nexus_output_projection"]:
        return nexus_rank(z, w, f"{a}.output", model)
    return z @ w[f"{a}.output.weight"].T


def feed_forward(y: Tensor, w: dict[str, Tensor], f: str, model: dict) -> Tensor:
    if model["feed_forward"] == "pattention":
        return pattention(y, w, f, model["base_ffn_hidden_size"] or model["ffn_hidden_size"])
    if model["feed_forward"] == "nexus":
        return nexus_rank(y, w, f, model, ffn=True)
    gate = y @ w[f"{f}.gate"].T
    return (gate / (1.0 + torch.exp(-gate)) * (y @ w[f"{f}.up"].T)) @ w[f"{f}.down"].T


def block(layer: Callable[..., Tensor], x: Tensor, w: dict[str, Tensor], name: str, model: dict) -> Tensor:
    """An attention or feed-forward with its norm, of its input or of its output."""
    if model["post_norm"]:
        return norm(layer(x, w, name, model), w, f"{name}.post_norm", model)
    return layer(norm(x, w, f"{name}.norm", model), w, name, model)


def logits(w: dict[str, Tensor], tokens: Tensor, model: dict) -> Tensor:
    """Token ids [batch, tokens] -> logits [batch, tokens, vocabulary]."""
    x = w["embedding.weight"][tokens]
    for i in range(model["num_layers"]):
        a, f = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        x = x + block(attention, x, w, a, model)
        x = x + block(feed_forward, x, w, f, model)
    return norm(x, w, "final_norm", model) @ w["head.weight"].T


def logits_of_packed(w: dict[str, Tensor], tokens: Tensor, positions: Tensor, model: dict) -> Tensor:
    """The logits of each document of each sample, computed alone; documents begin at position 0."""
    rows = []
    for row, places in zip(tokens, positions, strict=True):
        begins = [*(places == 0).nonzero()[:, 0].tolist(), len(row)]
        parts = [row[None, a:b] for a, b in itertools.pairwise(begins)]
        rows.append(torch.cat([logits(w, part, model)[0] for part in parts]))
    return torch.stack(rows)


def loss(
    w: dict[str, Tensor], tokens: Tensor, labels: Tensor, model: dict, positions: Tensor | None = None
) -> Tensor:
    z = logits(w, tokens, model) if positions is None else logits_of_packed(w, tokens, positions, model)
    return (torch.logsumexp(z, -1) - z.gather(-1, labels[..., None])[..., 0]).mean()


def train(
    w: dict[str, Tensor],
    batches: list[tuple[Tensor, Tensor]],
    config: dict,
    positions: Tensor | None = None,
    state: dict[str, tuple[Tensor, Tensor, Tensor]] | None = None,
    lr_factors: Callable[[int], dict[str, Tensor]] | None = None,
) -> dict:
    """AdamW (Loshchilov and Hutter, algorithm 2) on whole global batches: losses, norms, first gradients.

    `state`: both moments and the steps taken so far of every element; none for a start from zero.
    `lr_factors`: what the learning rate of every element is multiplied by at a step, counted from 1.
    """
    o = config["optimizer"]
    w = {name: t.clone().requires_grad_() for name, t in w.items()}
    state = state or {
        name: (torch.zeros_like(t), torch.zeros_like(t), torch.zeros_like(t)) for name, t in w.items()
    }
    losses, norms, first = [], [], {}
    for step, (tokens, labels) in enumerate(batches, start=1):
        factors = lr_factors(step) if lr_factors else {}
        value = loss(w, tokens, labels, config["model"], positions)
        grads = dict(zip(w, torch.autograd.grad(value, list(w.values())), strict=True))
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads.values()))
        first = first or grads
        clip = min(1.0, o["clip_grad"] / (norm + 1e-6)) if o["clip_grad"] else 1.0
        losses.append(value.item())
        norms.append(norm)
        b1, b2 = o["adam_beta1"], o["adam_beta2"]
        with torch.no_grad():
            for name, t in w.items():
                g, (m, v, steps) = grads[name] * clip, state[name]
                steps += 1
                m.mul_(b1).add_((1 - b1) * g)
                v.mul_(b2).add_((1 - b2) * g * g)
                lr = o["lr"] * factors.get(name, 1.0)
                t.mul_(1 - lr * (o["weight_decay"] if t.dim() > 1 else 0.0))
                t.sub_(lr * (m / (1 - b1**steps)) / ((v / (1 - b2**steps)).sqrt() + o["adam_eps"]))
    return {"losses": losses, "norms": norms, "first_gradients": first, "weights": w}
