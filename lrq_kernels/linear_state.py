"""One quantized linear in canonical form: LinearState, and FIELDS, the tensors that store it.

This half of the format says what a linear is; checkpoint.py, the other half, how a file holds a
model of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .codebook import TwinLogCodebook
from .packing import packed_words
from .rotation import Rotation
from .scheme import DUAL_BLOCK_SIZE, ROTATIONS, QuantScheme


class CheckpointError(ValueError):
    """The file is not an intact lrq checkpoint, or not one of this model."""


class Field(NamedTuple):
    """dtype: as stored. shape: of (N, K, bits). required: by the scheme. float_bits: an int32 view
    of float32. per_input: belongs to the shared input, stored under its first linear."""

    dtype: torch.dtype
    shape: Callable[[int, int, int], tuple[int, ...]]
    shape_text: str
    required: str
    float_bits: bool
    per_input: bool
    meaning: str


FIELDS: dict[str, Field] = {
    "codes": Field(
        torch.int32,
        lambda n, k, b: (n, packed_words(k, b)),
        "[N, ceil(K/32)*b]",
        "always",
        False,
        False,
        "b-bit codes, a little-endian bit stream along K",
    ),
    "levels": Field(
        torch.int8,
        lambda n, k, b: (n, 1 << b),
        "[N, 2^b]",
        "always",
        False,
        False,
        "int8 level of each code, per output row",
    ),
    "weight_scale": Field(
        torch.int32,
        lambda n, k, b: (n,),
        "[N]",
        "always",
        True,
        False,
        "float32 scale of each output row",
    ),
    "bias": Field(
        torch.int32, lambda n, k, b: (n,), "[N]", "optional", True, False, "float32 bias"
    ),
    "smooth_scale": Field(
        torch.int32,
        lambda n, k, b: (k,),
        "[K]",
        "optional",
        True,
        True,
        "float32 factor on each input channel; the weight was divided by it",
    ),
    "signs": Field(
        torch.int8,
        lambda n, k, b: (k,),
        "[K]",
        "hadamard",
        False,
        True,
        "+1 or -1 on each channel before the Hadamard transform",
    ),
    "permutation": Field(
        torch.int32,
        lambda n, k, b: (k,),
        "[K]",
        "optional",
        False,
        True,
        "input channel at each position",
    ),
    "rotation_matrices": Field(
        torch.int32,
        lambda n, k, b: (2, DUAL_BLOCK_SIZE, DUAL_BLOCK_SIZE),
        "[2, 128, 128]",
        "dual",
        True,
        True,
        "float32 orthogonal pair around the permutation",
    ),
}


@dataclass(frozen=True)
class LinearState:
    """One quantized linear in canonical form.

    codes int32 [N, ceil(K/32)*b], levels int8 [N, 2^b], weight_scale fp32 [N], bias fp32 [N],
    smooth_scale fp32 [K], rotation of K channels. shared_input names the linear under which the
    smoothing and rotation of this one are stored; None: under itself.
    """

    codes: Tensor
    levels: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    scheme: QuantScheme
    in_features: int
    out_features: int
    smooth_scale: Tensor | None = None
    rotation: Rotation = field(default_factory=Rotation.none)
    shared_input: str | None = None

    def to(self, device: torch.device | str) -> LinearState:
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return dataclasses.replace(
            self,
            codes=self.codes.to(device),
            levels=self.levels.to(device),
            weight_scale=self.weight_scale.to(device),
            bias=move(self.bias),
            smooth_scale=move(self.smooth_scale),
            rotation=self.rotation.to(device),
        )


def fields_table() -> str:
    """FIELDS as a Markdown table; the README carries it."""
    lines = ["| field | stored as | shape | present | meaning |", "|---|---|---|---|---|"]
    for name, spec in FIELDS.items():
        stored = str(spec.dtype).removeprefix("torch.")
        if spec.float_bits:
            stored += " view of float32"
        present = spec.required
        if present in ROTATIONS:
            present = f"rotation {present}"
        if spec.per_input:
            present += ", once per input"
        lines.append(f"| `{name}` | {stored} | {spec.shape_text} | {present} | {spec.meaning} |")
    return "\n".join(lines)


def state_tensors(state: LinearState, *, with_input: bool) -> dict[str, Tensor]:
    """Field name -> stored tensor. with_input False leaves out what a shared input stores once."""
    rotation = state.rotation
    values: dict[str, Tensor | None] = {
        "codes": state.codes,
        "levels": state.levels,
        "weight_scale": state.weight_scale,
        "bias": state.bias,
        "smooth_scale": state.smooth_scale,
        "signs": rotation.signs,
        "permutation": rotation.permutation,
        "rotation_matrices": rotation.matrices,
    }
    tensors = {}
    for name, value in values.items():
        spec = FIELDS[name]
        if value is None or (spec.per_input and not with_input):
            continue
        if spec.float_bits:
            value = value.detach().to(torch.float32).contiguous().view(torch.int32)
        tensors[name] = value.contiguous()
    return tensors


def state_from_tensors(
    tensors: Mapping[str, Tensor],
    scheme: QuantScheme,
    out_features: int,
    in_features: int,
    where: str,
    shared_input: str | None = None,
) -> LinearState:
    """Inverse of state_tensors. Raises CheckpointError, naming `where`.field, unless every tensor
    has the dtype, shape and values that FIELDS and the scheme ask for."""
    for name in tensors:
        if name not in FIELDS:
            raise CheckpointError(f"{where}.{name} is not a field of the format: {list(FIELDS)}")
    values: dict[str, Tensor | None] = {}
    for name, spec in FIELDS.items():
        tensor = tensors.get(name)
        if tensor is None:
            if spec.required in ("always", scheme.rotation):
                raise CheckpointError(f"{where}.{name} is missing")
            values[name] = None
            continue
        shape = spec.shape(out_features, in_features, scheme.weight_bits)
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{where}.{name} must be {spec.dtype} {list(shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        values[name] = tensor.view(torch.float32) if spec.float_bits else tensor
    rotation = Rotation(
        scheme.rotation,
        scheme.block_size,
        values["signs"],
        values["permutation"],
        values["rotation_matrices"],
    )
    smooth, bias = values["smooth_scale"], values["bias"]
    try:
        rotation.validate(in_features)
        TwinLogCodebook(values["levels"], values["weight_scale"])
        if smooth is not None and not bool(((smooth > 0) & torch.isfinite(smooth)).all()):
            raise ValueError("smooth_scale must be positive and finite")
        if bias is not None and not bool(torch.isfinite(bias).all()):
            raise ValueError("bias must be finite")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    return LinearState(
        codes=values["codes"],
        levels=values["levels"],
        weight_scale=values["weight_scale"],
        bias=bias,
        scheme=scheme,
        in_features=in_features,
        out_features=out_features,
        smooth_scale=smooth,
        rotation=rotation,
        shared_input=shared_input,
    )


def stored_bits(state: LinearState) -> dict[str, int]:
    """Bits that each field of this linear takes in the file; a shared input counts at its owner."""
    with_input = state.shared_input is None
    tensors = state_tensors(state, with_input=with_input)
    return {name: tensor.numel() * tensor.element_size() * 8 for name, tensor in tensors.items()}
