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


class Sizes(NamedTuple):
    """[n, k] weights of so many bits; rank of the low-rank branch, 0 without one; shared_tables:
    the tables of levels that rows share, 0 where each has its own."""

    n: int
    k: int
    bits: int
    rank: int = 0
    shared_tables: int = 0


class Field(NamedTuple):
    """dtype: as stored. shape: of Sizes. required: "always", "optional", by a rotation, by a branch
    (LOW_RANK) or by tables of levels that rows share (SHARED_TABLES). float_dtype: of the floats
    that the integers are a view of. per_input: belongs to the shared input, stored under its first
    linear. since: the format version that has it."""

    dtype: torch.dtype
    shape: Callable[[Sizes], tuple[int, ...]]
    shape_text: str
    required: str
    float_dtype: torch.dtype | None
    per_input: bool
    meaning: str
    since: int = 1


# Of both factors of a low-rank branch.
BRANCH_DTYPE = torch.bfloat16
# Required, and allowed, where the description of a linear says low_rank, or tables.
LOW_RANK = "low-rank"
SHARED_TABLES = "shared tables"


FIELDS: dict[str, Field] = {
    "codes": Field(
        torch.int32,
        lambda s: (s.n, packed_words(s.k, s.bits)),
        "[N, ceil(K/32)*b]",
        "always",
        None,
        False,
        "b-bit codes, a little-endian bit stream along K",
    ),
    "levels": Field(
        torch.int8,
        lambda s: (s.shared_tables or s.n, 1 << s.bits),
        "[N, 2^b]; [T, 2^b] with table_of_row",
        "always",
        None,
        False,
        "int8 level of each code, per output row or in T <= 256 tables that rows share",
    ),
    "table_of_row": Field(
        torch.uint8,
        lambda s: (s.n,),
        "[N]",
        SHARED_TABLES,
        None,
        False,
        "the table of levels that each output row has",
        since=3,
    ),
    "weight_scale": Field(
        torch.int32,
        lambda s: (s.n,),
        "[N]",
        "always",
        torch.float32,
        False,
        "float32 scale of each output row",
    ),
    "bias": Field(
        torch.int32,
        lambda s: (s.n,),
        "[N]",
        "optional",
        torch.float32,
        False,
        "float32 bias",
    ),
    "smooth_scale": Field(
        torch.int32,
        lambda s: (s.k,),
        "[K]",
        "optional",
        torch.float32,
        True,
        "float32 factor on each input channel, one that bf16 holds by calibration; the weight "
        "was divided by it",
    ),
    "signs": Field(
        torch.int8,
        lambda s: (s.k,),
        "[K]",
        "hadamard",
        None,
        True,
        "+1 or -1 on each channel before the Hadamard transform",
    ),
    "permutation": Field(
        torch.int32,
        lambda s: (s.k,),
        "[K]",
        "optional",
        None,
        True,
        "input channel at each position",
    ),
    "rotation_matrices": Field(
        torch.int32,
        lambda s: (2, DUAL_BLOCK_SIZE, DUAL_BLOCK_SIZE),
        "[2, 128, 128]",
        "dual",
        torch.float32,
        True,
        "float32 orthogonal pair around the permutation",
    ),
    "low_rank_down": Field(
        torch.int16,
        lambda s: (s.rank, s.k),
        "[R, K]",
        LOW_RANK,
        BRANCH_DTYPE,
        True,
        "bfloat16 first factor of the low-rank branch: of the input before smoothing and rotation",
        since=2,
    ),
    "low_rank_up": Field(
        torch.int16,
        lambda s: (s.n, s.rank),
        "[N, R]",
        LOW_RANK,
        BRANCH_DTYPE,
        False,
        "bfloat16 second factor of the low-rank branch, per output row",
        since=2,
    ),
}


@dataclass(frozen=True)
class LinearState:
    """One quantized linear in canonical form.

    codes int32 [N, ceil(K/32)*b], levels int8 [N, 2^b], weight_scale fp32 [N], bias fp32 [N],
    smooth_scale fp32 [K], rotation of K channels. table_of_row uint8 [N]: levels are [T, 2^b], and
    this is the table of each row. shared_input names the linear under which the smoothing and
    rotation of this one are stored; None: under itself. low_rank_down bf16 [R, K], shared with the
    input as they are, and low_rank_up bf16 [N, R]: a branch beside the codes,

        y = quantized part + (x @ low_rank_down.T) @ low_rank_up.T

    of x as it comes, before smoothing and rotation.
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
    low_rank_down: Tensor | None = None
    low_rank_up: Tensor | None = None
    table_of_row: Tensor | None = None

    def codebook(self) -> TwinLogCodebook:
        """Levels and scales of the output rows. Raises what TwinLogCodebook raises."""
        return TwinLogCodebook(self.levels, self.weight_scale, self.table_of_row)

    @property
    def shared_tables(self) -> int:
        """Tables of levels that rows share, 0 where each has its own."""
        return 0 if self.table_of_row is None else self.levels.shape[0]

    @property
    def low_rank(self) -> int:
        """R of the low-rank branch, 0 without one."""
        if self.low_rank_down is not None:
            return self.low_rank_down.shape[0]
        return 0 if self.low_rank_up is None else self.low_rank_up.shape[-1]

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
            low_rank_down=move(self.low_rank_down),
            low_rank_up=move(self.low_rank_up),
            table_of_row=move(self.table_of_row),
        )


def as_bits(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy in `dtype`, float32 or bfloat16, seen as integers of its size: the form in which
    floats are kept, so that no cast of a model touches them."""
    copy = tensor.detach().to(dtype).clone(memory_format=torch.contiguous_format)
    return copy.view({torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype])


