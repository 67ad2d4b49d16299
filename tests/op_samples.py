"""Valid arguments of every op, shared by the tests of what torch and CUDA ask of ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lrq_kernels.testing import make_problem

M, N, K = 6, 40, 128
Arguments = dict[str, Any]


def call(op: str, arguments: Arguments) -> Any:
    return getattr(torch.ops.lrq, op).default(*arguments.values())


def rotate_arguments(device: str, rotation: str = "hadamard", x: Any = None) -> Arguments:
    matrices = None
    if rotation == "dual":
        matrices = torch.linalg.qr(torch.randn(2, 128, 128)).Q.contiguous().to(device)
    return {
        "x": torch.randn(M, K).to(device, torch.bfloat16) if x is None else x,
        "channel_scale": torch.randn(K).to(device),
        "permutation": torch.randperm(K).to(device, torch.int32),
        "matrices": matrices,
        "rotation": rotation,
        "block_size": 128,
    }


def quantize_arguments(device: str, rotation: str = "hadamard", x: Any = None) -> Arguments:
    return {
        **rotate_arguments(device, rotation, x),
        "act_bits": 8,
        "scale_mode": "absmax",
        "scale_factor": 1.0,
    }


def concat_arguments(device: str, rotation: str = "hadamard", first: Any = None) -> Arguments:
    """first [M, K - 32] beside second [M, 32], a part of a wider tensor."""
    arguments = quantize_arguments(device, rotation)
    x = arguments.pop("x")
    wide = torch.cat([x, x], dim=1)
    return {
        "first": x[:, : K - 32].contiguous() if first is None else first,
        "second": wide[:, K - 32 : K],
        **arguments,
    }


def activation_arguments(
    device: str, rotation: str = "hadamard", activation: str = "gelu_tanh", keep: bool = True
) -> Arguments:
    """With "silu": a SwiGLU pair, both halves of one tensor."""
    arguments = quantize_arguments(device, rotation)
    pair = torch.randn(M, 2 * K).to(device, torch.bfloat16)
    return {
        "x": pair[:, :K],
        "gate": pair[:, K:] if activation == "silu" else None,
        "activation": activation,
        **{name: value for name, value in arguments.items() if name != "x"},
        "keep": keep,
    }


def norm_arguments(
    device: str, rotation: str = "hadamard", norm: str = "layer", samples: int = 2
) -> Arguments:
    """samples 0: x [M, K] without scale, shift and bias. "layer" keeps, "rms" does not."""
    arguments = quantize_arguments(device, rotation)
    shape = (samples, M // samples, K) if samples else (M, K)
    modulation = torch.randn(samples, 6 * K).to(device) if samples else None
    return {
        "x": (torch.randn(shape) * 3 + 1).to(device, torch.bfloat16),
        "norm_weight": torch.randn(K).to(device, torch.bfloat16),
        "norm_bias": torch.randn(K).to(device) if samples else None,
        "scale": None if modulation is None else modulation[:, K : 2 * K],
        "shift": None if modulation is None else modulation[:, 4 * K : 5 * K].to(torch.bfloat16),
        "norm": norm,
        "eps": 1e-6,
        **{name: value for name, value in arguments.items() if name != "x"},
        "keep": norm == "layer",
    }


def rotate_rows_arguments(device: str, norm: str = "layer", samples: int = 2) -> Arguments:
    """Two sources, the second of wider rows; with a norm also modulation."""
    dtype = torch.bfloat16
    scale = shift = None
    if norm != "none":
        scale, shift = (torch.randn(samples, 2 * K).to(device) for _ in range(2))
    return {
        "x": torch.randn(M, K).to(device, dtype),
        "second": torch.randn(M, K + 64).to(device, dtype)[:, :K],
        "scale": scale,
        "shift": None if shift is None else shift.to(dtype),
        "norm": norm,
        "eps": 1e-6,
        "channel_scale": torch.exp2(torch.randint(-3, 4, (2 * K,))).bfloat16().to(device),
        "block_size": 256,
        "act_bits": 8,
        "scale_mode": "absmax",
        "scale_factor": 1.0,
    }


def gemm_arguments(
    device: str, out_dtype: torch.dtype = torch.bfloat16, rows: int = M, samples: int = 0
) -> Arguments:
    """samples > 0: with a residual and a gate; out_dtype int32: without a bias."""
    problem = make_problem(rows, N, K, 4, device=device)
    residual = gate = None
    if samples:
        residual = torch.randn(rows, N).to(device, out_dtype)
        gate = torch.randn(samples, N).to(device, out_dtype)
    return {
        "x_q": problem.x_q,
        "x_scale": problem.x_scale,
        "weight": problem.weight,
        "levels": problem.levels,
        "weight_scale": problem.weight_scale,
        "bias": None if out_dtype == torch.int32 else problem.bias,
        "residual": residual,
        "gate": gate,
        "weight_bits": 4,
        "out_features": N,
        "activation": "none",
        "out_dtype": out_dtype,
    }


def gemm_config_arguments(device: str) -> Arguments:
    return {**gemm_arguments(device), "config": 0}  # row 0 is portable


def gemv_arguments(device: str, rows: int = 2) -> Arguments:
    gemm = gemm_arguments(device)
    return {
        "x": torch.randn(rows, K).to(device, torch.bfloat16),
        "weight": gemm["weight"],
        "levels": gemm["levels"],
        "weight_scale": gemm["weight_scale"],
        "bias": gemm["bias"],
        "weight_bits": 4,
        "out_features": N,
    }


def gemm_a16_arguments(device: str, rows: int = 20) -> Arguments:
    return {**gemv_arguments(device, rows), "tile": -1}


def prepack_arguments(device: str) -> Arguments:
    codes = torch.randint(-(2**31), 2**31, (N, K // 32 * 3), dtype=torch.int64)
    return {"codes": codes.to(device, torch.int32), "in_features": K, "weight_bits": 3}


def unprepack_arguments(device: str) -> Arguments:
    weight = gemm_arguments(device)["weight"]
    return {"weight": weight, "out_features": N, "in_features": K, "weight_bits": 4}


def dequantize_arguments(device: str) -> Arguments:
    gemm = gemm_arguments(device)
    return {
        "weight": gemm["weight"],
        "levels": gemm["levels"],
        "weight_scale": gemm["weight_scale"],
        "out_features": N,
        "in_features": K,
        "weight_bits": 4,
        "out_dtype": torch.bfloat16,
    }


def qk_arguments(
    device: str, context_tokens: int = 2, norm: str = "rms", rope: str = "interleaved"
) -> Arguments:
    """Streams of one fused projection each; no context and no v with context_tokens 0."""
    heads, head_dim, tokens = 3, 16, 4

    def stream(length: int) -> list[torch.Tensor]:
        fused = torch.randn(2, length, 3 * heads * head_dim).to(device, torch.bfloat16)
        return list(fused.chunk(3, dim=-1))

    q, k, v = stream(tokens)
    context = stream(context_tokens) if context_tokens else [None] * 3
    size = heads * head_dim if norm == "rms_across_heads" else head_dim
    weights = [torch.randn(size).to(device, torch.bfloat16) for _ in range(4)]
    cos, sin = (torch.randn(context_tokens + tokens, head_dim).to(device) for _ in range(2))
    return {
        "q": q,
        "k": k,
        "v": v if context_tokens else None,
        **dict(zip(("context_q", "context_k", "context_v"), context, strict=True)),
        "q_weight": weights[0],
        "k_weight": weights[1],
        "context_q_weight": weights[2] if context_tokens else None,
        "context_k_weight": weights[3] if context_tokens else None,
        "cos": cos,
        "sin": sin,
        "heads": heads,
        "eps": 1e-6,
        "norm": norm,
        "rope": rope,
    }


def qk_bare_arguments(device: str) -> Arguments:
    """Joined, neither normed nor rotated: the outputs must still not be the inputs."""
    arguments = qk_arguments(device, 0, "none")
    v = arguments["q"].contiguous()
    bare = dict.fromkeys(("q_weight", "k_weight", "cos", "sin"))
    return {**arguments, "k": v + 1, "v": v, "q": v - 1, **bare}


def qk_parts_arguments(device: str) -> Arguments:
    return {**qk_arguments(device), "parts": 3}


VALID: dict[str, Callable[[str], Arguments]] = {
    "rotate": rotate_arguments,
    "rotate_quantize": quantize_arguments,
    "concat_rotate_quantize": concat_arguments,
    "activation_rotate_quantize": activation_arguments,
    "norm_modulate_rotate_quantize": norm_arguments,
    "_rotate_rows": rotate_rows_arguments,
    "prepack": prepack_arguments,
    "unprepack": unprepack_arguments,
    "dequantize": dequantize_arguments,
    "gemm": gemm_arguments,
    "gemm_config": gemm_config_arguments,
    "gemv": gemv_arguments,
    "gemm_a16": gemm_a16_arguments,
    "qk_norm_rope": qk_arguments,
    "qk_norm_rope_parts": qk_parts_arguments,
}


def leading_dimensions(device: str) -> Arguments:
    return rotate_arguments(device, x=torch.randn(2, 3, K).to(device))


def strided_rows(device: str) -> Arguments:
    return quantize_arguments(device, x=torch.randn(M, K + 64).to(device)[:, :K])


def no_tokens(device: str) -> Arguments:
    return quantize_arguments(device, x=torch.empty(0, K, device=device))


def batch_of_rows(device: str) -> Arguments:
    arguments = rotate_rows_arguments(device, "rms")
    for name in ("x", "second"):
        arguments[name] = arguments[name].reshape(2, M // 2, K)
    return {**arguments, "shift": None, "scale_mode": "rms", "scale_factor": 0.03}


def no_rotated_rows(device: str) -> Arguments:
    arguments = rotate_rows_arguments(device, "none")
    x = torch.empty(0, K, dtype=torch.bfloat16, device=device)
    return {**arguments, "x": x, "second": x.clone()}


def identity(device: str) -> Arguments:
    arguments = rotate_arguments(device, "none", torch.randn(M, K).to(device))
    return {**arguments, "channel_scale": None, "permutation": None}


def smoothed_only(device: str) -> Arguments:
    return {**quantize_arguments(device, "none"), "permutation": None, "scale_mode": "rms"}


def unpermuted(make: Callable[..., Arguments], *options: Any) -> Callable[[str], Arguments]:
    return lambda device: {**make(device, *options), "permutation": None}


def no_rows(make: Callable[[str], Arguments], *names: str) -> Callable[[str], Arguments]:
    """Arguments without a token in `names`."""

    def emptied(device: str) -> Arguments:
        arguments = make(device)
        for name in names:
            *_, columns = arguments[name].shape
            leading = arguments[name].shape[:-2]
            arguments[name] = arguments[name].new_empty(*leading, 0, columns)
        return arguments

    return emptied


def gelu(device: str) -> Arguments:
    return {**gemm_arguments(device), "activation": "gelu_tanh"}


SAMPLES: list[tuple[str, str, Callable[[str], Arguments]]] = [
    *[(op, "plain", make) for op, make in VALID.items()],
    ("rotate", "leading dimensions", leading_dimensions),
    ("rotate", "identity", identity),
    ("rotate", "dual", lambda device: rotate_arguments(device, "dual")),
    ("rotate_quantize", "dual", lambda device: quantize_arguments(device, "dual")),
    ("rotate_quantize", "strided rows", strided_rows),
    ("rotate_quantize", "no tokens", no_tokens),
    ("rotate_quantize", "smoothed only", smoothed_only),
    ("concat_rotate_quantize", "dual", lambda device: concat_arguments(device, "dual")),
    ("concat_rotate_quantize", "no tokens", no_rows(concat_arguments, "first", "second")),
    ("activation_rotate_quantize", "dual", lambda device: activation_arguments(device, "dual")),
    (
        "activation_rotate_quantize",
        "erf",
        lambda device: activation_arguments(device, "none", "gelu_erf", False),
    ),
    ("activation_rotate_quantize", "gated", unpermuted(activation_arguments, "hadamard", "silu")),
    ("activation_rotate_quantize", "no tokens", no_rows(activation_arguments, "x")),
    ("norm_modulate_rotate_quantize", "dual", lambda device: norm_arguments(device, "dual")),
    ("norm_modulate_rotate_quantize", "unpermuted", unpermuted(norm_arguments)),
    ("norm_modulate_rotate_quantize", "rms", lambda device: norm_arguments(device, "none", "rms")),
    (
        "norm_modulate_rotate_quantize",
        "two dimensions",
        lambda device: norm_arguments(device, "hadamard", "rms", 0),
    ),
    ("norm_modulate_rotate_quantize", "no tokens", no_rows(norm_arguments, "x")),
    ("_rotate_rows", "batch", batch_of_rows),
    ("_rotate_rows", "no tokens", no_rotated_rows),
    ("gemm", "int32", lambda device: gemm_arguments(device, torch.int32)),
    ("gemm", "gate", lambda device: gemm_arguments(device, torch.float16, samples=3)),
    ("gemm", "no tokens", lambda device: gemm_arguments(device, torch.float32, rows=0)),
    ("gemm", "gelu", gelu),
    ("gemv", "no tokens", lambda device: gemv_arguments(device, rows=0)),
    ("gemm_a16", "few tokens", lambda device: gemm_a16_arguments(device, rows=3)),
    ("gemm_a16", "no tokens", lambda device: gemm_a16_arguments(device, rows=0)),
    ("qk_norm_rope", "no context", lambda device: qk_arguments(device, 0, "rms_rounded", "half")),
    ("qk_norm_rope", "across", lambda device: qk_arguments(device, 3, "rms_across_heads")),
    ("qk_norm_rope", "bare", qk_bare_arguments),
]


def flat(result: Any) -> list[torch.Tensor]:
    """The outputs of an op, one or several."""
    return list(result) if isinstance(result, (tuple, list)) else [result]
