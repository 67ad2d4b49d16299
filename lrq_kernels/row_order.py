"""A permutation of the input of one linear, folded into the rows of the linears that make it.

Where an input is made by an activation that acts on each channel alone, its channels come in the
order of the rows that made them. With the rows in the order of the permutation, the reader gets its
input permuted, and gathers nothing:

    reader   InputQuantizer.permutation becomes folded_permutation, which is not applied; columns of
             low_rank_down, which read x as it comes, are put in its order
    maker    LRQLinear.row_order says which canonical row each row is

Both give the canonical form as before (to_state), and both can be undone without loss. The way
there makes new buffers, since states taken before are views of the old ones; the way back writes
them where they are, so that what holds them by then (offloading hooks) holds the right values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops
from .input_quantizer import InputQuantizer
from .linear import LRQLinear

_BY_ROW = ("weight_scale", "bias_bits", "low_rank_up")


def order_rows(linear: LRQLinear, order: Tensor) -> None:
    """Put the rows of `linear` in `order` (int32 [N], a permutation), which row_order then says."""
    if linear.row_order is not None:
        raise ValueError(f"order_rows: the rows of {linear.parts[0][0]} are in an order already")
    linear._buffers.update(_taken(linear, order))
    linear.row_order = order.clone()


def restore_rows(linear: LRQLinear) -> None:
    """Undo order_rows, bit for bit; nothing where the rows are in their own order."""
    if linear.row_order is not None:
        for name, values in _taken(linear, linear.row_order.argsort()).items():
            _write(linear.get_buffer(name), values)
        linear.row_order = None


def fold_permutation(quantizer: InputQuantizer) -> None:
    """The input comes permuted from now on."""
    _move(quantizer, "permutation", "folded_permutation")
    down, order = quantizer.low_rank_down, quantizer.folded_permutation
    if down is not None and order is not None:
        quantizer.low_rank_down = down[:, order.long()]


def unfold_permutation(quantizer: InputQuantizer) -> None:
    """Undo fold_permutation; nothing where it was not folded."""
    if quantizer.folded_permutation is not None:
        down = quantizer.low_rank_down
        if down is not None:
            _write(down, down[:, quantizer.folded_permutation.long().argsort()])
        _move(quantizer, "folded_permutation", "permutation")


def restore_order(module: nn.Module) -> None:
    """Undo whatever of this is in `module`. Raises RuntimeError, and changes nothing, where the
    weights are elsewhere, moved by hooks."""
    linears = [m for m in module.modules() if isinstance(m, LRQLinear) and m.row_order is not None]
    for linear in linears:
        if linear.packed_weight.is_meta:
            raise RuntimeError(
                f"restore_order: {linear.parts[0][0]} has no values while hooks offload it; "
                "remove the hooks first"
            )
    for linear in linears:
        restore_rows(linear)
    for quantizer in module.modules():
        if isinstance(quantizer, InputQuantizer):
            unfold_permutation(quantizer)


def _taken(linear: LRQLinear, order: Tensor) -> dict[str, Tensor]:
    """The buffers of `linear` with its row order[i] as row i."""
    index = order.long()
    sizes = (linear.in_features, linear.scheme.weight_bits)
    codes = ops.unprepack(linear.packed_weight, linear.out_features, *sizes)
    taken = {"packed_weight": ops.prepack(codes[index], *sizes)}
    # Of shared tables the rows are elsewhere.
    tables = "levels" if linear.table_of_row is None else "table_of_row"
    for name in (tables, *_BY_ROW):
        buffer = linear._buffers[name]
        if buffer is not None:
            taken[name] = buffer[index]
    return taken


def _write(buffer: Tensor, values: Tensor) -> None:
    # A model loaded under inference_mode holds tensors that may be written there alone.
    with torch.inference_mode(buffer.is_inference()):
        buffer.copy_(values)


def _move(quantizer: InputQuantizer, source: str, target: str) -> None:
    buffers = quantizer._buffers
    buffers[source], buffers[target] = None, buffers[source]
    quantizer.shared.forget()