def fields_table() -> str:
    """FIELDS as a Markdown table; the README carries it."""
    lines = ["| field | stored as | shape | present | meaning |", "|---|---|---|---|---|"]
    for name, spec in FIELDS.items():
        stored = str(spec.dtype).removeprefix("torch.")
        if spec.float_dtype is not None:
            stored += f" view of {str(spec.float_dtype).removeprefix('torch.')}"
        present = spec.required
        if present in ROTATIONS:
            present = f"rotation {present}"
        elif present == LOW_RANK:
            present += " branch"
        if spec.since > 1:
            present += f" (version {spec.since})"
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
        "table_of_row": state.table_of_row,
        "weight_scale": state.weight_scale,
        "bias": state.bias,
        "smooth_scale": state.smooth_scale,
        "signs": rotation.signs,
        "permutation": rotation.permutation,
        "rotation_matrices": rotation.matrices,
        "low_rank_down": state.low_rank_down,
        "low_rank_up": state.low_rank_up,
    }
    tensors = {}
    for name, value in values.items():
        spec = FIELDS[name]
        if value is None or (spec.per_input and not with_input):
            continue
        if spec.float_dtype is not None:
            value = value.detach().to(spec.float_dtype).contiguous().view(spec.dtype)
        tensors[name] = value.contiguous()
    return tensors


def state_from_tensors(
    tensors: Mapping[str, Tensor],
    scheme: QuantScheme,
    sizes: Sizes,
    where: str,
    shared_input: str | None = None,
) -> LinearState:
    """Inverse of state_tensors. Raises CheckpointError, naming `where`.field, unless every tensor
    has the dtype, shape and values that FIELDS, the scheme and the sizes ask for."""
    for name in tensors:
        if name not in FIELDS:
            raise CheckpointError(f"{where}.{name} is not a field of the format: {list(FIELDS)}")
    values: dict[str, Tensor | None] = {}
    described = {
        LOW_RANK: ("low_rank", sizes.rank),
        SHARED_TABLES: ("shared_tables", sizes.shared_tables),
    }
    needed = ["always", scheme.rotation, *(kind for kind, (_, n) in described.items() if n)]
    for name, spec in FIELDS.items():
        tensor = tensors.get(name)
        if tensor is None:
            if spec.required in needed:
                raise CheckpointError(f"{where}.{name} is missing")
            values[name] = None
            continue
        key, count = described.get(spec.required, ("", 1))
        if not count:
            raise CheckpointError(f"{where}.{name} is there, and the linear has no {key}")
        shape = spec.shape(sizes)
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{where}.{name} must be {spec.dtype} {list(shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        values[name] = tensor if spec.float_dtype is None else tensor.view(spec.float_dtype)
    rotation = Rotation(
        scheme.rotation,
        scheme.block_size,
        values["signs"],
        values["permutation"],
        values["rotation_matrices"],
    )
    smooth = values["smooth_scale"]
    try:
        rotation.validate(sizes.k)
        TwinLogCodebook(values["levels"], values["weight_scale"], values["table_of_row"])
        if smooth is not None and not bool(((smooth > 0) & torch.isfinite(smooth)).all()):
            raise ValueError("smooth_scale must be positive and finite")
        for name in ("bias", "low_rank_down", "low_rank_up"):
            value = values[name]
            if value is not None and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} must be finite")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    return LinearState(
        codes=values["codes"],
        levels=values["levels"],
        weight_scale=values["weight_scale"],
        bias=values["bias"],
        scheme=scheme,
        in_features=sizes.k,
        out_features=sizes.n,
        smooth_scale=smooth,
        rotation=rotation,
        shared_input=shared_input,
        low_rank_down=values["low_rank_down"],
        low_rank_up=values["low_rank_up"],
        table_of_row=values["table_of_row"],
    )


def stored_bits(state: LinearState) -> dict[str, int]:
    """Bits that each field of this linear takes in the file; a shared input counts at its owner."""
    with_input = state.shared_input is None
    tensors = state_tensors(state, with_input=with_input)
    return {name: tensor.numel() * tensor.element_size() * 8 for name, tensor in tensors.items()}
