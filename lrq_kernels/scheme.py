"""How one linear is quantized: bits, rotation and the rule for the per-token activation scale."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

WEIGHT_BITS = (2, 3, 4)
ACT_BITS = (4, 8, 16)
ROTATIONS = ("none", "hadamard", "dual")
# 32 and 64 exist for widths that 128 does not divide (192, 2240); calibration prefers 128 and up.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024)
DUAL_BLOCK_SIZE = 128
SCALE_MODES = ("absmax", "rms")
# Schemes of linears that share an input may differ in weight bits, not in these.
INPUT_FIELDS = ("act_bits", "rotation", "block_size", "scale_mode", "scale_factor")

_NAME = re.compile(r"w(\d+)a(\d+)")


def check_weight_bits(bits: int, where: str) -> None:
    """Raise ValueError, naming `where`, unless `bits` is a weight width that the format stores."""
    if not isinstance(bits, int) or bits not in WEIGHT_BITS:
        raise ValueError(f"{where}: weight_bits must be one of {WEIGHT_BITS}, got {bits!r}")


@dataclass(frozen=True)
class QuantScheme:
    """Scheme of one linear.

    weight_bits: 2, 3 or 4; a code selects one of 2^weight_bits int8 levels of its output row.
    act_bits: 8 (int8, qmax 127), 4 (int8 storage, qmax 7) or 16 (weight-only; x stays bf16/fp16).
    rotation: "none", "hadamard" (permutation, signs, block Hadamard) or "dual" (the outlier-aware
        dense pair of LRQ-DiT equation 12, with a permutation between the two).
    block_size: block of the rotation along K; "dual" uses 128; ignored for "none".
    scale_mode: "absmax": x_scale = max|v| * scale_factor / qmax;
        "rms": x_scale = sqrt(mean v^2) * scale_factor. x_scale is always the quantization step.
    """

    weight_bits: int = 4
    act_bits: int = 8
    rotation: str = "hadamard"
    block_size: int = 128
    scale_mode: str = "absmax"
    scale_factor: float = 1.0

    def __post_init__(self) -> None:
        check_weight_bits(self.weight_bits, "QuantScheme")
        for field, allowed in (
            ("act_bits", ACT_BITS),
            ("rotation", ROTATIONS),
            ("block_size", BLOCK_SIZES),
            ("scale_mode", SCALE_MODES),
        ):
            got = getattr(self, field)
            # 8.0 == 8, but names, shifts and shapes want the integer.
            if got not in allowed or type(got) is not type(allowed[0]):
                raise ValueError(f"QuantScheme: {field} must be one of {allowed}, got {got!r}")
        if self.rotation == "dual" and self.block_size != DUAL_BLOCK_SIZE:
            raise ValueError(
                f"QuantScheme: block_size of rotation 'dual' must be {DUAL_BLOCK_SIZE}, "
                f"got {self.block_size}"
            )
        factor = self.scale_factor
        if not isinstance(factor, (int, float)) or not 0.0 < factor < float("inf"):
            raise ValueError(
                f"QuantScheme: scale_factor must be positive and finite, got {factor!r}"
            )

    @property
    def name(self) -> str:
        return f"w{self.weight_bits}a{self.act_bits}"

    @property
    def qmax(self) -> int:
        """Largest activation code, 127 or 7."""
        return activation_qmax(self.act_bits)

    @classmethod
    def from_name(cls, name: str, **fields: Any) -> QuantScheme:
        """QuantScheme.from_name("w4a8", rotation="none"): bits from the name, the rest by field."""
        match = _NAME.fullmatch(name.lower())
        if match is None:
            raise ValueError(f"QuantScheme: name must look like 'w4a8', got {name!r}")
        return cls(weight_bits=int(match[1]), act_bits=int(match[2]), **fields)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> QuantScheme:
        """Inverse of to_dict. An unknown key is an error, so a newer scheme is never half read."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"QuantScheme: unknown fields {unknown}, known are {sorted(known)}")
        return cls(**fields)


def activation_qmax(act_bits: int) -> int:
    """127 for int8, 7 for int4: symmetric, so -128 and -8 are never produced."""
    if act_bits not in (4, 8):
        raise ValueError(f"activation codes exist for act_bits 4 and 8, got {act_bits}")
    return 2 ** (act_bits - 1) - 1
