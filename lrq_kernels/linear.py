"""LRQLinear: a linear layer that holds only its packed weight.

All buffers are integers. Floating data is kept as views of integers, so that model.to(bfloat16),
layerwise casting and loaders that cast floats cannot touch it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .codebook import joined_tables, tables_of_part
from .input_quantizer import InputQuantizer, as_they_are, own_copy, with_last_stride_1
from .linear_state import BRANCH_DTYPE, LinearState, as_bits
from .placeholder import WeightPlaceholder
from .scheme import INPUT_FIELDS


def refuse_gradients(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            "LRQLinear is for inference: it has no backward. Run under torch.no_grad() or "
            "torch.inference_mode(), or detach the input"
        )


# Hooks of diffusers' context parallelism, which leave the tensors of a module where they are.
_EXCHANGING_HOOKS = frozenset({"ContextParallelSplitHook", "ContextParallelGatherHook"})


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of diffusers or accelerate move or cast the tensors of this module, or do what
    is not known here. Those that exchanges_tokens tells of do not count."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None and not all(map(_exchanges, registry.hooks.values())):
        return True
    return hasattr(module, "_hf_hook")


def exchanges_tokens(module: nn.Module) -> bool:
    """Whether hooks of context parallelism split or gather what goes in or out among processes."""
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and any(map(_exchanges, registry.hooks.values()))


def _exchanges(hook: object) -> bool:
    return type(hook).__name__ in _EXCHANGING_HOOKS


class LRQLinear(nn.Linear):
    """y = x @ W.T + bias with W as 2^b int8 levels per row, selected by b-bit codes.

    Buffers: packed_weight (int32, device layout of lrq::prepack), levels (int8 [N, 2^b], or
    [T, 2^b] where rows share tables, and table_of_row, uint8 [N], says which), weight_scale and
    bias_bits (fp32 [N] as int32), low_rank_up (bf16 [N, R] as int16, None without a low-rank
    branch), and row_order (int32 [N]): which canonical row each row is, None where they are in
    order (module row_order reorders them). x is [..., K] in bf16, fp16 or fp32; y has x's
    dtype. act_bits 8 and 4 take two launches: rotate_quantize and gemm. act_bits 16 rotates, then
    runs gemm_a16.

    With a low-rank branch W is the codes' weight + low_rank_up @ low_rank_down, and there are two
    products by torch, in x's dtype: p = x @ low_rank_down.T of x before smoothing and rotation,
    once for all linears that read x, and p @ low_rank_up.T. Both are rounded to x's dtype; act_bits
    8 and 4 add the second inside the gemm, in fp32, act_bits 16 adds it to the rounded rest by
    addmm.

    It is an nn.Linear, so that PEFT and offloading take it for one: weight is a placeholder without
    values, of the dtype that the model around it has (dtype), and bias is float32. state_dict holds
    the buffers as they are, since offloading hooks look them up there by name, and the placeholder;
    checkpoints hold the canonical form instead, through to_state.
    """

    packed_weight: Tensor
    levels: Tensor
    table_of_row: Tensor | None
    weight_scale: Tensor
    bias_bits: Tensor | None
    low_rank_up: Tensor | None
    row_order: Tensor | None
    # Whether the linears in parts stand under one input in a checkpoint.
    parts_share_input = True

    def __init__(
        self,
        state: LinearState,
        input_quantizer: InputQuantizer,
        name: str = "",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate the dense weight
        scheme, shared = state.scheme, input_quantizer.scheme
        for field in INPUT_FIELDS:
            if getattr(scheme, field) != getattr(shared, field):
                raise ValueError(
                    f"LRQLinear {name}: {field} must be {getattr(shared, field)!r} as in the input "
                    f"it shares, got {getattr(scheme, field)!r}"
                )
        if input_quantizer.in_features != state.in_features:
            raise ValueError(
                f"LRQLinear {name}: in_features must be {input_quantizer.in_features} as in the "
                f"input it shares, got {state.in_features}"
            )
        up = state.low_rank_up
        rank = 0 if up is None else up.shape[1]
        if input_quantizer.low_rank != rank:
            raise ValueError(
                f"LRQLinear {name}: low_rank_up must have rank {input_quantizer.low_rank} as the "
                f"input it shares has, got {rank}"
            )
        self.scheme = scheme
        self.in_features = state.in_features
        self.out_features = state.out_features
        # Names and row counts of the linears that this one holds: one, or several when fused.
        self.parts: list[tuple[str, int]] = [(name, state.out_features)]
        # Of the weight that this linear stands for: what PEFT and others cast to.
        self.dtype = dtype
        packed = ops.prepack(state.codes, state.in_features, scheme.weight_bits)
        self.register_buffer("packed_weight", packed)
        self.register_buffer("levels", own_copy(state.levels))
        of_row = state.table_of_row
        self.register_buffer("table_of_row", None if of_row is None else own_copy(of_row))
        self.register_buffer("weight_scale", as_bits(state.weight_scale))
        self.register_buffer("bias_bits", None if state.bias is None else as_bits(state.bias))
        self.register_buffer("low_rank_up", None if up is None else as_bits(up, BRANCH_DTYPE))
        self.register_buffer("row_order", None)
        self.input_quantizer = input_quantizer.join()

    @classmethod
    def from_state(
        cls,
        state: LinearState,
        input_quantizer: InputQuantizer | None = None,
        name: str = "",
        dtype: torch.dtype = torch.float32,
    ) -> LRQLinear:
        """From the canonical form; without input_quantizer the state's own rotation makes one."""
        if input_quantizer is None:
            input_quantizer = InputQuantizer(
                state.in_features,
                state.scheme,
                state.smooth_scale,
                state.rotation,
                state.low_rank_down,
            )
        return cls(state, input_quantizer, name, dtype).to(state.codes.device)

    @property
    def weight(self) -> Tensor:
        """Shape, dtype and device of the weight; its values are in packed_weight."""
        shape = (self.out_features, self.in_features)
        return WeightPlaceholder.of(shape, self.dtype, self.packed_weight.device)

    @property
    def bias(self) -> Tensor | None:
        """fp32 [N] in canonical order: a view of bias_bits where the rows are in it."""
        bits = self.bias_bits
        return None if bits is None else self._canonical(bits.view(torch.float32))

    def _canonical(self, rows: Tensor) -> Tensor:
        """What is held by row, in the canonical order of the rows."""
        return rows if self.row_order is None else rows[self.row_order.argsort()]

    def _apply(self, fn: Callable, recurse: bool = True) -> LRQLinear:
        # No buffer is floating, so a cast of the model shows in a tensor that is.
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.packed_weight.device))
        super()._apply(fn, recurse)
        self.dtype = probe.dtype
        return self

    def codes(self) -> Tensor:
        """Canonical packed codes, int32 [N, ceil(K/32)*b]."""
        sizes = (self.out_features, self.in_features, self.scheme.weight_bits)
        return self._canonical(ops.unprepack(self.packed_weight, *sizes))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight of the codes in the rotated domain, [N, K]: without a low-rank branch, which
        is of the domain that x comes in."""
        weight = ops.dequantize(
            self.packed_weight,
            self.levels,
            self.weight_scale.view(torch.float32),
            self.out_features,
            self.in_features,
            self.scheme.weight_bits,
            dtype,
            self.table_of_row,
        )
        return self._canonical(weight)

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        tokens, scale, projected = self.input_quantizer(
            x, alone=torch.compiler.is_compiling() and has_hooks(self)
        )
        if scale is None:
            y = self._forward_a16(tokens.reshape(-1, self.in_features), projected)
            return y.view(*x.shape[:-1], self.out_features)
        branch = None
        if projected is not None:
            with as_they_are(x.device):
                branch = F.linear(projected, self._branch_factor(x.dtype))
        return self.from_quantized(tokens, scale, x.dtype, branch=branch)

    def from_quantized(
        self,
        x_q: Tensor,
        x_scale: Tensor,
        out_dtype: torch.dtype,
        activation: str = "none",
        residual: Tensor | None = None,
        gate: Tensor | None = None,
        branch: Tensor | None = None,
    ) -> Tensor:
        """The linear of a quantized input, x_q int8 [..., K] and x_scale fp32 [...] as
        input_quantizer gives them, to [..., N]; then the activation ("gelu_tanh"), or
        residual [..., N] + gate [B, N] * y, where gate is one row for each of B equal parts of the
        tokens. fp32 from the sum to the rounding at the end. See lrq::gemm for its errors.

        branch [..., N]: what forward computed of x by the low-rank branch, added as the residual
        is, in place of one. Raises RuntimeError where there is a branch and it is not given: it
        reads x itself, see has_low_rank."""
        if self.has_low_rank and branch is None:
            raise RuntimeError(
                f"LRQLinear.from_quantized: {self.parts[0][0] or 'the linear'} has a low-rank "
                "branch, which a quantized input does not serve; call the linear"
            )
        added = residual if branch is None else branch
        buffers, bias = self._buffers, self._buffers["bias_bits"]
        y = ops.gemm(
            x_q.view(-1, self.in_features),
            x_scale.view(-1),
            buffers["packed_weight"],
            buffers["levels"],
            buffers["weight_scale"].view(torch.float32),
            None if bias is None else bias.view(torch.float32),
            None if added is None else added.reshape(-1, self.out_features),
            gate,
            self.scheme.weight_bits,
            self.out_features,
            activation,
            out_dtype,
            buffers["table_of_row"],
        )
        return y.view(*x_q.shape[:-1], self.out_features)

    @property
    def has_low_rank(self) -> bool:
        return self._buffers["low_rank_up"] is not None

    def _branch_factor(self, dtype: torch.dtype) -> Tensor:
        """[N, R]"""
        return self._buffers["low_rank_up"].view(BRANCH_DTYPE).to(dtype)

    def _forward_a16(self, rows: Tensor, projected: Tensor | None) -> Tensor:
        bias = self.bias_bits
        y = ops.gemm_a16(
            with_last_stride_1(rows),
            self.packed_weight,
            self.levels,
            self.weight_scale.view(torch.float32),
            None if bias is None else bias.view(torch.float32),
            self.scheme.weight_bits,
            self.out_features,
            table_of_row=self.table_of_row,
        )
        if projected is None:
            return y
        factor = self._branch_factor(y.dtype)
        with as_they_are(y.device):
            return torch.addmm(y, projected.reshape(-1, factor.shape[1]), factor.T)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in the model's own domain, [N, K]: smoothing and rotation undone, a low-rank
        branch added."""
        dense = self.input_quantizer.rotation().inverse(self.dequantize())
        scale = self.input_quantizer.smooth_scale()
        dense = dense if scale is None else dense * scale
        up, down = self._canonical_up(), self.input_quantizer.low_rank_factor()
        if up is not None and down is not None:
            dense = dense + up.float() @ down.float()
        return dense.to(dtype or self.dtype)

    def _canonical_up(self) -> Tensor | None:
        """bf16 [N, R] in canonical order."""
        up = self.low_rank_up
        return None if up is None else self._canonical(up.view(BRANCH_DTYPE))

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:  # type: ignore[no-untyped-def]
        """The buffers, and weight: the LoRA loader of FLUX looks its shape up there."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        if isinstance(state_dict.get(prefix + "weight"), WeightPlaceholder):
            del state_dict[prefix + "weight"]  # of load_state_dict's own copy
        # copy_ would turn the floats of another layout into integers without a word.
        for name, buffer in self._buffers.items():
            given = state_dict.get(prefix + name)
            if given is not None and buffer is not None and given.dtype != buffer.dtype:
                errors.append(f"{prefix}{name} must be {buffer.dtype}, got {given.dtype}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )

    def to_state(self) -> LinearState:
        """The canonical form of this linear (as one, even when fused from several)."""
        of_row = self.table_of_row
        return LinearState(
            codes=self.codes(),
            levels=self.levels if of_row is not None else self._canonical(self.levels),
            weight_scale=self._canonical(self.weight_scale.view(torch.float32)),
            bias=self.bias,
            scheme=self.scheme,
            in_features=self.in_features,
            out_features=self.out_features,
            smooth_scale=self.input_quantizer.smooth_scale(),
            rotation=self.input_quantizer.rotation(),
            low_rank_down=self.input_quantizer.low_rank_factor(),
            low_rank_up=self._canonical_up(),
            table_of_row=None if of_row is None else self._canonical(of_row),
        )

    def part_states(self) -> dict[str, LinearState]:
        """Canonical forms of the linears that were fused into this one, by name."""
        whole, start, states = self.to_state(), 0, {}
        for name, count in self.parts:
            rows = slice(start, start + count)
            start += count
            levels, of_row = tables_of_part(whole.levels, whole.table_of_row, rows)
            states[name] = dataclasses.replace(
                whole,
                codes=whole.codes[rows],
                levels=levels,
                table_of_row=of_row,
                weight_scale=whole.weight_scale[rows],
                bias=None if whole.bias is None else whole.bias[rows],
                low_rank_up=None if whole.low_rank_up is None else whole.low_rank_up[rows],
                out_features=count,
            )
        return states

    def extra_repr(self) -> str:
        fused = "" if len(self.parts) == 1 else f", fused={[name for name, _ in self.parts]}"
        branch = f", low_rank={self.input_quantizer.low_rank}" if self.has_low_rank else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme.name}, bias={self.bias is not None}{branch}{fused}"
        )


def fuse_linears(linears: list[LRQLinear]) -> LRQLinear:
    """One linear whose rows are those of `linears` in order; lossless, everything is per row.

    Raises ValueError unless all share one InputQuantizer and scheme, agree on having a bias, and
    have their rows in order.
    """
    first = linears[0]
    for other in linears[1:]:
        same_input = other.input_quantizer.shared is first.input_quantizer.shared
        if not same_input or other.scheme != first.scheme:
            raise ValueError(
                f"fuse_linears: {other.parts[0][0]} must share its input and scheme with "
                f"{first.parts[0][0]}"
            )
        if (other.bias is None) != (first.bias is None):
            raise ValueError("fuse_linears: either all linears have a bias or none")
    if any(linear.row_order is not None for linear in linears):
        raise ValueError("fuse_linears: a permutation is folded into the rows of a linear")
    states = [linear.to_state() for linear in linears]
    biases = [state.bias for state in states if state.bias is not None]
    # All or none have a branch, as their input has.
    ups = [state.low_rank_up for state in states if state.low_rank_up is not None]
    levels, of_row = joined_tables([(state.levels, state.table_of_row) for state in states])
    state = dataclasses.replace(
        states[0],
        codes=torch.cat([state.codes for state in states]),
        levels=levels,
        table_of_row=of_row,
        weight_scale=torch.cat([state.weight_scale for state in states]),
        bias=torch.cat(biases) if biases else None,
        low_rank_up=torch.cat(ups) if ups else None,
        out_features=sum(state.out_features for state in states),
    )
    fused = LRQLinear(state, first.input_quantizer, dtype=first.dtype)
    fused.parts = [part for linear in linears for part in linear.parts]
    for linear in linears:
        linear.input_quantizer.leave()
    return fused


def split_linear(fused: LRQLinear) -> list[LRQLinear]:
    """Inverse of fuse_linears: the linears that were fused, in order, reading the same input."""
    linears = [
        LRQLinear(state, fused.input_quantizer, name, fused.dtype)
        for name, state in fused.part_states().items()
    ]
    fused.input_quantizer.leave()
    return linears
