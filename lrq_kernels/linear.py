"""LRQLinear: a linear layer that holds only its packed weight, and InputQuantizer, what comes
before it.

Linears that read the same tensor (q, k and v; proj_mlp of a FLUX single block) share a
PreparedInput: the input is rotated and quantized once and every sharer's GEMM reads the result.
Each linear has an InputQuantizer of its own, with buffers of its own: offloading moves the buffers
of one linear while another runs.

All buffers are integers. Floating data is kept as int32 views, so that model.to(bfloat16),
layerwise casting and loaders that cast floats cannot touch it.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .linear_state import LinearState
from .placeholder import WeightPlaceholder
from .rotation import Rotation
from .scheme import INPUT_FIELDS, QuantScheme


def _no_source() -> None:
    return None


def _fuse_what_is_compiled() -> bool:
    """Runs while torch.compile traces a quantized linear, before inductor sees the graph."""
    from . import fusion

    fusion.enable_by_default()
    return True


# As torch.compiler.assume_constant_result marks it, whose import of torch._dynamo takes a second.
_fuse_what_is_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    return bool(_hook_names(module) - _EXCHANGING_HOOKS) or hasattr(module, "_hf_hook")


def exchanges_tokens(module: nn.Module) -> bool:
    """Whether hooks of context parallelism split or gather what goes in or out among processes."""
    return bool(_hook_names(module) & _EXCHANGING_HOOKS)


def _hook_names(module: nn.Module) -> set[str]:
    registry = getattr(module, "_diffusers_hook", None)
    return set() if registry is None else {type(hook).__name__ for hook in registry.hooks.values()}


def as_bits(tensor: Tensor) -> Tensor:
    """A float32 copy seen as int32, the form in which floats are stored."""
    copy = tensor.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
    return copy.view(torch.int32)


def _copy(tensor: Tensor | None) -> Tensor | None:
    # Buffers own their memory: load_state_dict writes into them.
    return None if tensor is None else tensor.detach().clone(memory_format=torch.contiguous_format)


def _with_last_stride_1(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class PreparedInput:
    """What the readers of one input have in common: act_bits, and the prepared input from the first
    read to the last.

    readers: the InputQuantizers of the linears that read it; all hold the same values.
    act_bits: the scheme's, or what set_act_bits made of it.
    """

    def __init__(self, act_bits: int) -> None:
        self.act_bits = act_bits
        self.readers: list[InputQuantizer] = []
        self.forget()

    def forget(self) -> None:
        self._source: Callable[[], Tensor | None] = _no_source
        self._version = 0
        self._result: Any = None
        self._reads_left = 0

    def read(
        self, x: Tensor, prepare: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """prepare(x), computed once for as many reads of the same x as there are readers."""
        source = self._source()
        if source is None or source is not x or self._version != x._version:
            self._result = prepare(x)
            self._source, self._version = weakref.ref(x), x._version
            self._reads_left = len(self.readers)
        result = self._result
        self._reads_left -= 1
        if self._reads_left == 0:
            self.forget()
        return result

    def __getstate__(self) -> dict:
        # A weak reference cannot be copied or pickled; what it caches need not be.
        return {**self.__dict__, "_source": _no_source, "_result": None, "_reads_left": 0}


class InputQuantizer(nn.Module):
    """Smoothing, rotation and per-token quantization of the input of one LRQLinear.

    Buffers: channel_scale (fp32 [K] as int32: smoothing and signs in the order of lrq::rotate),
    permutation (int32 [K]), matrices (fp32 [2, 128, 128] as int32); each may be None, as may
    folded_permutation, a permutation that x comes in already (see row_order).
    shared: what it has in common with the quantizers of other linears that read the same input.
    """

    channel_scale: Tensor | None
    permutation: Tensor | None
    folded_permutation: Tensor | None
    matrices: Tensor | None

    def __init__(
        self,
        in_features: int,
        scheme: QuantScheme,
        smooth_scale: Tensor | None,
        rotation: Rotation,
    ) -> None:
        super().__init__()
        rotation.validate(in_features)
        if rotation.kind != scheme.rotation:
            raise ValueError(
                f"InputQuantizer: rotation is {rotation.kind!r}, the scheme says "
                f"{scheme.rotation!r}"
            )
        self.in_features = in_features
        self.scheme = scheme
        self.shared = PreparedInput(scheme.act_bits)
        scale = smooth_scale
        if rotation.kind == "hadamard":
            device = None if rotation.signs is None else rotation.signs.device
            scale = torch.ones(in_features, device=device) if scale is None else scale
            if rotation.permutation is not None:
                scale = scale[rotation.permutation.long()]
            if rotation.signs is not None:
                scale = scale * rotation.signs.to(scale)
        self.register_buffer("channel_scale", None if scale is None else as_bits(scale))
        self.register_buffer("permutation", _copy(rotation.permutation))
        self.register_buffer("folded_permutation", None)
        matrices = rotation.matrices
        self.register_buffer("matrices", None if matrices is None else as_bits(matrices))

    @property
    def act_bits(self) -> int:
        return self.shared.act_bits

    # -- readers of one input

    def join(self) -> InputQuantizer:
        """The quantizer for one more linear that reads this input: this one for the first."""
        readers = self.shared.readers
        joining = self
        if readers:
            joining = InputQuantizer.__new__(InputQuantizer)
            nn.Module.__init__(joining)
            joining.in_features, joining.scheme = self.in_features, self.scheme
            joining.shared = self.shared
            for name, buffer in self._buffers.items():
                joining.register_buffer(name, _copy(buffer))
        readers.append(joining)
        return joining

    def leave(self) -> None:
        """Of a linear that is removed from the model."""
        self.shared.readers = [reader for reader in self.shared.readers if reader is not self]
        self.shared.forget()

    # -- canonical form, for checkpoints

    def rotation_order(self) -> Tensor | None:
        """The permutation of the rotation, whether it is applied here or x comes in it."""
        folded = self.folded_permutation
        return self.permutation if folded is None else folded

    def smooth_scale(self) -> Tensor | None:
        """fp32 [K] in natural channel order; None when the layer is not smoothed."""
        if self.channel_scale is None:
            return None
        scale = self.channel_scale.view(torch.float32)
        if self.scheme.rotation != "hadamard":
            return scale.clone()
        scale = scale.abs()
        if (order := self.rotation_order()) is not None:
            scale = torch.empty_like(scale).index_copy_(0, order.long(), scale)
        return None if bool((scale == 1).all()) else scale

    def rotation(self) -> Rotation:
        scheme = self.scheme
        if scheme.rotation == "none":
            return Rotation.none()
        if scheme.rotation == "dual":
            return Rotation.dual(self._floats(self.matrices), self.permutation)
        signs = torch.sign(self._floats(self.channel_scale)).to(torch.int8)
        return Rotation("hadamard", scheme.block_size, signs, self.rotation_order())

    @staticmethod
    def _floats(bits: Tensor | None) -> Tensor | None:
        return None if bits is None else bits.view(torch.float32)

    # -- forward

    def _rotation_arguments(self) -> tuple[Any, ...]:
        buffers, scheme = self._buffers, self.scheme  # attributes of a module are slow to find
        return (
            self._floats(buffers["channel_scale"]),
            buffers["permutation"],
            self._floats(buffers["matrices"]),
            scheme.rotation,
            scheme.block_size,
        )

    def is_identity(self) -> bool:
        return self.scheme.rotation == "none" and self.channel_scale is None

    def rotate(self, x: Tensor) -> Tensor:
        """x [..., K] in 16 bits, scaled and rotated; x itself when there is nothing to do."""
        if self.is_identity():
            return x
        return ops.rotate(_with_last_stride_1(x), *self._rotation_arguments())

    def _quantize_arguments(self) -> tuple[Any, ...]:
        """What rotate_quantize and its fused forms take after the tokens."""
        scheme, act_bits = self.scheme, self.shared.act_bits
        # A scale rule is fitted to its width; at another, absmax is right for any input.
        own = act_bits == scheme.act_bits
        rule = (scheme.scale_mode, scheme.scale_factor) if own else ("absmax", 1.0)
        return *self._rotation_arguments(), act_bits, *rule

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x_q int8 [..., K], x_scale fp32 [...]) of x [..., K]."""
        return ops.rotate_quantize(_with_last_stride_1(x), *self._quantize_arguments())

    def quantize_concat(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """quantize() of [first | second] along the last dimension, which is not made."""
        sources = (_with_last_stride_1(first), _with_last_stride_1(second))
        return ops.concat_rotate_quantize(*sources, *self._quantize_arguments())

    def quantize_layer_norm(
        self, x: Tensor, scale: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """quantize() of LayerNorm(x) * (1 + scale) + shift, x [B, T, K], scale and shift [B, K];
        fp32 from x to the codes."""
        return ops.norm_modulate_rotate_quantize(
            _with_last_stride_1(x),
            None,
            None,
            scale,
            shift,
            "layer",
            eps,
            *self._quantize_arguments(),
        )[:2]

    def forward(self, x: Tensor, alone: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Rotated x (act_bits 16) or its codes, computed once for all readers of the same x.

        The result is kept until every reader has had it. For inference tensors each reader computes
        its own. Under torch.compile too, and all with the buffers of the first: equal calls, which
        lrq_kernels.fusion makes one. alone: the linear's buffers are moved by themselves, so those
        of other readers may be elsewhere, or on their way.
        """
        shared = self.shared
        if torch.compiler.is_compiling():
            _fuse_what_is_compiled()
            reader = self if alone else shared.readers[0]
            return reader._prepare(x)
        # An inference tensor has no version, so a change between two reads would go unseen.
        if len(shared.readers) <= 1 or x.is_inference():
            return self._prepare(x)
        return shared.read(x, self._prepare)

    def _prepare(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.rotate(x) if self.shared.act_bits == 16 else self.quantize(x)

    def extra_repr(self) -> str:
        scheme = self.scheme
        block = "" if scheme.rotation == "none" else f", block_size={scheme.block_size}"
        return f"act_bits={self.act_bits}, rotation={scheme.rotation}{block}"


def set_act_bits(model: nn.Module, act_bits: int | None) -> None:
    """Run the quantized linears of `model` with 8 or 16 bit activations, or, with None, as their
    schemes say. The same codes serve all; linears whose scheme is A16 stay so. Raises ValueError
    for another width and for a model without quantized activations."""
    if act_bits not in (None, 8, 16):
        raise ValueError(f"set_act_bits: act_bits must be 8, 16 or None, got {act_bits!r}")
    found = _with_quantized_input(model)
    if not found:
        raise ValueError(
            f"set_act_bits: {type(model).__name__} holds no linear with quantized activations"
        )
    for quantizer in found:
        shared = quantizer.shared
        shared.act_bits = quantizer.scheme.act_bits if act_bits is None else act_bits
        shared.forget()


def get_act_bits(model: nn.Module) -> int | None:
    """What set_act_bits set: None where every linear runs as its scheme says."""
    widths = {q.act_bits for q in _with_quantized_input(model) if q.act_bits != q.scheme.act_bits}
    return max(widths, default=None)


def _with_quantized_input(model: nn.Module) -> list[InputQuantizer]:
    quantizers = (m for m in model.modules() if isinstance(m, InputQuantizer))
    return [quantizer for quantizer in quantizers if quantizer.scheme.act_bits < 16]


class LRQLinear(nn.Linear):
    """y = x @ W.T + bias with W as 2^b int8 levels per row, selected by b-bit codes.

    Buffers: packed_weight (int32, device layout of lrq::prepack), levels (int8 [N, 2^b]),
    weight_scale and bias_bits (fp32 [N] as int32), and row_order (int32 [N]): which canonical row
    each row is, None where they are in order (module row_order reorders them). x is [..., K] in
    bf16, fp16 or fp32; y has x's dtype. act_bits 8 and 4 take two launches: rotate_quantize and
    gemm. act_bits 16 rotates, then runs gemm_a16.

    It is an nn.Linear, so that PEFT and offloading take it for one: weight is a placeholder without
    values, of the dtype that the model around it has (dtype), and bias is float32. state_dict holds
    the buffers as they are, since offloading hooks look them up there by name, and the placeholder;
    checkpoints hold the canonical form instead, through to_state.
    """

    packed_weight: Tensor
    levels: Tensor
    weight_scale: Tensor
    bias_bits: Tensor | None
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
        self.scheme = scheme
        self.in_features = state.in_features
        self.out_features = state.out_features
        # Names and row counts of the linears that this one holds: one, or several when fused.
        self.parts: list[tuple[str, int]] = [(name, state.out_features)]
        # Of the weight that this linear stands for: what PEFT and others cast to.
        self.dtype = dtype
        packed = ops.prepack(state.codes, state.in_features, scheme.weight_bits)
        self.register_buffer("packed_weight", packed)
        self.register_buffer("levels", _copy(state.levels))
        self.register_buffer("weight_scale", as_bits(state.weight_scale))
        self.register_buffer("bias_bits", None if state.bias is None else as_bits(state.bias))
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
                state.in_features, state.scheme, state.smooth_scale, state.rotation
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
        """The weight in the rotated domain, [N, K]."""
        weight = ops.dequantize(
            self.packed_weight,
            self.levels,
            self.weight_scale.view(torch.float32),
            self.out_features,
            self.in_features,
            self.scheme.weight_bits,
            dtype,
        )
        return self._canonical(weight)

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        prepared = self.input_quantizer(x, alone=torch.compiler.is_compiling() and has_hooks(self))
        if self.input_quantizer.act_bits == 16:
            y = self._forward_a16(prepared.reshape(-1, self.in_features))
            return y.view(*x.shape[:-1], self.out_features)
        x_q, x_scale = prepared
        return self.from_quantized(x_q, x_scale, x.dtype)

    def from_quantized(
        self,
        x_q: Tensor,
        x_scale: Tensor,
        out_dtype: torch.dtype,
        activation: str = "none",
        residual: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """The linear of a quantized input, x_q int8 [..., K] and x_scale fp32 [...] as
        input_quantizer gives them, to [..., N]; then the activation ("gelu_tanh"), or
        residual [..., N] + gate [B, N] * y, where gate is one row for each of B equal parts of the
        tokens. fp32 from the sum to the rounding at the end. See lrq::gemm for its errors."""
        buffers, bias = self._buffers, self._buffers["bias_bits"]
        y = ops.gemm(
            x_q.view(-1, self.in_features),
            x_scale.view(-1),
            buffers["packed_weight"],
            buffers["levels"],
            buffers["weight_scale"].view(torch.float32),
            None if bias is None else bias.view(torch.float32),
            None if residual is None else residual.reshape(-1, self.out_features),
            gate,
            self.scheme.weight_bits,
            self.out_features,
            activation,
            out_dtype,
        )
        return y.view(*x_q.shape[:-1], self.out_features)

    def _forward_a16(self, rows: Tensor) -> Tensor:
        bias = self.bias_bits
        return ops.gemm_a16(
            _with_last_stride_1(rows),
            self.packed_weight,
            self.levels,
            self.weight_scale.view(torch.float32),
            None if bias is None else bias.view(torch.float32),
            self.scheme.weight_bits,
            self.out_features,
        )

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in the model's own domain, [N, K]: smoothing and rotation undone."""
        dense = self.input_quantizer.rotation().inverse(self.dequantize())
        scale = self.input_quantizer.smooth_scale()
        return (dense if scale is None else dense * scale).to(dtype or self.dtype)

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
        return LinearState(
            codes=self.codes(),
            levels=self._canonical(self.levels),
            weight_scale=self._canonical(self.weight_scale.view(torch.float32)),
            bias=self.bias,
            scheme=self.scheme,
            in_features=self.in_features,
            out_features=self.out_features,
            smooth_scale=self.input_quantizer.smooth_scale(),
            rotation=self.input_quantizer.rotation(),
        )

    def part_states(self) -> dict[str, LinearState]:
        """Canonical forms of the linears that were fused into this one, by name."""
        whole, start, states = self.to_state(), 0, {}
        for name, count in self.parts:
            rows = slice(start, start + count)
            start += count
            states[name] = dataclasses.replace(
                whole,
                codes=whole.codes[rows],
                levels=whole.levels[rows],
                weight_scale=whole.weight_scale[rows],
                bias=None if whole.bias is None else whole.bias[rows],
                out_features=count,
            )
        return states

    def extra_repr(self) -> str:
        fused = "" if len(self.parts) == 1 else f", fused={[name for name, _ in self.parts]}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme.name}, bias={self.bias is not None}{fused}"
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
    state = dataclasses.replace(
        states[0],
        codes=torch.cat([state.codes for state in states]),
        levels=torch.cat([state.levels for state in states]),
        weight_scale=torch.cat([state.weight_scale for state in states]),
        bias=torch.cat(biases) if biases else None,
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
