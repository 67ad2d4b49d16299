"""The Triton kernels of rotate_quantize, its fused forms and qk_norm_rope, compiled ahead of time
without a GPU, and what their code must be like.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from rotate_cases import Case


def compile_kernel(
    kernel,
    arguments: dict[str, object],
    num_warps: int,
    arch: int,
    *,
    aligned: bool = True,
    divisible: tuple[str, ...] = (),
    **options,
):
    """Cubin of a kernel; arguments: name -> Triton type ("*bf16", "i32"), or a constant.

    aligned: strides, and the arguments named in divisible, are multiples of 16, as Triton finds out
    about the arguments of a launch.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = ("*", "i32", "i64", "fp32")
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, str) and value.startswith(types):
            signature[name] = value
            sixteens = name.endswith("_stride") or name in divisible
            if value.startswith("*") or (aligned and sixteens):
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(index,)] = value
    return triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, **options},
    )


def shared_arguments(
    in_features: int,
    case: Case,
    dtype: str,
    *,
    permuted: bool = False,
    quantize: bool = True,
    **most: int,
) -> tuple[dict[str, object], int]:
    """The arguments that the kernels of a token share, and num_warps; most: max_values."""
    from lrq_kernels import rotate_quantize as kernels

    block_size = case.block_size if case.rotation == "hadamard" else 1
    launch = kernels.row_launch(in_features, block_size, **most)
    arguments = {
        "x_ptr": f"*{dtype}",
        "x_row_stride": "i32",
        "channel_scale_ptr": "*fp32",
        "permutation_ptr": "*i32" if permuted else None,
        "out_ptr": "*i8" if quantize else f"*{dtype}",
        "x_scale_ptr": "*fp32" if quantize else None,
        "step_factor": "fp32",
        "K": in_features,
        "N": 32 * launch.num_warps,
        "VALUES": launch.values,
        "BLOCK": block_size,
        "QMAX": case.qmax,
        "RMS": case.scale_mode == "rms",
        "CLAMP": case.scale_mode == "rms",
    }
    return arguments, launch.num_warps


def row_kernel(
    in_features: int,
    case: Case,
    dtype: str,
    arch: int,
    *,
    split: int = 0,
    aligned: bool = True,
    **options,
):
    """split > 0: two sources, the first of that width."""
    from lrq_kernels import rotate_kernels

    arguments, num_warps = shared_arguments(in_features, case, dtype, **options)
    arguments["second_ptr"] = f"*{dtype}" if split else None
    arguments |= {"second_row_stride": "i32", "SPLIT": split or in_features}
    return compile_kernel(rotate_kernels.row_kernel, arguments, num_warps, arch, aligned=aligned)


def norm_kernel(norm: str, affine: bool, keep: bool, in_features: int, arch: int, **options):
    from lrq_kernels import rotate_kernels
    from lrq_kernels import rotate_quantize as kernels

    case, dtype = options.pop("case", Case()), options.pop("dtype", "bf16")
    vectors = options.pop("vectors", dtype)
    if options.get("permuted"):
        options["max_values"] = kernels.MAX_GATHERED_VALUES
    arguments, num_warps = shared_arguments(in_features, case, dtype, **options)
    arguments |= {
        "x_sample_stride": "i64",
        "tokens_per_sample": "i32",
        "norm_weight_ptr": f"*{dtype}" if affine else None,
        "norm_bias_ptr": "*fp32" if affine else None,
        "scale_ptr": f"*{vectors}",
        "scale_row_stride": "i32",
        "shift_ptr": f"*{vectors}",
        "shift_row_stride": "i32",
        "eps": "fp32",
        "kept_ptr": f"*{dtype}" if keep else None,
        "LAYER_NORM": norm == "layer",
    }
    compiled = compile_kernel(
        rotate_kernels.norm_kernel, arguments, num_warps, arch, **kernels.NORM_OPTIONS
    )
    return compiled, num_warps


def activation_kernel(name: str, gated: bool, keep: bool, in_features: int, arch: int, **options):
    from lrq_kernels import rotate_kernels

    case, dtype = options.pop("case", Case()), options.pop("dtype", "bf16")
    arguments, num_warps = shared_arguments(in_features, case, dtype, **options)
    arguments |= {
        "gate_ptr": f"*{dtype}" if gated else None,
        "gate_row_stride": "i32",
        "kept_ptr": f"*{dtype}" if keep else None,
        "ACTIVATION": name,
    }
    return compile_kernel(rotate_kernels.activation_kernel, arguments, num_warps, arch), num_warps


def dense_kernel(in_features: int, dtype: str, arch: int, *, first: bool):
    from lrq_kernels import dual_kernels
    from lrq_kernels import rotate_quantize as kernels

    arguments = {
        "x_ptr": f"*{dtype}" if first else "*fp32",
        "x_row_stride": "i32",
        "channel_scale_ptr": "*fp32" if first else None,
        "permutation_ptr": None if first else "*i32",
        "matrix_ptr": "*fp32",
        "out_ptr": "*fp32" if first else f"*{dtype}",
        "num_rows": "i32",
        "K": in_features,
        "ROWS": kernels._DENSE_ROWS,
    }
    return compile_kernel(dual_kernels.block_dense_kernel, arguments, kernels._DENSE_WARPS, arch)


