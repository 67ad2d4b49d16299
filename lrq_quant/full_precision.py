"""fp32 products in fp32, whatever the caller lets torch round them to.

torch.set_float32_matmul_precision("high"), which many programs set, turns fp32 products on a GPU
into TF32, with 10 bits of mantissa.  Where a few directions of an input hold almost all its energy,
the others are less than that rounding: their second moments come out of the rotation with any sign,
and a weight fitted to them, or rounded with error feedback over them, is noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_IEEE = "ieee"


@contextmanager
def full_precision() -> Iterator[None]:
    """A context, or a decorator, in which matrix products of fp32 are of fp32, and those of fp16
    are added in fp32."""
    cuda = torch.backends.cuda.matmul
    backends = (cuda, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    accumulation = cuda.allow_fp16_accumulation
    try:
        cuda.allow_fp16_accumulation = False
        for backend in backends:
            backend.fp32_precision = _IEEE
        yield
    finally:
        cuda.allow_fp16_accumulation = accumulation
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
