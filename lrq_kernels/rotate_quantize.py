"""Launchers of the Triton kernels of lrq::rotate_quantize, its fused forms and lrq::rotate.

    y = x, [first | second], act(x), act(gate) * x, or norm(x) * w + b, modulated
    v = rotation(y[permutation] * channel_scale)          fp32, one token at a time
    x_scale = step of the token,  x_q = rint(v / x_scale)

A token stays in the registers of one program from load to store, so x is read once.

The "dual" rotation needs whole-row permutation between two dense products. Where shared memory
holds both matrices and a token between them (Hopper, K up to 16384) it is one launch; elsewhere
each product is one, and quantizing another, with fp32 intermediates that stay in the L2 cache. A
fused form in front costs one launch more, which writes y: the products see many tokens at a time.
One launch more is also what keeping y costs where it is permuted.

Imported by activation_path.py on the first CUDA call, never on import of the package. Arguments are
validated by ops.py; the functions here trust them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .dual_kernels import block_dense_kernel, dual_kernel
from .rotate_kernels import activation_kernel, norm_kernel, row_kernel
from .scheme import activation_qmax
from .token_tiles import chunk_size

# Width of the dense factors of "dual".
_WIDTH = 128
# Blocks of 128 that one program of the dense kernel multiplies, and its warps: 4 of them spill.
_DENSE_ROWS = 64
_DENSE_WARPS = 8
# The same of dual_kernel, which takes whole tokens.
_DUAL_ROWS = 128
# Elements of an fp32 intermediate, 16 MiB: two or three of them fit the 50 MB L2 of an H200.
_PART_ELEMENTS = 1 << 22
# Values of a token that a thread holds at most: with 96, 128 registers and 16 warps an SM.
_MAX_VALUES = 96
# The same where a norm gathers its vectors too, by indices that it holds beside them.
MAX_GATHERED_VALUES = 64

# Else the compiler makes one operation of a product and a sum in 16 bits, without the rounding
# between them.
NORM_OPTIONS: dict[str, object] = {"enable_fp_fusion": False}

# ---- launchers ----------------------------------------------------------------------------------


class RowLaunch(NamedTuple):
    """How a kernel holds a token: `values` of it in each of 32 * num_warps threads."""

    num_warps: int
    values: int
    maxnreg: int | None = None  # registers a thread at most; None: what the compiler wants


def _instructions(values: int) -> float:
    """Of rotating one thread's values, counted in sm_90 code: in a smaller chunk more butterflies
    go between lanes, and those take two instructions a value instead of one."""
    total, start = 0.0, 0
    while start < values:
        size = chunk_size(start, values)
        total += size * (28.5 - 2 * size.bit_length())
        start += size
    return total


def values_a_thread(in_features: int, block_size: int, num_warps: int) -> int:
    """How many values a thread holds: the number that costs least of those that cover a token,
    since it is either padding or more butterflies between lanes."""
    granule = max(4, block_size // 32)
    least = triton.cdiv(in_features, 32 * num_warps)
    enough = range(triton.cdiv(least, granule) * granule, triton.cdiv(least, 32) * 32 + 1, granule)
    return min(enough, key=_instructions)


@functools.cache
def row_launch(in_features: int, block_size: int, max_values: int = _MAX_VALUES) -> RowLaunch:
    """Launch of a token of in_features: as few warps as hold it, since their barriers cost time."""
    for num_warps in (1, 2, 4, 8):
        values = values_a_thread(in_features, block_size, num_warps)
        if values <= max_values:
            return RowLaunch(num_warps, values)
    return RowLaunch(16, values_a_thread(in_features, block_size, 16))


class _Step(NamedTuple):
    """The rule for x_scale."""

    qmax: int
    rms: bool
    scale_factor: float

    @staticmethod
    def of(act_bits: int, scale_mode: str, scale_factor: float) -> _Step:
        return _Step(activation_qmax(act_bits), scale_mode == "rms", scale_factor)

    @property
    def clamps(self) -> bool:
        """Whether codes may reach past qmax."""
        return self.rms or self.scale_factor < 1.0

    @property
    def factor(self) -> float:
        return self.scale_factor if self.rms else self.scale_factor / self.qmax


_NO_STEP = _Step(1, False, 1.0)


class _Rotation(NamedTuple):
    """What follows y; block_size 1: no Hadamard transform."""

    channel_scale: Tensor | None
    permutation: Tensor | None
    matrices: Tensor | None
    block_size: int

    @staticmethod
    def of(
        channel_scale: Tensor | None,
        permutation: Tensor | None,
        matrices: Tensor | None,
        rotation: str,
        block_size: int,
    ) -> _Rotation:
        block = block_size if rotation == "hadamard" else 1
        return _Rotation(channel_scale, permutation, matrices, block)


class _Tokens(NamedTuple):
    """A kernel with its arguments up to channel_scale: something that makes y [num_tokens, K]."""

    kernel: Any
    arguments: tuple
    constants: dict[str, object]
    num_tokens: int
    in_features: int
    options: dict[str, object] = {}  # of the compiler


def _plain(x: Tensor) -> _Tokens:
    tokens, k = x.shape
    return _Tokens(row_kernel, (x, x.stride(0), None, 0), {"SPLIT": k}, tokens, k)


def _concatenated(first: Tensor, second: Tensor) -> _Tokens:
    arguments = (first, first.stride(0), second, second.stride(0))
    split, k = first.shape[1], first.shape[1] + second.shape[1]
    return _Tokens(row_kernel, arguments, {"SPLIT": split}, first.shape[0], k)


def _activated(x: Tensor, gate: Tensor | None, activation: str, kept: Tensor | None) -> _Tokens:
    gate_stride = 0 if gate is None else gate.stride(0)
    arguments = (x, x.stride(0), gate, gate_stride, kept)
    return _Tokens(activation_kernel, arguments, {"ACTIVATION": activation}, *x.shape)


class _Norm(NamedTuple):
    """The arguments of a norm with modulation that are the same for all tokens of x [B, T, K]."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    norm: str
    eps: float

    def sample(self, index: int) -> _Norm:
        one = slice(index, index + 1)
        scale = None if self.scale is None else self.scale[one]
        shift = None if self.shift is None else self.shift[one]
        return self._replace(scale=scale, shift=shift)

    def of(self, x: Tensor, kept: Tensor | None) -> _Tokens:
        """kept: [B * T, padded_row(K)], contiguous."""
        samples, tokens, k = x.shape
        arguments = (
            *(x, x.stride(0), x.stride(1), tokens, self.norm_weight, self.norm_bias),
            *(self.scale, 0 if self.scale is None else self.scale.stride(0)),
            *(self.shift, 0 if self.shift is None else self.shift.stride(0)),
            *(self.eps, kept),
        )
        constants: dict[str, object] = {"LAYER_NORM": self.norm == "layer"}
        return _Tokens(norm_kernel, arguments, constants, samples * tokens, k, NORM_OPTIONS)


