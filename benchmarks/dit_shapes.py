"""Linear shapes of real diffusion transformers; their configurations are lrq_quant.model_shapes.

Counted with diffusers 0.42.1 on the meta device, batch 1, one forward at 1024 x 1024; guidance
doubles M for PixArt. FLUX.1-dev has 4096 image and 512 text tokens, PixArt-Sigma 4096 and 300.
"""

from __future__ import annotations

from typing import NamedTuple


class LinearShape(NamedTuple):
    """M tokens, N out_features, K in_features; `count` linears of this kind in the model."""

    name: str
    m: int
    n: int
    k: int
    count: int


FLUX_DEV = (
    LinearShape("double attn to_q/k/v/out", 4096, 3072, 3072, 76),
    LinearShape("double attn to_qkv (fused)", 4096, 9216, 3072, 19),
    LinearShape("double attn add_q/k/v/out", 512, 3072, 3072, 76),
    LinearShape("double attn to_added_qkv (fused)", 512, 9216, 3072, 19),
    LinearShape("double ff.net.0.proj", 4096, 12288, 3072, 19),
    LinearShape("double ff.net.2", 4096, 3072, 12288, 19),
    LinearShape("double ff_context.net.0.proj", 512, 12288, 3072, 19),
    LinearShape("double ff_context.net.2", 512, 3072, 12288, 19),
    LinearShape("single attn to_qkv (fused)", 4608, 9216, 3072, 38),
    LinearShape("single proj_mlp", 4608, 12288, 3072, 38),
    LinearShape("single proj_out", 4608, 3072, 15360, 38),
    LinearShape("modulation norm1.linear, norm1_context.linear", 1, 18432, 3072, 38),
    LinearShape("modulation norm.linear (single)", 1, 9216, 3072, 38),
)

PIXART_SIGMA = (
    LinearShape("attn1 to_q/k/v/out, attn2 to_q/out", 4096, 1152, 1152, 168),
    LinearShape("attn1 to_qkv (fused)", 4096, 3456, 1152, 28),
    LinearShape("attn2 to_k/v", 300, 1152, 1152, 56),
    LinearShape("attn2 to_kv (fused)", 300, 2304, 1152, 28),
    LinearShape("ff.net.0.proj", 4096, 4608, 1152, 28),
    LinearShape("ff.net.2", 4096, 1152, 4608, 28),
    LinearShape("modulation adaln_single.linear", 1, 6912, 1152, 1),
)

# in_features of every linear of the models in this file and of SD3, Wan, Hunyuan, CogVideoX,
# Qwen-Image and Z-Image, for tests of the activation path.
IN_FEATURES = (
    1152,
    1536,
    1920,
    2432,
    3072,
    3840,
    4096,
    4608,
    5120,
    6144,
    7680,
    8960,
    9728,
    10240,
    12288,
    13824,
    15360,
)
