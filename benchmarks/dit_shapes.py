"""Linear shapes and published configurations of real diffusion transformers.

Counted with diffusers 0.42.1 on the meta device, batch 1, one forward at 1024 x 1024; guidance
doubles M for PixArt. FLUX.1-dev has 4096 image and 512 text tokens, PixArt-Sigma 4096 and 300.
"""

from __future__ import annotations

from typing import Any, NamedTuple


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

# Arguments of the diffusers classes; what is not named is the class's default. Sources: the two of
# this file's tables and Qwen-Image are published config.json files; "script": what diffusers'
# scripts/convert_*_to_diffusers.py writes as config.json; "from memory": not checked against one.
MODEL_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux-dev": (
        "FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
    ),
    "pixart-sigma": (
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "cross_attention_dim": 1152,
            "sample_size": 128,
            "patch_size": 2,
            "norm_type": "ada_norm_single",
            "interpolation_scale": 2,
            "use_additional_conditions": False,
            "caption_channels": 4096,
        },
    ),
    # FLUX.1 from memory: what differs from flux-dev.
    "flux-schnell": ("FluxTransformer2DModel", dict(guidance_embeds=False)),
    "flux-fill": (
        "FluxTransformer2DModel",
        dict(in_channels=384, out_channels=64, guidance_embeds=True),
    ),
    # Script.
    "flux2-dev": (
        "Flux2Transformer2DModel",
        dict(num_layers=8, num_single_layers=48, num_attention_heads=48, joint_attention_dim=15360),
    ),
    "flux2-klein-4b": (
        "Flux2Transformer2DModel",
        dict(
            num_layers=5,
            num_single_layers=20,
            num_attention_heads=24,
            joint_attention_dim=7680,
            guidance_embeds=False,
        ),
    ),
    "flux2-klein-9b": (
        "Flux2Transformer2DModel",
        dict(
            num_layers=8,
            num_single_layers=24,
            num_attention_heads=32,
            joint_attention_dim=12288,
            guidance_embeds=False,
        ),
    ),
    # Class defaults.
    "chroma": ("ChromaTransformer2DModel", {}),
    # From memory; parameters agree with shapes.md for medium.
    "sd3.5-medium": (
        "SD3Transformer2DModel",
        dict(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
    ),
    "sd3.5-large": (
        "SD3Transformer2DModel",
        dict(
            num_layers=38,
            num_attention_heads=38,
            caption_projection_dim=2432,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        ),
    ),
    # Script.
    "wan2.1-t2v-1.3b": (
        "WanTransformer3DModel",
        dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    ),
    "wan2.1-i2v-14b": (
        "WanTransformer3DModel",
        dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
    ),
    # One of its two transformers.
    "wan2.2-t2v-a14b": ("WanTransformer3DModel", {}),
    "wan2.2-ti2v-5b": (
        "WanTransformer3DModel",
        dict(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48),
    ),
    "hunyuan-video": ("HunyuanVideoTransformer3DModel", {}),
    "cogvideox-2b": ("CogVideoXTransformer3DModel", {}),
    "cogvideox-5b": (
        "CogVideoXTransformer3DModel",
        dict(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True),
    ),
    "ltx-video-2b": ("LTXVideoTransformer3DModel", {}),
    "ltx-video-13b": (
        "LTXVideoTransformer3DModel",
        dict(attention_head_dim=128, cross_attention_dim=4096, num_layers=48),
    ),
    "sana-1.6b": ("SanaTransformer2DModel", {}),
    "sana-0.6b": (
        "SanaTransformer2DModel",
        dict(
            num_attention_heads=36,
            num_layers=28,
            num_cross_attention_heads=16,
            cross_attention_head_dim=72,
            cross_attention_dim=1152,
        ),
    ),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    # Class defaults.
    "z-image": ("ZImageTransformer2DModel", {}),
    # From memory: class defaults but for the caption width (of Gemma 2).
    "lumina-image-2.0": ("Lumina2Transformer2DModel", dict(cap_feat_dim=2304)),
    # From memory.
    "hidream-i1": (
        "HiDreamImageTransformer2DModel",
        dict(
            patch_size=2,
            in_channels=16,
            caption_channels=[4096, 4096],
            axes_dims_rope=(64, 32, 32),
            llama_layers=[*range(32), *[31] * 16],
        ),
    ),
}