def _padded_rows(out: Tensor) -> Tensor:
    """out [M, K], or memory for rows as the kernels want them: of a multiple of eight."""
    tokens, in_features = out.shape
    padding = -in_features % 8
    return out.new_empty(tokens, in_features + padding) if padding else out


def _copy_padded(rows: Tensor, out: Tensor) -> None:
    if rows.shape != out.shape:
        out.copy_(rows[:, : out.shape[1]])


def _launch_rows(
    tokens: _Tokens, rotation: _Rotation, out: Tensor, x_scale: Tensor | None, step: _Step
) -> None:
    """Run the kernel of `tokens`, without the matrices of `rotation`; out [num_tokens, K]."""
    gathers = tokens.kernel is norm_kernel and rotation.permutation is not None
    most = MAX_GATHERED_VALUES if gathers else _MAX_VALUES
    launch = row_launch(tokens.in_features, rotation.block_size, most)
    options = dict(tokens.options)
    if launch.maxnreg is not None:
        options["maxnreg"] = launch.maxnreg
    rows = _padded_rows(out)
    tokens.kernel[(tokens.num_tokens,)](
        *tokens.arguments,
        rotation.channel_scale,
        rotation.permutation,
        rows,
        x_scale,
        step.factor,
        **tokens.constants,
        K=tokens.in_features,
        N=32 * launch.num_warps,
        VALUES=launch.values,
        BLOCK=rotation.block_size,
        QMAX=step.qmax,
        RMS=step.rms,
        CLAMP=step.clamps,
        num_warps=launch.num_warps,
        **options,
    )
    _copy_padded(rows, out)


