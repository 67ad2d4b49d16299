"""Rows of the benchmarks: dicts of figures, written as JSON and printed as tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from lrq_quant.work_folder import write_text

Row = dict[str, Any]
Columns = tuple[tuple[str, str, int], ...]  # key, title, digits


def write_json(rows: list[Row], file: Path) -> None:
    """The file is whole at any time."""
    write_text(file, json.dumps(rows, indent=1) + "\n")


def error_text(error: BaseException) -> str:
    """One line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def titles(columns: Columns, width: int) -> str:
    return "".join(f"{title:>{width}}" for _, title, _ in columns)


def cells(row: Row, columns: Columns, width: int) -> str:
    """The figures of a row, a dash where there is none; of one with an error, the error."""
    if "error" in row:
        return f"  failed: {row['error']}"
    values = ((row.get(key), digits) for key, _, digits in columns)
    return "".join(f"{'-':>{width}}" if x is None else f"{x:>{width}.{d}f}" for x, d in values)


def measure_problems(
    names: Iterable[str], measure: Callable[[str], list[Row]], file: Path | None
) -> list[Row]:
    """The rows of every problem on the GPU, written after each: a run that is stopped keeps what it
    has. Raises SystemExit without a GPU."""
    if not torch.cuda.is_available():
        raise SystemExit(f"{Path(sys.argv[0]).stem}: needs a CUDA device")
    rows: list[Row] = []
    for name in names:
        rows += measure(name)
        torch.cuda.empty_cache()
        if file is not None:
            write_json(rows, file)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    return rows
