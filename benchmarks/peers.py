"""Weight-only and low-bit linears of other packages, for the benchmarks, through their public API.

Each function quantizes a weight bf16 [N, K] and returns a call that computes x @ weight.T for one x
bf16 [M, K]. PeerMissing says in one sentence why one cannot run here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

Call = Callable[[], Tensor]


class PeerMissing(Exception):
    """A package that is not installed, or that lacks what the benchmark calls."""


def package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PeerMissing(f"{name} is not installed ({error})") from error


def tinygemm(x: Tensor, weight: Tensor, group: int = 128) -> Call:
    """torch's int4 kernel: uniform levels, one bf16 scale and zero for a group of inputs."""
    n, k = weight.shape
    groups = weight.float().view(n, k // group, group)
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    scale = (high - low).clamp(min=1e-6) / 15
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).view(n, k)
    codes = codes.to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    # level = (code - 8) * scale + zero
    scale_and_zero = torch.stack([scale, low + 8 * scale], dim=-1).transpose(0, 1)
    scale_and_zero = scale_and_zero.to(torch.bfloat16).contiguous()
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, group, scale_and_zero)


def nf4(x: Tensor, weight: Tensor) -> Call:
    """bitsandbytes: a kernel of its own for one row, dequantization and cuBLAS for more."""
    bitsandbytes = package("bitsandbytes")
    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return lambda: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)


def sdnq_linear(dense: torch.nn.Linear) -> torch.nn.Module:
    """The linear as SDNQ quantizes it."""
    module = package("sdnq")
    config = module.SDNQConfig(
        weights_dtype="int8", group_size=-1, use_quantized_matmul=True, use_hadamard=True
    )
    linear, _ = module.sdnq_quantize_layer(dense, config, torch_dtype=dense.weight.dtype)
    if not linear.sdnq_dequantizer.use_quantized_matmul:
        n, k = dense.out_features, dense.in_features
        raise PeerMissing(f"sdnq multiplies {n} x {k} in 16 bits")
    quantized: torch.nn.Module = linear
    return quantized


def sdnq(x: Tensor, weight: Tensor) -> Call:
    """SDNQ's int8 path: weights and tokens to 8 bits by row, after a Hadamard transform as ours;
    quantizing x is part of the call."""
    n, k = weight.shape
    dense = torch.nn.Linear(k, n, bias=False, device=weight.device, dtype=weight.dtype)
    dense.weight.data.copy_(weight)
    layer = sdnq_linear(dense)

    def call() -> Tensor:
        with torch.inference_mode():
            return layer(x)

    return call


def gemlite(x: Tensor, weight: Tensor) -> Call:
    """gemlite's A8W4: uniform levels with a scale a channel, tokens to int8 within the call."""
    helper = package("gemlite.helper")
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-6) / 7
    codes = (weight.float() / scale).round().clamp(-8, 7).add(8).to(torch.uint8)
    processor = helper.A8Wn_HQQ_INT_dynamic(
        device=str(weight.device), dtype=weight.dtype, fp8=torch.int8, W_nbits=4
    )
    zeros = torch.full_like(scale, 8.0)
    layer = processor.from_weights(codes, scale.to(weight.dtype), zeros.to(weight.dtype))
    return lambda: layer(x)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Call]] = {
    "tinygemm": tinygemm,
    "nf4": nf4,
    "sdnq": sdnq,
    "gemlite": gemlite,
}
# Bits of a weight as it lies in memory.
WEIGHT_BITS = {"tinygemm": 4, "nf4": 4, "sdnq": 8, "gemlite": 4}
