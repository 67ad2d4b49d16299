"""Weights to packed codes and back, some rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lrq_kernels import LinearState, TwinLogCodebook
from lrq_kernels.packing import pack_codes, unpack_codes

# Weights encoded, packed or decoded at once: bounds the int64 temporaries of gather and packing.
_CHUNK_WEIGHTS = 1 << 24


def _row_chunks(tensor: Tensor) -> int:
    return max(1, _CHUNK_WEIGHTS // max(1, tensor.shape[1]))


def packed_codes(rotated: Tensor, codebook: TwinLogCodebook) -> Tensor:
    """Canonical codes int32 [N, ceil(K/32)*b] of the nearest levels."""
    size = _row_chunks(rotated)
    packed = []
    for start in range(0, rotated.shape[0], size):
        rows = slice(start, start + size)
        packed.append(pack_codes(codebook.rows(rows).encode(rotated[rows]), codebook.bits))
    return torch.cat(packed)


def decoded_weight(state: LinearState) -> Tensor:
    """levels[code] * scale, fp32 [N, K], in the rotated domain."""
    bits, columns = state.scheme.weight_bits, state.in_features
    decoded = torch.empty(state.out_features, columns, device=state.codes.device)
    codebook, size = state.codebook(), _row_chunks(decoded)
    for start in range(0, state.out_features, size):
        rows = slice(start, start + size)
        codes = unpack_codes(state.codes[rows], bits, columns)
        decoded[rows] = codebook.rows(rows).decode(codes)
    return decoded