def _launch_dense(
    x: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrix: Tensor,
    out: Tensor,
) -> None:
    """Run `block_dense_kernel`: x [M, K] -> out [M, K]."""
    tokens, in_features = x.shape
    num_rows = tokens * in_features // _WIDTH
    block_dense_kernel[(triton.cdiv(num_rows, _DENSE_ROWS),)](
        x,
        x.stride(0),
        channel_scale,
        permutation,
        matrix,
        out,
        num_rows,
        K=in_features,
        ROWS=_DENSE_ROWS,
        num_warps=_DENSE_WARPS,
    )


@functools.cache
def _dual_programs(device: torch.device) -> int:
    """Programs of dual_kernel that run at once; 0 where it does not run: on Hopper alone it was
    compiled to something sound and has the 192 KB of shared memory that it takes."""
    if device.type != "cuda":
        return 2  # in Triton's interpreter
    if torch.cuda.get_device_capability(device)[0] != 9:
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def _in_one_launch(rotation: _Rotation, in_features: int, device: torch.device) -> bool:
    """Whether dual_kernel takes tokens of in_features."""
    fits = rotation.matrices is not None and in_features <= _WIDTH * _DUAL_ROWS
    return fits and _dual_programs(device) > 0


def _launch_whole_dual(
    y: Tensor, rotation: _Rotation, out: Tensor, x_scale: Tensor | None, step: _Step
) -> None:
    """Run `dual_kernel`: y [M, K] -> out int8 [M, K] and x_scale [M], or out of y's kind alone."""
    num_tokens, in_features = y.shape
    tokens = _DUAL_ROWS * _WIDTH // in_features
    programs = min(_dual_programs(y.device), triton.cdiv(num_tokens, tokens))
    dual_kernel[(programs,)](
        y,
        y.stride(0),
        rotation.channel_scale,
        rotation.permutation,
        rotation.matrices,
        out if x_scale is None else out.view(torch.int32),
        x_scale,
        step.factor,
        num_tokens,
        K=in_features,
        TOKENS=tokens,
        SLOTS=triton.next_power_of_2(tokens),
        ROWS=_DUAL_ROWS,
        QMAX=step.qmax,
        RMS=step.rms,
        CLAMP=step.clamps,
        num_warps=_DENSE_WARPS,
    )


_UNROTATED = _Rotation(None, None, None, 1)


