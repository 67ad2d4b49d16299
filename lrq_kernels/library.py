"""Loads the compiled CUDA ops and says plainly when they are absent."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

LIBRARY_NAME = "liblrq_cuda.so"
_status = "not loaded yet"


def load_cuda_library() -> None:
    """Register the CUDA kernels of csrc with the dispatcher; called once, on import.

    Without the library the CPU kernels work and CUDA tensors raise torch's own "no kernel for
    CUDA" error. A warning says so once, and only where there is a GPU that would miss it.
    """
    global _status
    path = Path(__file__).with_name(LIBRARY_NAME)
    if not path.exists():
        _status = f"not built: {path.name} is absent; install where nvcc is available to build it"
        if torch.cuda.is_available():
            warnings.warn(f"lrq_kernels: CUDA kernels are {_status}", stacklevel=3)
        return
    torch.ops.load_library(str(path))
    _status = f"loaded from {path.name}"


def cuda_library_status() -> str:
    """One line for reports: whether the CUDA kernels are loaded, and why not."""
    return _status
