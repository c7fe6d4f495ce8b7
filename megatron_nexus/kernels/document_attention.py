"""Attention within documents by FlexAttention: blocks that the mask hides are not computed.

A mask of documents has T x T values a sample, and most of them hide. A block mask has one for each block of
128 x 128, made once for all layers of a stage. torch has the kernel for GPUs, where it must be compiled; on a
CPU it has no backward, so training there keeps the dense mask, which is the reference of the tests.

T tokens, B batch, N heads, G heads of keys, H head size.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def document_block_mask(document_BT: Tensor, window: int = 0) -> BlockMask:
    """Return the mask by which a token sees itself and earlier ones of its document, `window` of them in all.

    `document_BT` are the numbers of the documents of a sample; a `window` of 0 hides none.
    """

    def visible(b: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (document_BT[b, query] == document_BT[b, key])
        return seen & (query - key < window) if window else seen

    samples, tokens = document_BT.shape
    return create_block_mask(
        visible,
        samples,
        None,
        tokens,
        tokens,
        device=document_BT.device,
        _compile=document_BT.device.type == "cuda",  # else it computes all T x T values first
    )


def block_masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Queries [B, N, T, H], keys and values [B, G, T, H] -> [B, N, T, H]; to be called in compiled code."""
    mixed = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=k.shape[1] < q.shape[1])
    assert isinstance(mixed, torch.Tensor)
    return mixed
