"""StackedLinear: many weight-only linears of one vector as one, and StackedRows in their places.

The modulation linears of all blocks of a diffusion transformer read the embedding of the timestep,
one row for each sample. Each is a launch that decodes few rows; stacked, they are one launch for a
whole forward:

    StackedLinear  rows   0 ...  N0 | N0 ... N0 + N1 | ...      holds the weights, once
    StackedRows           of linear 0  of linear 1     ...      stand where the linears stood

Rows of a packed weight are tiles of 128 channels, so those of one linear are a view of the whole:
StackedRows(x) computes them alone, from that view, and so nothing depends on who asked first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .codebook import joined_tables, tables_of_part
from .input_quantizer import InputQuantizer
from .linear import LRQLinear, has_hooks, refuse_gradients
from .reference import TILE
from .rotation import Rotation

_CONCATENATED = ("packed_weight", "weight_scale", "bias_bits")
_HALF_TYPES = (torch.bfloat16, torch.float16)


def stacking_obstacle(linears: Sequence[LRQLinear]) -> str | None:
    """Why `linears` cannot be one StackedLinear, None where they can. They must be weight-only
    ones of one scheme, width, device and dtype, with an unrotated, unsmoothed input that nothing
    else reads, without a low-rank branch and of whole tiles of channels."""
    first = linears[0]
    for linear in linears:
        name = linear.parts[0][0] or "a linear"
        quantizer = linear.input_quantizer
        if quantizer.scheme.act_bits != 16:
            return f"{name} quantizes its input"
        if not quantizer.is_identity():
            return f"{name} rotates or smooths its input"
        if len(quantizer.shared.readers) > 1:
            return f"{name} shares its input"
        if linear.has_low_rank:
            return f"{name} has a low-rank branch"
        if linear.out_features % TILE:
            return f"{name} has {linear.out_features} channels, which are not whole tiles of {TILE}"
        mine, theirs = (
            (
                other.scheme,
                other.in_features,
                other.bias_bits is None,
                other.packed_weight.device,
                other.dtype,
            )
            for other in (linear, first)
        )
        if mine != theirs:
            return f"{name} differs from others in scheme, width, bias, device or dtype"
    return None


class _Kept(NamedTuple):
    """Outputs of all linears for a vector, and which of them were given out."""

    vector: Callable[[], Tensor | None]
    version: int
    outputs: tuple[Tensor, ...]
    given: set[int]


class StackedLinear(LRQLinear):
    """The rows of `linears` in order, which ValueError refuses where stacking_obstacle does.

    Copies their buffers: whoever stacks them drops them. parts: as in any linear of several.
    """

    parts_share_input = False

    def __init__(self, linears: Sequence[LRQLinear]) -> None:
        obstacle = stacking_obstacle(linears)
        if obstacle is not None:
            raise ValueError(f"StackedLinear: {obstacle}")
        nn.Module.__init__(self)
        buffers = {}
        for name in _CONCATENATED:
            of_all = [linear._buffers[name] for linear in linears]
            present = [buffer for buffer in of_all if buffer is not None]
            buffers[name] = torch.cat(present) if present else None
        tables = [(linear.levels, linear.table_of_row) for linear in linears]
        buffers["levels"], buffers["table_of_row"] = joined_tables(tables)
        _fill(self, linears[0], [part for linear in linears for part in linear.parts], buffers)
        self._sizes = [linear.out_features for linear in linears]
        self._forget()

    def _forget(self) -> None:
        self._kept: _Kept | None = None
        self._last: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def read(self, index: int, vector: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
        """Linear `index` of prepare(vector), computed for all linears when the first one asks.

        A linear that asks for the same vector again gets a new computation: between two reads of
        one linear lies a forward, and what a vector holds may have changed in ways that its version
        does not tell (an inference tensor has none, a CUDA graph does not count).
        """
        version = 0 if vector.is_inference() else vector._version
        kept = self._kept  # looked at once: another thread may put what it reads there
        known = kept is not None and kept.vector() is vector and kept.version == version
        if kept is None or not known or index in kept.given:
            outputs = self(prepare(vector)).split(self._sizes, dim=-1)
            kept = self._kept = _Kept(weakref.ref(vector), version, outputs, set())
        kept.given.add(index)
        if len(kept.given) == len(self._sizes):
            self._forget()
        return kept.outputs[index]

    def by_value(self, index: int, x: Tensor) -> Tensor:
        """Linear `index` of x, computed for all linears unless x holds what the last one did: for a
        stack whose buffers are brought for every call, which costs more than the comparison."""
        last = self._last
        known = last is not None and last[0].shape == x.shape and last[0].dtype == x.dtype
        if last is None or not known or not torch.equal(last[0], x):
            last = self._last = (x.clone(), self(x).split(self._sizes, dim=-1))
        return last[1][index]

    def __getstate__(self) -> dict:
        # As PreparedInput's: a weak reference cannot be pickled.
        return {**self.__dict__, "_kept": None, "_last": None}


class StackedRows(nn.Module):
    """One of the linears in a StackedLinear, in that linear's place; without tensors of its own.

    stack: where the weights are; not a submodule, since it is one of the model already.
    index: which of its linears; start: its first row; part: the name it had as a linear.
    """

    stack: StackedLinear

    def __init__(self, stack: StackedLinear, index: int, start: int, linear: LRQLinear) -> None:
        super().__init__()
        self.__dict__["stack"] = stack
        self.index, self.start = index, start
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.parts, self.training = list(linear.parts), linear.training

    def _buffers_of_rows(self) -> dict[str, Tensor | None]:
        """Views of the stack's buffers; tables that rows share are those of the whole stack."""
        rows = slice(self.start, self.start + self.out_features)
        places = dict.fromkeys(self.stack._buffers, rows)
        places["packed_weight"] = slice(rows.start // TILE, rows.stop // TILE)
        if self.stack.table_of_row is not None:
            places["levels"] = slice(None)
        return {
            name: None if buffer is None else buffer[places[name]]
            for name, buffer in self.stack._buffers.items()
        }

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N], of these rows alone."""
        refuse_gradients(x)
        stack = self.stack
        if has_hooks(stack):  # its buffers are where they should be while it runs, only
            return stack.by_value(self.index, x)
        buffers = self._buffers_of_rows()
        scale, bias = buffers["weight_scale"], buffers["bias_bits"]
        y = ops.gemm_a16(
            x.reshape(-1, self.in_features),
            buffers["packed_weight"],
            buffers["levels"],
            scale.view(torch.float32),  # type: ignore[union-attr]
            None if bias is None else bias.view(torch.float32),
            stack.scheme.weight_bits,
            self.out_features,
            table_of_row=buffers["table_of_row"],
        )
        return y.view(*x.shape[:-1], self.out_features)

    def read(self, vector: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
        """forward(prepare(vector)), vector [B, K], by one launch for all linears of the stack.

        By these rows alone under torch.compile, whose graphs may hold one block, and where the
        launch would be no gemv: that would decode the weights of all linears into memory.
        """
        few = vector.dtype in _HALF_TYPES and vector.shape[0] <= ops.GEMV_MAX_ROWS
        if torch.compiler.is_compiling() or not few:
            return self(prepare(vector))
        return self.stack.read(self.index, vector, prepare)

    def linear(self) -> LRQLinear:
        """The linear that was stacked, with buffers of its own."""
        linear = LRQLinear.__new__(LRQLinear)
        nn.Module.__init__(linear)
        rows = self._buffers_of_rows()
        levels, of_row = rows["levels"], rows["table_of_row"]
        if levels is not None and of_row is not None:
            rows["levels"], rows["table_of_row"] = tables_of_part(levels, of_row, slice(None))
        own = {name: None if b is None else b.clone() for name, b in rows.items()}
        _fill(linear, self.stack, list(self.parts), own)
        return linear

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def stack_linears(linears: Sequence[LRQLinear]) -> tuple[StackedLinear, list[StackedRows]]:
    """One StackedLinear of `linears`, and for each what goes in its place."""
    stack = StackedLinear(linears)
    places, start = [], 0
    for index, linear in enumerate(linears):
        places.append(StackedRows(stack, index, start, linear))
        start += linear.out_features
    return stack, places


def _fill(linear: LRQLinear, like: LRQLinear, parts: list[tuple[str, int]], buffers: dict) -> None:
    """Make `linear`, which nn.Module has initialized, one of these parts and buffers, otherwise as
    `like`; with an input of its own."""
    linear.scheme, linear.dtype, linear.training = like.scheme, like.dtype, like.training
    linear.in_features, linear.parts = like.in_features, parts
    linear.out_features = sum(count for _, count in parts)
    for name, buffer in {**buffers, "low_rank_up": None, "row_order": None}.items():
        linear.register_buffer(name, buffer)
    plain = InputQuantizer(like.in_features, like.scheme, None, Rotation.none())
    linear.input_quantizer = plain.join()
