"""Which family a GPU kernel, or an operator on the CPU, belongs to: by its name, in one table.

A name does not say what a kernel is for. What other packages leave to torch counts as torch's: a
Hadamard transform by a product as GEMM, quantization without a compiler as element-wise and copies.
"""

from __future__ import annotations

import re
from functools import lru_cache

GEMM, ATTENTION, QUANTIZATION = "gemm", "attention", "quantization"
ELEMENTWISE, COPY, OTHER = "element-wise", "memory copy", "other"
EXCHANGE = "exchange"  # with other GPUs, and waiting for them
# Of a table: what the GPU does, and when it does nothing.
LAUNCH_GAPS = "launch gaps"
FAMILIES = (GEMM, ATTENTION, QUANTIZATION, ELEMENTWISE, COPY, EXCHANGE, OTHER)

# The work that is counted (op_work), and the kernels of lrq that do it; what others do is told
# apart by family.
OUR_GEMM, OUR_A16, OUR_QUANTIZATION = "lrq gemm", "lrq a16 gemm, gemv", "lrq rotate + quantize"
OUR_QK, OTHER_GEMM = "lrq qk norm + rope", "other gemm"
# Of lrq::gemm_a16 where it decodes weights and torch multiplies: by kernels that others use too.
OUR_A16_AND_OTHER = "a16 and other gemm"
_OURS = (
    (OUR_GEMM, r"lrq::.*\bgemm_sm(80|90)_kernel<"),
    (OUR_A16, r"lrq::.*\b(gemm_a16_sm90_kernel|gemv_kernel)<"),
    (
        OUR_QUANTIZATION,
        r"lrq::.*\brotate_(rows|groups)_kernel<"
        r"|^(row|activation|norm|block_dense|dual)_kernel$",
    ),
    (OUR_QK, r"^qk_norm_rope_kernel$"),
)

# The first that is found in a name decides.
_RULES = (
    (GEMM, r"lrq::.*\b(gemm_sm(80|90)|gemm_a16_sm90|gemv)_kernel|^lrq::(gemm|gemm_a16|gemv)$"),
    (
        QUANTIZATION,
        r"lrq::.*\b(rotate_(rows|groups)|dequantize|prepack|unprepack)_kernel"
        r"|^lrq::\w*rotate\w*$"
        r"|^(row|activation|norm|block_dense|dual)_kernel$"
        r"|^lrq::(dequantize|prepack|unprepack)$",
    ),
    (ELEMENTWISE, r"^qk_norm_rope_kernel$|^lrq::qk_norm_rope(_parts)?$"),
    (
        EXCHANGE,
        r"^write_tokens_kernel$|\bsymmetric_memory::|^ncclDevKernel|^_?c10d(_functional)?::",
    ),
    # Inductor names a kernel after the ops whose work it took part in, so that one which prepares
    # or scales a product bears its name. Only templates multiply.
    (GEMM, r"^triton_tem_fused_.*(mm|convolution)"),
    (ATTENTION, r"^triton_tem_fused_.*attention"),
    # A scale by the largest value, or values cut to those of a code: torchao's, after a norm or an
    # activation as it comes. The word in front is the kind of loop, "unk" where that has no name.
    (QUANTIZATION, r"^triton_[a-z]+_fused_.*(amax|clamp)"),
    (ELEMENTWISE, r"^triton_"),
    # Of bitsandbytes, torchao and SDNQ.
    (
        QUANTIZATION,
        r"kQuantizeBlockwise|kDequantizeBlockwise|dequantize|quantize_|_(de)?quant_kernel",
    ),
    (GEMM, r"^sdnq_(triton|scaled)_mm_kernel|^(scaled_)?matmul_kernel|^_kernel_matmul_fp8_row"),
    (
        ATTENTION,
        r"sdpa|flash_fwd|flash_attn|FlashAttn|fmha|efficient_attention|_attention|_attn_",
    ),
    # A cast is a copy to torch; cuDNN changes layouts around a convolution.
    (COPY, r"^Mem(cpy|set)|CatArrayBatchedCopy|_copy_kernel|copy_device_to_device"),
    (COPY, r"\b(nchwToNhwc|nhwcToNchw)Kernel"),
    (COPY, r"^aten::(copy_|cat|clone|contiguous|to)$"),
    # "nvjet", "xmma", "cutlass" are families of libraries; convolutions are products to them.
    (
        GEMM,
        r"nvjet_|xmma|gemm|GEMM|cutlass|gemv|splitK|dot_kernel"
        r"|^aten::(linear|addmm|mm|bmm|baddbmm|matmul|_scaled_mm|_int_mm|conv\w*)$",
    ),
    (
        ELEMENTWISE,
        r"elementwise|reduce_kernel|layer_norm|LayerNorm|rms_norm|RMSNorm|softmax|SoftMax"
        r"|multi_tensor_apply|index|gather|scatter",
    ),
    (
        ELEMENTWISE,
        r"^aten::(add|sub|mul|div|neg|sin|cos|exp|pow|rsqrt|silu|gelu|sigmoid|tanh|outer"
        r"|layer_norm|rms_norm|_fused_rms_norm|mean|sum|stack|arange|embedding|index_select)_?$",
    ),
)
_COMPILED_RULES = [(family, re.compile(pattern)) for family, pattern in _RULES]
_COMPILED_OURS = [(work, re.compile(pattern)) for work, pattern in _OURS]


@lru_cache(maxsize=4096)
def family_of_kernel(name: str) -> str:
    """One of FAMILIES."""
    return next((family for family, rule in _COMPILED_RULES if rule.search(name)), OTHER)


@lru_cache(maxsize=4096)
def our_work(name: str) -> str | None:
    """Which counted work of lrq a GPU kernel does, None where it is not lrq's."""
    return next((work for work, rule in _COMPILED_OURS if rule.search(name)), None)


def is_dequantize(name: str) -> bool:
    """Whether a GPU kernel decodes weights of lrq for a product by torch."""
    return re.search(r"lrq::.*\bdequantize_kernel", name) is not None


def counted_work(name: str) -> str | None:
    """Which counted work a GPU kernel does, lrq's or another's, None where that is not counted."""
    ours = our_work(name)
    if ours is not None or "lrq::" in name:
        return ours
    return {ATTENTION: ATTENTION, GEMM: OTHER_GEMM}.get(family_of_kernel(name))
