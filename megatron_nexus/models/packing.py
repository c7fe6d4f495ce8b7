"""Packing: samples that hold several documents, and what attention must know of them.

Positions [B, T] count each token's place in its document from 0, so a 0 is where a document begins; what
a sample holds of a document that began before it counts from 0 too. They are all that pipeline stages
send each other with the activations.

T tokens, B batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from megatron_nexus.kernels.document_attention import document_block_mask
from megatron_nexus.models.layer_context import LayerContext


@dataclass(frozen=True)
class Packing:
    """What the blocks of a stage share; None: documents of a sample are one text in that respect."""

    positions_TB: Tensor | None
    """The place of each token for rotary embedding, where it restarts with each document."""
    mask_B1TT: Tensor | None
    """Whether a token (second to last axis) sees another: an earlier one of the same document."""
    blocks: BlockMask | None = None
    """The same for FlexAttention, with the sliding window, in place of the mask."""


def packing_of(positions_BT: Tensor, context: LayerContext, window: int = 0) -> Packing:
    """What `context` asks to keep apart. The mask takes B T^2 bytes, once per stage and micro-batch."""
    mask_B1TT, blocks = None, None
    document_BT = (positions_BT == 0).cumsum(dim=1)
    if context.reset_attention_mask and context.flex_attention:
        blocks = document_block_mask(document_BT, window)
    elif context.reset_attention_mask:
        same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
        mask_B1TT = same_BTT.tril()[:, None]
    return Packing(positions_BT.t() if context.reset_position_ids else None, mask_B1TT, blocks)


def _window_TS(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Whether each of the last `queries` of `keys` tokens sees each: itself and `window` - 1 before it."""
    place_T1 = torch.arange(keys - queries, keys, device=device)[:, None]
    place_S = torch.arange(keys, device=device)
    return (place_S <= place_T1) & (place_S > place_T1 - window)


def window_mask(
    packing: Packing | None, queries: int, keys: int, window: int, device: torch.device
) -> Tensor | None:
    """Return the mask of `packing` with what a sliding window hides; None: each token sees all before it.

    Distances are those of positions where `packing` keeps texts of one row apart, of places otherwise.
    """
    mask = packing.mask_B1TT if packing is not None else None
    if not window or keys <= window:
        return mask
    if packing is None or mask is None:
        return _window_TS(queries, keys, window, device)
    if packing.positions_TB is not None and len(packing.positions_TB) == keys:
        positions_BT = packing.positions_TB.t()
        return mask & (positions_BT[:, None, :, None] - positions_BT[:, None, None, :] < window)
    return mask & _window_TS(queries, keys, window, device)


Stream = Tensor | tuple[Tensor, Tensor]
"""What enters and leaves a stage: token ids or activations, for packed samples with their positions."""
