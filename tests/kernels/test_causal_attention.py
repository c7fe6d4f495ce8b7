"""Law: causal attention with our backward pass equals attention written out, forward and backward."""

import pytest
import torch

from megatron_nexus.kernels.causal_attention import BLOCK, causal_attention
from tests.kernels.test_grouped_linear import distance

# Norms, relative. bfloat16: probabilities and gradients of scores are rounded by 2^-9, and differences of
# them are small beside them.
BOUND = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2.0**-6}


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("tokens", [BLOCK - 3, BLOCK + 5])
def test_it_equals_attention_written_out(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape, scale = (tokens, 2, 3, 16), 0.3
    q, k, v = (torch.randn(shape, dtype=dtype).permute(1, 2, 0, 3).requires_grad_() for _ in range(3))
    mine = causal_attention(q, k, v, scale)
    upstream = torch.randn_like(mine)
    found = [mine, *torch.autograd.grad(mine, [q, k, v], upstream)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = scale * exact[0] @ exact[1].transpose(-1, -2)
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(later, -torch.inf).softmax(-1) @ exact[2]
    all_expected = [expected, *torch.autograd.grad(expected, exact, upstream.double())]
    for one, other in zip(found, all_expected, strict=True):
        assert distance(one, other) < BOUND[dtype]
