"""Triton kernel of error feedback: a block of columns rounded in one launch.

Columns are rounded one after the other, each moving the rest, but rows have nothing to do with each
other. So a program keeps BLOCK columns of a few rows in registers and goes over them alone; what
the block does to the columns behind it is a product of matrices, outside (error_feedback.py).
By torch's own ops the same takes about ten launches a column.

    a tile: ROWS rows, one warp; a thread holds 4 neighbouring columns of each

Sums over a row, which pick column k, count the boundaries below its value and pick the level, are
exact: all but one of the terms are zero, or they are small integers. What a column adds to those
behind it is one fused multiply and add here, two roundings in torch's ops.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .error_feedback import BLOCK_SIZE

ROWS = 4  # to a program, which is one warp: sums over a row then stay within it


@triton.jit
def round_kernel(
    value_ptr,
    value_row_stride,
    old_ptr,
    old_row_stride,
    level_ptr,
    matrix_ptr,
    matrix_row_stride,
    diagonal_ptr,
    rounded_ptr,
    rounded_row_stride,
    change_ptr,
    change_row_stride,
    rows,
    columns,
    REFINE: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Columns 0 .. columns - 1 <= BLOCK of `rows` rows, all pointers at the first of them.

    value fp32 [rows, columns]: the weight and what earlier columns have added to it; with REFINE
    the gradient, and old the levels so far. level fp32 [rows, LEVELS], ascending; matrix [columns,
    columns]: the factor U, or H; diagonal [columns] of it. Into rounded go the levels chosen, into
    change what is left over, divided by the diagonal, or the difference to the old level.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < columns)
    row = row.to(tl.int64)
    value = tl.load(value_ptr + row * value_row_stride + column, mask=mask, other=0.0)
    # In the layout of the tile, so that nothing moves between threads: LEVELS of BLOCK columns.
    known = (row < rows) & (column < LEVELS)
    level = tl.load(level_ptr + row * LEVELS + column, mask=known, other=0.0)
    known = (row < rows) & (column < LEVELS - 1)
    above = tl.load(level_ptr + row * LEVELS + column + 1, mask=known, other=0.0)
    boundary = tl.where(column < LEVELS - 1, (level + above) * 0.5, float("inf"))
    if REFINE:
        old = tl.load(old_ptr + row * old_row_stride + column, mask=mask, other=0.0)
    rounded = tl.zeros([ROWS, BLOCK], tl.float32)
    change = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in range(columns):
        here = column == k
        behind = (column > k) & (column < columns)
        moves = tl.load(matrix_ptr + k * matrix_row_stride + column, mask=behind, other=0.0)
        diagonal = tl.load(diagonal_ptr + k)
        x = tl.sum(tl.where(here, value, 0.0), axis=1, keep_dims=True)
        if REFINE:
            before = tl.sum(tl.where(here, old, 0.0), axis=1, keep_dims=True)
            x = before - tl.div_rn(x, diagonal)
        index = tl.sum((x > boundary).to(tl.int32), axis=1, keep_dims=True)
        chosen = tl.sum(tl.where(column == index, level, 0.0), axis=1, keep_dims=True)
        if REFINE:
            step = chosen - before
            value += step * moves
        else:
            step = tl.div_rn(x - chosen, diagonal)
            value -= step * moves
        rounded = tl.where(here, chosen, rounded)
        change = tl.where(here, step, change)
    tl.store(rounded_ptr + row * rounded_row_stride + column, rounded, mask=mask)
    tl.store(change_ptr + row * change_row_stride + column, change, mask=mask)


def round_block(
    value: Tensor,
    old: Tensor | None,
    ascending: Tensor,
    matrix: Tensor,
    diagonal: Tensor,
    rounded: Tensor,
) -> Tensor:
    """Rounds up to BLOCK_SIZE columns, fp32 [N, J], with rows of any stride, into `rounded` [N, J].

    Without old: value is what to round, matrix [J, J] the part of the factor U; returns the errors
    over the diagonal. With it, the levels so far, which may be `rounded` itself: value is the
    gradient, matrix the part of H; returns by how much each has moved. ascending fp32 [N, 2^b]: the
    levels of each row. Raises ValueError for more columns, other dtypes and strides.
    """
    rows, columns = value.shape
    if columns > BLOCK_SIZE:
        raise ValueError(
            f"round_block: value must have {BLOCK_SIZE} columns at most, got {columns}"
        )
    tiles = {"value": value, "old": old, "rounded": rounded}
    for name, tile in tiles.items():
        if tile is not None and (tile.dtype != torch.float32 or tile.stride(1) != 1):
            raise ValueError(
                f"round_block: {name} must be float32 with neighbouring columns, got {tile.dtype} "
                f"of strides {tile.stride()}"
            )
    change = value.new_empty(rows, columns)
    matrix = matrix.contiguous()  # of a factorization, columns may be what is contiguous
    with torch.cuda.device_of(value):
        round_kernel[(triton.cdiv(rows, ROWS),)](
            value,
            value.stride(0),
            old,
            0 if old is None else old.stride(0),
            ascending.contiguous(),
            matrix,
            matrix.stride(0),
            diagonal.contiguous(),
            rounded,
            rounded.stride(0),
            change,
            change.stride(0),
            rows,
            columns,
            REFINE=old is not None,
            LEVELS=ascending.shape[1],
            BLOCK=BLOCK_SIZE,
            ROWS=ROWS,
            num_warps=1,
        )
    return change