def dual_kernel(in_features: int, case: Case, dtype: str, arch: int, *, quantize: bool = True):
    from lrq_kernels import dual_kernels
    from lrq_kernels import rotate_quantize as kernels

    tokens = kernels._DUAL_ROWS * 128 // in_features
    arguments = {
        "x_ptr": f"*{dtype}",
        "x_row_stride": "i32",
        "channel_scale_ptr": "*fp32",
        "permutation_ptr": "*i32",
        "matrices_ptr": "*fp32",
        "out_ptr": "*i32" if quantize else f"*{dtype}",
        "x_scale_ptr": "*fp32" if quantize else None,
        "step_factor": "fp32",
        "num_tokens": "i32",
        "K": in_features,
        "TOKENS": tokens,
        "SLOTS": 1 << (tokens - 1).bit_length(),
        "ROWS": kernels._DUAL_ROWS,
        "QMAX": case.qmax,
        "RMS": case.scale_mode == "rms",
        "CLAMP": case.scale_mode == "rms",
    }
    return compile_kernel(dual_kernels.dual_kernel, arguments, kernels._DENSE_WARPS, arch)


def qk_kernel(
    heads: int,
    head_dim: int,
    arch: int,
    *,
    norm: str = "rms",
    rope: str | None = "interleaved",
    context: bool = True,
    weights: str | None = "bf16",
    dtype: str = "bf16",
    parts: int = 1,
):
    """With a context, and for several parts, v is written too."""
    from lrq_kernels import qk_norm_rope as kernels

    launch = kernels.select_launch(heads, head_dim, norm)
    x, weight = f"*{dtype}", f"*{weights}" if weights else None
    streams = dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr", "v_out_ptr"), x)
    streams |= dict.fromkeys(
        ("context_q_ptr", "context_k_ptr", "context_v_ptr"), x if context else None
    )
    streams["v_ptr"] = x if context or parts > 1 else None
    prefixes = ("", "context_")
    strides = [f"{prefix}{of}_stride" for prefix in prefixes for of in ("sample", "row")]
    arguments = {
        **streams,
        **dict.fromkeys(("q_weight_ptr", "k_weight_ptr"), weight),
        **dict.fromkeys(
            ("context_q_weight_ptr", "context_k_weight_ptr"), weight if context else None
        ),
        **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32" if rope else None),
        "part_offsets_ptr": None,
        **dict.fromkeys((*strides, "part_stride", "context_tokens", "tokens"), "i32"),
        "eps": "fp32",
        "HEADS": heads,
        "GROUP": launch.group,
        "D": head_dim,
        "PAIRS": kernels.padded_pairs(head_dim),
        "NORM": norm,
        "HALF": rope == "half",
        "PARTS": parts,
    }
    options = {"enable_fp_fusion": False}
    return compile_kernel(kernels.qk_norm_rope_kernel, arguments, launch.num_warps, arch, **options)


def assert_no_spills(compiled) -> None:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [str(tool), "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert found is not None, usage
    # On sm_100 ptxas parks one value on the stack to stay at 64 registers.
    assert int(found.group(2)) <= 8 and found.group(3) == "0", f"spills: {found.group(0)}"


def lane_shuffles(values: int, block_size: int) -> int:
    """Of the butterflies between lanes that a thread takes part in; see token_tiles.py."""
    total = 0
    for chunk in [32] * (values // 32) + [size for size in (16, 8, 4) if values & size]:
        columns, lanes = min(chunk, 8), 128 // chunk
        bits = range(block_size.bit_length() - 1)
        total += chunk * sum(columns <= 1 << bit < columns * lanes or bit >= 7 for bit in bits)
    return total


def assert_nothing_moves(compiled, num_warps: int, shuffles: int, reductions: int = 1) -> None:
    """Between threads only butterflies and reductions; int8 keeps its place in its registers."""
    assert compiled.metadata.shared <= 4 * num_warps, "only reductions over warps"
    moved = compiled.asm["ptx"].count("shfl.sync")
    assert shuffles <= moved <= shuffles + 10 * reductions
    code = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"(#\w+) = (#ttg\..*)", code))
    for source, result in re.findall(
        r"convert_layout .* : tensor<\w+xi8, (#\w+)> -> tensor<\w+, (#\w+)>", code
    ):
        columns = re.search(
            r"sizePerThread = \[1, ([48])\], threadsPerWarp = \[32, 1\]", layouts[result]
        )
        registers = ", ".join(f"[0, {1 << bit}]" for bit in range(3 if columns[1] == "8" else 2))
        lanes = ", ".join(f"[{1 << bit}, 0]" for bit in range(5))
        assert f"register = [{registers}], lane = [{lanes}]" in layouts[source]
