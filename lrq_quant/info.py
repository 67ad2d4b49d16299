"""lrq info: what this machine will run, and what it will not."""

from __future__ import annotations

import platform

import torch

import lrq_kernels
from lrq_kernels.activation_path import CUDA, FORMS, TRITON, implementation

MIN_CAPABILITY = (8, 0)


def info_lines() -> list[str]:
    """Versions, GPUs, compiled architectures, and which kernels serve which device."""
    lines = [f"python {platform.python_version()}, torch {torch.__version__}"]
    for name in ("triton", "diffusers", "transformers"):
        lines.append(f"{name} {_version(name)}")
    lines.append(f"CUDA kernels: {lrq_kernels.cuda_library_status()}")
    lines.append(f"planner: {_planner_line()}")
    lines += _gpu_lines()
    lines.append("CPU: reference kernels in PyTorch, exact and slow")
    return lines


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"


def _planner_line() -> str:
    try:
        from lrq_kernels import _planner
    except ImportError as error:
        return f"not built ({error})"
    archs = ", ".join(f"sm_{arch}" for arch in _planner.cuda_archs()) or "no architecture"
    return f"{len(_planner.gemm_configs())} GEMM configurations; compiled for {archs}"


def _gpu_lines() -> list[str]:
    if not torch.cuda.is_available():
        return ["GPU: none that torch can use"]
    lines = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        line = f"GPU {index}: {name}, sm_{capability[0]}{capability[1]}"
        if capability < MIN_CAPABILITY:
            line += ", below sm_80: no kernels for it"
        else:
            line += "; " + _activation_kernels()
            line += "; gemm, gemv, dequantize, prepack: "
            line += _cuda_kernels(capability)
        lines.append(line)
    return lines


def _activation_kernels() -> str:
    """Of the forms of rotate_quantize for the input of a FLUX linear."""
    by_kernel: dict[str, list[str]] = {}
    for form in FORMS:
        kernel = implementation(form, torch.bfloat16, 3072, "hadamard", 128, False, "absmax")
        by_kernel.setdefault(kernel, []).append(form)
    said = {CUDA: "CUDA", TRITON: "Triton"}
    parts = [f"{', '.join(forms)}: {said[kernel]}" for kernel, forms in by_kernel.items()]
    others = "with a permutation or smoothing that bf16 does not hold: Triton"
    return f"rotate_quantize of 16 bits ({'; '.join(parts)}), {others}"


def _cuda_kernels(capability: tuple[int, int]) -> str:
    if "loaded" not in lrq_kernels.cuda_library_status():
        return "absent"
    try:
        from lrq_kernels import _planner
    except ImportError:
        return "CUDA"
    config = _planner.select(4096, 3072, 3072, 4, capability[0] * 10 + capability[1])
    return f"CUDA, e.g. {config} for 4096 x 3072 x 3072"
