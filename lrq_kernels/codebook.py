"""TwinLogCodebook: 2^b int8 levels, a row's own or one of a few tables, and a fp32 scale per row.

Canonical code c = s << (b-1) | m: s = 1 selects the negative half, m counts magnitudes upward.

    b = 3      c   0    1    2    3  |   4    5    6    7
               m   0    1    2    3  |   0    1    2    3
       level(c)   +9  +30  +61 +118  |  -8  -29  -60 -117        value = level(c) * scale
    ascending v    4    5    6    7  |   3    2    1    0        v = L + m or L - 1 - m, L = 2^(b-1)

There is no code for exact zero. The negative half must stay in [-128, -1] and the other in
[0, 127]: the sign-fill decode of the kernels relies on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .scheme import WEIGHT_BITS

# Tables that rows may share: what one byte tells apart.
MAX_SHARED_TABLES = 256
# Rows are encoded in chunks so that the comparison buffers stay small next to the weight itself.
_ENCODE_CHUNK_ELEMENTS = 1 << 24


def ascending_to_code(bits: int) -> list[int]:
    """Canonical code of each ascending index v = 0 .. 2^bits - 1."""
    half = 1 << (bits - 1)
    return [half + (half - 1 - v) if v < half else v - half for v in range(2 * half)]


@dataclass(frozen=True)
class TwinLogCodebook:
    """levels: int8 [T, 2^b] indexed by canonical code; scale: fp32 [N], finite and >= 0;
    table_of_row: uint8 [N], the table of each row where T <= 256 tables are shared; None: T = N."""

    levels: Tensor
    scale: Tensor
    table_of_row: Tensor | None = None

    def __post_init__(self) -> None:
        levels, scale = self.levels, self.scale
        if levels.dtype != torch.int8 or scale.dtype != torch.float32:
            raise TypeError(
                "TwinLogCodebook: levels must be int8 and scale float32, "
                f"got {levels.dtype} and {scale.dtype}"
            )
        sizes = {1 << bits for bits in WEIGHT_BITS}
        if levels.dim() != 2 or levels.shape[1] not in sizes:
            raise ValueError(
                f"TwinLogCodebook: levels must be [T, 2^b] with 2^b in {sorted(sizes)}, "
                f"got shape {tuple(levels.shape)}"
            )
        if self.table_of_row is None:
            if scale.shape != levels.shape[:1]:
                raise ValueError(
                    f"TwinLogCodebook: scale must be [N] = [{levels.shape[0]}], "
                    f"got shape {tuple(scale.shape)}"
                )
        else:
            self._check_tables(self.table_of_row)
        half = levels.shape[1] // 2
        positive = levels[:, :half].to(torch.int16)
        negative = levels[:, half:].to(torch.int16)
        if bool((positive < 0).any()) or bool((negative >= 0).any()):
            raise ValueError(
                "TwinLogCodebook: levels of codes "
                f"0..{half - 1} must be in [0, 127] and of codes {half}..{2 * half - 1} "
                "in [-128, -1]; a level has the wrong sign"
            )
        if bool((positive.diff(dim=1) < 0).any()) or bool((negative.diff(dim=1) > 0).any()):
            raise ValueError("TwinLogCodebook: magnitudes must not decrease with the code")
        if not bool(torch.isfinite(scale).all()) or bool((scale < 0).any()):
            raise ValueError("TwinLogCodebook: scale must be finite and not negative")

    def _check_tables(self, table_of_row: Tensor) -> None:
        tables = self.levels.shape[0]
        if not 1 <= tables <= MAX_SHARED_TABLES:
            raise ValueError(
                f"TwinLogCodebook: levels that rows share must be 1 to {MAX_SHARED_TABLES} tables, "
                f"got {tables}"
            )
        if table_of_row.dtype != torch.uint8 or table_of_row.shape != self.scale.shape:
            raise ValueError(
                f"TwinLogCodebook: table_of_row must be torch.uint8 {list(self.scale.shape)} as "
                f"scale, got {table_of_row.dtype} {list(table_of_row.shape)}"
            )
        if table_of_row.numel() and int(table_of_row.max()) >= tables:
            raise ValueError(
                f"TwinLogCodebook: table_of_row must be below the {tables} tables there are, "
                f"got {int(table_of_row.max())}"
            )

    @property
    def bits(self) -> int:
        return self.levels.shape[1].bit_length() - 1

    def row_levels(self) -> Tensor:
        """Levels of every row, int8 [N, 2^b]."""
        return levels_of_rows(self.levels, self.table_of_row)

    def rows(self, rows: slice) -> TwinLogCodebook:
        """The codebook of some rows; tables that none of them has are kept."""
        return TwinLogCodebook(
            self.levels[rows] if self.table_of_row is None else self.levels,
            self.scale[rows],
            None if self.table_of_row is None else self.table_of_row[rows],
        )

    def ascending(self) -> Tensor:
        """Levels of every row in ascending order, int8 [N, 2^b]."""
        return self.row_levels()[:, ascending_to_code(self.bits)]

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest level of each weight: float [N, K] to canonical codes uint8 [N, K].

        A value halfway between two levels takes the lower one. Raises ValueError on another
        shape and on NaN or inf.
        """
        if weight.dim() != 2 or weight.shape[0] != self.scale.shape[0]:
            raise ValueError(
                f"TwinLogCodebook.encode: weight must be [N, K] with N = {self.scale.shape[0]}, "
                f"got shape {tuple(weight.shape)}"
            )
        ascending = self.ascending().float() * self.scale[:, None]
        boundaries = ((ascending[:, 1:] + ascending[:, :-1]) / 2).contiguous()
        to_code = torch.tensor(
            ascending_to_code(self.bits), dtype=torch.uint8, device=weight.device
        )
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        rows = max(1, _ENCODE_CHUNK_ELEMENTS // max(1, weight.shape[1]))
        for start in range(0, weight.shape[0], rows):
            chunk = weight[start : start + rows].float().contiguous()
            if not bool(torch.isfinite(chunk).all()):
                raise ValueError("TwinLogCodebook.encode: weight must be finite, got NaN or inf")
            index = torch.searchsorted(boundaries[start : start + rows], chunk, out_int32=True)
            codes[start : start + rows] = to_code[index]
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """levels[codes] * scale, fp32 [N, K]."""
        levels = decode_levels(codes, self.levels, self.table_of_row)
        return levels.float() * self.scale[:, None]


def levels_of_rows(levels: Tensor, table_of_row: Tensor | None) -> Tensor:
    """int8 [N, 2^b] of tables [T, 2^b] and the table of each row, uint8 [N], or None: its own."""
    return levels if table_of_row is None else levels[table_of_row.to(torch.int64)]


def decode_levels(codes: Tensor, levels: Tensor, table_of_row: Tensor | None = None) -> Tensor:
    """int8 level of each code, [N, K]: of codes uint8 [N, K] and the levels of levels_of_rows."""
    return torch.gather(levels_of_rows(levels, table_of_row), 1, codes.to(torch.int64))


def tables_of_part(
    levels: Tensor, table_of_row: Tensor | None, rows: slice
) -> tuple[Tensor, Tensor | None]:
    """(levels, table_of_row) of some rows, with the tables that they use alone: what joined_tables
    joined. A table that no row of a part used is not found again."""
    if table_of_row is None:
        return levels[rows], None
    used, places = table_of_row[rows].unique(return_inverse=True)
    return levels[used.to(torch.int64)], places.to(torch.uint8)


def joined_tables(
    parts: Sequence[tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor | None]:
    """(levels, table_of_row) of the rows of `parts` in order, each given as such a pair.

    Tables are shared if all parts share theirs and one byte tells them apart; otherwise every row
    gets its own."""
    tables = sum(levels.shape[0] for levels, _ in parts)
    if tables > MAX_SHARED_TABLES or any(of_row is None for _, of_row in parts):
        return torch.cat([levels_of_rows(*part) for part in parts]), None
    places, start = [], 0
    for levels, of_row in parts:
        places.append(of_row + start)  # type: ignore[operator]
        start += levels.shape[0]
    return torch.cat([levels for levels, _ in parts]), torch.cat(places)
