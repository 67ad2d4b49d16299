"""InputQuantizer: what comes before a quantized linear, and PreparedInput, what the linears that
read one tensor share of it.

Linears that read the same tensor (q, k and v; proj_mlp of a FLUX single block) share a
PreparedInput: the input is rotated and quantized once, and projected once where they have a
low-rank branch, and every sharer's GEMM reads the result.
Each linear has an InputQuantizer of its own, with buffers of its own: offloading moves the buffers
of one linear while another runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .exact_math import fits_bf16
from .linear_state import BRANCH_DTYPE, as_bits
from .rotation import Rotation
from .scheme import QuantScheme


def _fuse_what_is_compiled() -> bool:
    """Runs while torch.compile traces a quantized linear, before inductor sees the graph."""
    from . import fusion

    fusion.enable_by_default()
    return True


# As torch.compiler.assume_constant_result marks it, whose import of torch._dynamo takes a second.
_fuse_what_is_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def as_they_are(device: torch.device) -> AbstractContextManager:
    """Inside, products are made in the dtype of their operands, under autocast too."""
    mixed = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if mixed else nullcontext()


def own_copy(tensor: Tensor | None) -> Tensor | None:
    # Buffers own their memory: load_state_dict writes into them.
    return None if tensor is None else tensor.detach().clone(memory_format=torch.contiguous_format)


def with_last_stride_1(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class Prepared(NamedTuple):
    """What a linear reads of x [..., K]: tokens [..., K], int8 with scale fp32 [...], or rotated in
    the dtype of x with scale None; and x @ low_rank_down.T [..., R] in the dtype of x, None without
    a low-rank branch."""

    tokens: Tensor
    scale: Tensor | None
    projected: Tensor | None


class _Kept:
    """A prepared input, and of what it is."""

    __slots__ = ("reads_left", "result", "source", "version")

    def __init__(self, x: Tensor, result: Prepared, reads: int) -> None:
        self.source, self.version = weakref.ref(x), x._version
        self.result, self.reads_left = result, reads


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
        self._kept: _Kept | None = None

    def read(self, x: Tensor, prepare: Callable[[Tensor], Prepared]) -> Prepared:
        """prepare(x), computed once for as many reads of the same x as there are readers."""
        kept = self._kept  # looked at once: another thread may put what it reads there
        if kept is None or kept.version != x._version or kept.source() is not x:
            kept = self._kept = _Kept(x, prepare(x), len(self.readers))
        kept.reads_left -= 1
        if kept.reads_left <= 0:
            self.forget()
        return kept.result

    def __getstate__(self) -> dict:
        # A weak reference cannot be copied or pickled; what it caches need not be.
        return {**self.__dict__, "_kept": None}


class InputQuantizer(nn.Module):
    """Smoothing, rotation and per-token quantization of the input of one LRQLinear.

    Buffers: channel_scale (smoothing and signs in the order of lrq::rotate, [K]: bf16 as int16
    where the rotation is Hadamard and bf16 holds all of them, else fp32 as int32), permutation
    (int32 [K]), matrices (fp32 [2, 128, 128] as int32); each may be None, as may
    folded_permutation, a permutation that x comes in already (see row_order), and low_rank_down
    (bf16 [R, K] as int16), the first factor of a low-rank branch, its columns in the order in which
    x comes.
    shared: what it has in common with the quantizers of other linears that read the same input.
    """

    channel_scale: Tensor | None
    permutation: Tensor | None
    folded_permutation: Tensor | None
    matrices: Tensor | None
    low_rank_down: Tensor | None

    def __init__(
        self,
        in_features: int,
        scheme: QuantScheme,
        smooth_scale: Tensor | None,
        rotation: Rotation,
        low_rank_down: Tensor | None = None,
    ) -> None:
        super().__init__()
        rotation.validate(in_features)
        if rotation.kind != scheme.rotation:
            raise ValueError(
                f"InputQuantizer: rotation is {rotation.kind!r}, the scheme says "
                f"{scheme.rotation!r}"
            )
        if low_rank_down is not None and low_rank_down.shape[1:] != (in_features,):
            raise ValueError(
                f"InputQuantizer: low_rank_down must be [R, {in_features}], "
                f"got {list(low_rank_down.shape)}"
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
        narrow = rotation.kind == "hadamard" and scale is not None and fits_bf16(scale)
        kept = torch.bfloat16 if narrow else torch.float32
        self.register_buffer("channel_scale", None if scale is None else as_bits(scale, kept))
        self.register_buffer("permutation", own_copy(rotation.permutation))
        self.register_buffer("folded_permutation", None)
        matrices = rotation.matrices
        self.register_buffer("matrices", None if matrices is None else as_bits(matrices))
        down = low_rank_down
        self.register_buffer("low_rank_down", None if down is None else as_bits(down, BRANCH_DTYPE))

    @property
    def act_bits(self) -> int:
        return self.shared.act_bits

    @property
    def low_rank(self) -> int:
        """R of the low-rank branch of the linears that read this input, 0 without one."""
        return 0 if self.low_rank_down is None else self.low_rank_down.shape[0]

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:  # type: ignore[no-untyped-def]
        # Of either type, and copy_ would turn the bits of one into numbers of the other.
        name, errors = prefix + "channel_scale", rest[-1]
        given, own = state_dict.get(name), self.channel_scale
        if given is not None and own is not None and given.dtype != own.dtype:
            if given.dtype not in (torch.int16, torch.int32):
                errors.append(f"{name} must be torch.int16 or torch.int32, got {given.dtype}")
                return
            self.channel_scale = own.to(given.dtype)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def rotates_in_triton(self) -> bool:
        """Whether the channel scale is one that the CUDA kernel of the rotation does not take."""
        scale, rotates = self.channel_scale, self.scheme.rotation == "hadamard"
        return rotates and scale is not None and scale.dtype != torch.int16

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
                joining.register_buffer(name, own_copy(buffer))
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
        scale = self._floats(self.channel_scale).float()
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

    def low_rank_factor(self) -> Tensor | None:
        """bf16 [R, K] in natural channel order: a view of low_rank_down unless x comes permuted."""
        if self.low_rank_down is None:
            return None
        down, order = self.low_rank_down.view(BRANCH_DTYPE), self.folded_permutation
        return down if order is None else down[:, order.long().argsort()]

    @staticmethod
    def _floats(bits: Any) -> Any:
        """What as_bits was given, in the type that it was kept in; None of None."""
        if bits is None:
            return None
        return bits.view(torch.bfloat16 if bits.dtype == torch.int16 else torch.float32)

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

    def project(self, x: Tensor) -> Tensor | None:
        """x @ low_rank_down.T for x [..., K], to [..., R] in the dtype of x: the factor is rounded
        to it, exactly but in fp16, and so is the result; None without a low-rank branch."""
        down = self._buffers["low_rank_down"]
        if down is None:
            return None
        with as_they_are(x.device):
            return F.linear(x, down.view(BRANCH_DTYPE).to(x.dtype))

    def is_identity(self) -> bool:
        return self.scheme.rotation == "none" and self.channel_scale is None

    def rotate(self, x: Tensor) -> Tensor:
        """x [..., K] in 16 bits, scaled and rotated; x itself when there is nothing to do."""
        if self.is_identity():
            return x
        return ops.rotate(with_last_stride_1(x), *self._rotation_arguments())

    def _quantize_arguments(self) -> tuple[Any, ...]:
        """What rotate_quantize and its fused forms take after the tokens."""
        scheme, act_bits = self.scheme, self.shared.act_bits
        # A scale rule is fitted to its width; at another, absmax is right for any input.
        own = act_bits == scheme.act_bits
        rule = (scheme.scale_mode, scheme.scale_factor) if own else ("absmax", 1.0)
        return *self._rotation_arguments(), act_bits, *rule

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x_q int8 [..., K], x_scale fp32 [...]) of x [..., K]."""
        return ops.rotate_quantize(with_last_stride_1(x), *self._quantize_arguments())

    def quantize_concat(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """quantize() of [first | second] along the last dimension, which is not made."""
        sources = (with_last_stride_1(first), with_last_stride_1(second))
        return ops.concat_rotate_quantize(*sources, *self._quantize_arguments())

    def quantize_layer_norm(
        self, x: Tensor, scale: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """quantize() of LayerNorm(x) * (1 + scale) + shift as torch makes it in x's dtype,
        x [B, T, K], scale and shift [B, K]."""
        return ops.norm_modulate_rotate_quantize(
            with_last_stride_1(x),
            None,
            None,
            scale,
            shift,
            "layer",
            eps,
            *self._quantize_arguments(),
        )[:2]

    def forward(self, x: Tensor, alone: bool = False) -> Prepared:
        """x rotated (act_bits 16) or its codes, and x projected, computed once for all readers of
        the same x.

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

    def _prepare(self, x: Tensor) -> Prepared:
        projected = self.project(x)
        if self.shared.act_bits == 16:
            return Prepared(self.rotate(x), None, projected)
        return Prepared(*self.quantize(x), projected)

    def extra_repr(self) -> str:
        scheme = self.scheme
        block = "" if scheme.rotation == "none" else f", block_size={scheme.block_size}"
        branch = f", low_rank={self.low_rank}" if self.low_rank else ""
        return f"act_bits={self.act_bits}, rotation={scheme.rotation}{block}{branch}"


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
