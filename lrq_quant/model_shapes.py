"""Diffusion transformers at their published shapes, with random weights.

For benchmarks and `lrq profile`: speed and memory depend on shapes, not on what was learned.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .model_inputs import classes_with_inputs, model_inputs

# Of both models of CogVideoX 1.5.
_COGVIDEOX15 = dict(
    num_attention_heads=48,
    num_layers=42,
    use_rotary_positional_embeddings=True,
    patch_size_t=2,
    patch_bias=False,
    sample_height=300,
    sample_width=300,
    sample_frames=81,
)

# Arguments of the diffusers classes; what is not named is the class's default. Sources: the two of
# benchmarks/dit_shapes.py and Qwen-Image are published config.json files; "script": what diffusers'
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
    # Script.
    "pixart-alpha": (
        "PixArtTransformer2DModel",
        dict(
            num_attention_heads=16,
            attention_head_dim=72,
            out_channels=8,
            cross_attention_dim=1152,
            sample_size=128,
            patch_size=2,
            interpolation_scale=2,
            caption_channels=4096,
        ),
    ),
    # From memory; parameters agree with what its card says (2 billion).
    "sd3-medium": (
        "SD3Transformer2DModel",
        dict(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=192,
        ),
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
    # From the first and the last frame.
    "wan2.1-flf2v-14b": (
        "WanTransformer3DModel",
        dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120, pos_embed_seq_len=2 * 257),
    ),
    # One of the two transformers of each.
    "wan2.2-t2v-a14b": ("WanTransformer3DModel", {}),
    "wan2.2-i2v-a14b": ("WanTransformer3DModel", dict(in_channels=36)),
    "wan2.2-ti2v-5b": (
        "WanTransformer3DModel",
        dict(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48),
    ),
    "wan2.1-vace-1.3b": (
        "WanVACETransformer3DModel",
        dict(num_attention_heads=12, ffn_dim=8960, num_layers=30, vace_layers=[*range(0, 30, 2)]),
    ),
    "wan2.1-vace-14b": ("WanVACETransformer3DModel", {}),
    "wan2.2-animate-14b": ("WanAnimateTransformer3DModel", dict(added_kv_proj_dim=5120)),
    "hunyuan-video": ("HunyuanVideoTransformer3DModel", {}),
    "hunyuan-video-i2v": (
        "HunyuanVideoTransformer3DModel",
        dict(image_condition_type="token_replace"),
    ),
    "cogvideox-2b": ("CogVideoXTransformer3DModel", {}),
    "cogvideox-5b": (
        "CogVideoXTransformer3DModel",
        dict(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True),
    ),
    "cogvideox1.5-5b": ("CogVideoXTransformer3DModel", _COGVIDEOX15),
    "cogvideox1.5-5b-i2v": (
        "CogVideoXTransformer3DModel",
        dict(_COGVIDEOX15, in_channels=32, ofs_embed_dim=512),
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
    "sana1.5-4.8b": (
        "SanaTransformer2DModel",
        dict(num_layers=60, qk_norm="rms_norm_across_heads"),
    ),
    "sana-sprint-1.6b": (
        "SanaTransformer2DModel",
        dict(guidance_embeds=True, qk_norm="rms_norm_across_heads"),
    ),
    # A published config.json.
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

# Small models of the same classes, for tests and to try a command before it takes minutes.
TINY_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-flux": (
        "FluxTransformer2DModel",
        dict(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        ),
    ),
    "tiny-pixart": (
        "PixArtTransformer2DModel",
        dict(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=3,
            out_channels=3,
            num_layers=2,
            cross_attention_dim=128,
            sample_size=32,
            patch_size=8,
            norm_type="ada_norm_single",
            interpolation_scale=1,
            use_additional_conditions=False,
            caption_channels=64,
        ),
    ),
}

# ---- models -------------------------------------------------------------------------------------


def model_config(name: str) -> tuple[Any, dict[str, Any]]:
    """(class of diffusers, all of its arguments) of a name of MODEL_CONFIGS or TINY_CONFIGS.
    Raises ValueError for another name."""
    import diffusers

    known = {**MODEL_CONFIGS, **TINY_CONFIGS}
    if name not in known:
        raise ValueError(f"model must be one of {sorted(known)}, got {name!r}")
    class_name, changes = known[name]
    model_class = getattr(diffusers, class_name)
    parameters = inspect.signature(model_class.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return model_class, {**defaults, **changes}


def make_model(
    name: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> nn.Module:
    """The transformer `name` with random weights, the same for one seed, made on `device`."""
    model_class, config = model_config(name)
    default = torch.get_default_dtype()
    device = torch.device(device)
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices), torch.device(device):
            torch.manual_seed(seed)
            model = model_class(**config)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


# ---- inputs -------------------------------------------------------------------------------------


def named_inputs(name: str, **options: Any) -> dict[str, Any]:
    """model_inputs of a name of MODEL_CONFIGS or TINY_CONFIGS."""
    model_class, config = model_config(name)
    return model_inputs(model_class.__name__, config, **options)


def names_with_inputs() -> list[str]:
    known, classes = {**MODEL_CONFIGS, **TINY_CONFIGS}, classes_with_inputs()
    return [name for name, (class_name, _) in known.items() if class_name in classes]