def _parts(tokens: int, in_features: int) -> Iterator[slice]:
    """Pieces of M whose fp32 intermediates fit the L2 cache."""
    size = max(1, _PART_ELEMENTS // in_features)
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def _parts_of(x: Tensor, rotation: _Rotation) -> Iterator[tuple[slice, Tensor]]:
    """(slice, rows) of x [M, K]: all at once where that needs no intermediate."""
    whole = _in_one_launch(rotation, x.shape[1], x.device)
    return ((part, x[part]) for part in ([slice(None)] if whole else _parts(*x.shape)))


def _computed(tokens: _Tokens, device: torch.device) -> Tensor:
    """y in fp32; of a norm in the type of x, to which it is rounded."""
    rounded = tokens.kernel is norm_kernel
    dtype = tokens.arguments[0].dtype if rounded else torch.float32
    y = torch.empty((tokens.num_tokens, tokens.in_features), dtype=dtype, device=device)
    _launch_rows(tokens, _UNROTATED, y, None, _NO_STEP)
    return y


def _launch_dual(
    y: Tensor, rotation: _Rotation, out: Tensor, x_scale: Tensor | None, step: _Step
) -> None:
    """out = ((y * channel_scale) @ R1)[permutation] @ R2, quantized where there is x_scale."""
    if _in_one_launch(rotation, y.shape[1], y.device):
        _launch_whole_dual(y, rotation, out, x_scale, step)
        return
    matrices = rotation.matrices
    if matrices is None:
        raise RuntimeError("_launch_dual: rotation must have matrices, got none")
    first = torch.empty(y.shape, dtype=torch.float32, device=y.device)
    _launch_dense(y, rotation.channel_scale, None, matrices[0], first)
    if x_scale is None:
        _launch_dense(first, None, rotation.permutation, matrices[1], out)
    else:
        second = torch.empty_like(first)
        _launch_dense(first, None, rotation.permutation, matrices[1], second)
        _launch_rows(_plain(second), _UNROTATED, out, x_scale, step)


def _run(
    whole: _Tokens,
    parts: Iterable[tuple[slice, Tensor | _Tokens]],
    rotation: _Rotation,
    out: Tensor,
    x_scale: Tensor | None,
    step: _Step,
    kept: Tensor | None = None,
) -> None:
    """Rotate and quantize all tokens, in one launch or in several for each part of them.

    whole: all tokens; parts: the same tokens, each part a tensor y [rows, K] or what makes one.
    """
    matrices, permutation = rotation.matrices, rotation.permutation
    with torch.cuda.device_of(out):
        if matrices is None and (kept is None or permutation is None):
            _launch_rows(whole, rotation, out, x_scale, step)
            return
        for part, y in parts:
            y = _computed(y, out.device) if isinstance(y, _Tokens) else y
            x_scale_part = None if x_scale is None else x_scale[part]
            if matrices is None:
                _launch_rows(_plain(y), rotation, out[part], x_scale_part, step)
            else:
                _launch_dual(y, rotation, out[part], x_scale_part, step)


def _outputs(shape: torch.Size | tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """x_q and x_scale of tokens [..., K], to be written; x_scale holds zeros where K is 0."""
    x_q = torch.empty(shape, dtype=torch.int8, device=device)
    make = torch.empty if x_q.numel() else torch.zeros
    return x_q, make(shape[:-1], dtype=torch.float32, device=device)


def _kept(x: Tensor, keep: bool) -> Tensor:
    return torch.empty(x.shape if keep else (0,), dtype=x.dtype, device=x.device)


def rotate_quantize(
    x: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
    act_bits: int,
    scale_mode: str,
    scale_factor: float,
) -> tuple[Tensor, Tensor]:
    """lrq::rotate_quantize on a GPU: (x_q int8 [..., K], x_scale fp32 [...]); see reference.py."""
    x_q, x_scale = _outputs(x.shape, x.device)
    if x_q.numel() == 0:
        return x_q, x_scale
    k = x.shape[-1]
    rows, out, scale = x.reshape(-1, k), x_q.view(-1, k), x_scale.view(-1)
    after = _Rotation.of(channel_scale, permutation, matrices, rotation, block_size)
    _run(
        _plain(rows),
        _parts_of(rows, after),
        after,
        out,
        scale,
        _Step.of(act_bits, scale_mode, scale_factor),
    )
    return x_q, x_scale


def rotate(
    x: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
) -> Tensor:
    """lrq::rotate on a GPU: the rotated x [..., K] in x's dtype; see reference.py."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    k = x.shape[-1]
    rows, out = x.reshape(-1, k), y.view(-1, k)
    after = _Rotation.of(channel_scale, permutation, matrices, rotation, block_size)
    _run(_plain(rows), _parts_of(rows, after), after, out, None, _NO_STEP)
    return y


def concat_rotate_quantize(
    first: Tensor,
    second: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
    act_bits: int,
    scale_mode: str,
    scale_factor: float,
) -> tuple[Tensor, Tensor]:
    """lrq::concat_rotate_quantize on a GPU; see reference.py."""
    k = first.shape[-1] + second.shape[-1]
    x_q, x_scale = _outputs((*first.shape[:-1], k), first.device)
    if x_q.numel() == 0:
        return x_q, x_scale
    out, scale = x_q.view(-1, k), x_scale.view(-1)
    # The number of rows is named: a source may be empty along K.
    a, b = (x.reshape(out.shape[0], x.shape[-1]) for x in (first, second))
    after = _Rotation.of(channel_scale, permutation, matrices, rotation, block_size)
    step = _Step.of(act_bits, scale_mode, scale_factor)
    parts = ((part, _concatenated(a[part], b[part])) for part in _parts(out.shape[0], k))
    _run(_concatenated(a, b), parts, after, out, scale, step)
    return x_q, x_scale


def activation_rotate_quantize(
    x: Tensor,
    gate: Tensor | None,
    activation: str,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
    act_bits: int,
    scale_mode: str,
    scale_factor: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """lrq::activation_rotate_quantize on a GPU; see reference.py."""
    x_q, x_scale = _outputs(x.shape, x.device)
    kept = _kept(x, keep)
    if x_q.numel() == 0:
        return x_q, x_scale, kept
    k = x.shape[-1]
    rows, out, scale = x.reshape(-1, k), x_q.view(-1, k), x_scale.view(-1)
    gates = None if gate is None else gate.reshape(-1, k)
    kept_rows = _padded_rows(kept.view(-1, k)) if keep else None

    def tokens(part: slice) -> _Tokens:
        gate_part = None if gates is None else gates[part]
        kept_part = None if kept_rows is None else kept_rows[part]
        return _activated(rows[part], gate_part, activation, kept_part)

    after = _Rotation.of(channel_scale, permutation, matrices, rotation, block_size)
    step = _Step.of(act_bits, scale_mode, scale_factor)
    parts = ((part, tokens(part)) for part in _parts(rows.shape[0], k))
    _run(tokens(slice(None)), parts, after, out, scale, step, kept_rows)
    if kept_rows is not None:
        _copy_padded(kept_rows, kept.view(-1, k))
    return x_q, x_scale, kept


def norm_modulate_rotate_quantize(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    eps: float,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
    act_bits: int,
    scale_mode: str,
    scale_factor: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """lrq::norm_modulate_rotate_quantize on a GPU; see reference.py."""
    x_q, x_scale = _outputs(x.shape, x.device)
    kept = _kept(x, keep)
    if x_q.numel() == 0:
        return x_q, x_scale, kept
    samples = x if x.dim() == 3 else x[None]
    num_samples, tokens, k = samples.shape
    kept_rows = _padded_rows(kept.view(-1, k)) if keep else None
    front = _Norm(norm_weight, norm_bias, scale, shift, norm, eps)

    def parts() -> Iterator[tuple[slice, Tensor | _Tokens]]:
        for index in range(num_samples):
            for part in _parts(tokens, k):
                rows = slice(index * tokens + part.start, index * tokens + part.stop)
                kept_part = None if kept_rows is None else kept_rows[rows]
                yield rows, front.sample(index).of(samples[index : index + 1, part], kept_part)

    after = _Rotation.of(channel_scale, permutation, matrices, rotation, block_size)
    step = _Step.of(act_bits, scale_mode, scale_factor)
    out, row_scale = x_q.view(-1, k), x_scale.view(-1)
    _run(front.of(samples, kept_rows), parts(), after, out, row_scale, step, kept_rows)
    if kept_rows is not None:
        _copy_padded(kept_rows, kept.view(-1, k))
    return x_q, x_scale, kept
