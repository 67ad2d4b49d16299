"""Tiny random instances of every family's diffusers class, and inputs of one forward that fit them.

Blocks are 64 or 128 wide and every optional part that has linears is on.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import pytest
import torch
from tiny_models import flux_inputs, of_the_run, pixart_inputs, tiny_flux, tiny_pixart
from torch import nn

from lrq_quant import QuantizedModel, QuantRecipe, older_diffusers, quantize_model


@dataclass(frozen=True)
class Tiny:
    """make() builds the model, inputs() the keyword arguments of one forward; linears and
    groups: how many the family's recipe quantizes, and in how many inputs."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    linears: int
    groups: int


def _rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def build(name: str, **config: Any) -> nn.Module:
    """A model of a class of diffusers. Skips the test where an older diffusers lacks the class or
    an argument of it."""
    if older_diffusers.needed():
        cls = getattr(diffusers, name, None)
        known = {} if cls is None else inspect.signature(cls).parameters
        if (
            lacks := [name]
            if cls is None
            else [f"{name}({key})" for key in config if key not in known]
        ):
            pytest.skip(f"diffusers {diffusers.__version__} lacks {', '.join(lacks)}")
    return getattr(diffusers, name)(**config).eval()


def _make(name: str, **config: Any) -> Callable[[], nn.Module]:
    return lambda: build(name, **config)


def _flux_ids() -> dict[str, torch.Tensor]:
    return {"img_ids": torch.randint(0, 3, (9, 3)).float(), "txt_ids": torch.zeros(5, 3)}


def _flux2_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _rand(2, 9, 16),
        "encoder_hidden_states": _rand(2, 5, 96),
        "timestep": torch.tensor([0.3, 0.8]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": torch.randint(0, 3, (9, 4)).float(),
        "txt_ids": torch.zeros(5, 4),
    }


def _chroma_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _rand(1, 9, 16),
        "encoder_hidden_states": _rand(1, 5, 96),
        "timestep": torch.tensor([0.5]),
        **_flux_ids(),
    }


def _sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _rand(2, 4, 8, 8),
        "encoder_hidden_states": _rand(2, 5, 96),
        "pooled_projections": _rand(2, 32),
        "timestep": torch.tensor([500.0, 500.0]),
    }


def _wan_inputs() -> dict[str, Any]:
    # The attention takes the last 512 tokens for the text, all before for the picture.
    return {
        "hidden_states": _rand(1, 4, 1, 8, 8),
        "encoder_hidden_states": _rand(1, 512, 96),
        "encoder_hidden_states_image": _rand(1, 6, 48),
        "timestep": torch.tensor([500.0]),
    }


def _wan_vace_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _rand(1, 4, 2, 8, 8),
        "encoder_hidden_states": _rand(1, 7, 96),
        "timestep": torch.tensor([500.0]),
        "control_hidden_states": _rand(1, 6, 2, 8, 8),
        "control_hidden_states_scale": torch.tensor([1.0, 0.5]),
    }


def _wan_animate_inputs() -> dict[str, Any]:
    # Frames of the face: 1 + 4 for each frame of the pose after the first, which has a reference
    # in front.
    return _wan_inputs() | {
        "hidden_states": _rand(1, 12, 3, 8, 8),
        "pose_hidden_states": _rand(1, 4, 2, 8, 8),
        "face_pixel_values": _rand(1, 3, 5, 16, 16),
    }


def _hunyuan_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _rand(1, 4, 2, 8, 8),
        "encoder_hidden_states": _rand(1, 5, 96),
        "encoder_attention_mask": torch.ones(1, 5),
        "pooled_projections": _rand(1, 32),
        "timestep": torch.tensor([500.0]),
        "guidance": torch.tensor([6000.0]),
    }


def _cogvideox_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _rand(1, 3, 4, 8, 8),
        "encoder_hidden_states": _rand(1, 8, 96),
        "timestep": torch.tensor([500]),
    }


def _ltx_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _rand(1, 12, 16),
        "encoder_hidden_states": _rand(1, 5, 96),
        "encoder_attention_mask": torch.ones(1, 5),
        "timestep": torch.tensor([500.0]),
        "num_frames": 3,
        "height": 2,
        "width": 2,
    }


def _qwen_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _rand(1, 9, 16),
        "encoder_hidden_states": _rand(1, 5, 96),
        "encoder_hidden_states_mask": torch.ones(1, 5),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 3, 3)]],
        **older_diffusers.qwen_image_lengths(1, 5),
    }


def _z_image_inputs() -> dict[str, Any]:
    return {"x": [_rand(4, 1, 8, 8)], "t": torch.tensor([0.5]), "cap_feats": [_rand(7, 96)]}


def _z_image_omni_inputs() -> dict[str, Any]:
    return {
        "x": [[_rand(16, 1, 8, 8), _rand(16, 1, 8, 8)]],
        "t": torch.tensor([0.5]),
        "cap_feats": [[_rand(7, 96), _rand(7, 96)]],
        "siglip_feats": [[_rand(2, 2, 48), None]],
        "image_noise_mask": [[0, 1]],
    }


def _sana_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _rand(2, 4, 6, 6),
        "encoder_hidden_states": _rand(2, 5, 48),
        "timestep": torch.tensor([500.0, 500.0]),
        "guidance": torch.tensor([4.5, 4.5]),
    }


def _lumina2_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _rand(1, 4, 8, 8),
        "encoder_hidden_states": _rand(1, 5, 48),
        "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
        "timestep": torch.tensor([0.5]),
    }


def _hidream_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _rand(1, 4, 16, 16),
        "encoder_hidden_states_t5": _rand(1, 5, 48),
        "encoder_hidden_states_llama3": _rand(3, 1, 5, 96),
        "pooled_embeds": _rand(1, 32),
        "timesteps": torch.tensor([500.0]),
    }


_Z_IMAGE = {
    "in_channels": 4,
    "dim": 96,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 96,
    "axes_dims": [8, 12, 12],
    "axes_lens": [256, 32, 32],
}

TINY_FAMILIES: dict[str, Tiny] = {
    "pixart": Tiny(tiny_pixart, lambda: pixart_inputs(torch.float32), 21, 15),
    "flux": Tiny(tiny_flux, lambda: flux_inputs(torch.float32), 40, 26),
    "flux2": Tiny(
        _make(
            "Flux2Transformer2DModel",
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=96,
            axes_dims_rope=(8, 8, 8, 8),
        ),
        _flux2_inputs,
        31,
        23,
    ),
    "chroma": Tiny(
        _make(
            "ChromaTransformer2DModel",
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=96,
            axes_dims_rope=(8, 12, 12),
            approximator_num_channels=16,
            approximator_hidden_dim=64,
            approximator_layers=2,
        ),
        _chroma_inputs,
        26,
        16,
    ),
    "sd3.5": Tiny(
        _make(
            "SD3Transformer2DModel",
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=96,
            caption_projection_dim=128,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        _sd3_inputs,
        43,
        29,
    ),
    "wan": Tiny(
        _make(
            "WanTransformer3DModel",
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            text_dim=96,
            freq_dim=64,
            ffn_dim=256,
            num_layers=2,
            image_dim=48,
            added_kv_proj_dim=128,
            rope_max_seq_len=32,
        ),
        _wan_inputs,
        25,
        17,
    ),
    "wan-vace": Tiny(
        _make(
            "WanVACETransformer3DModel",
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            text_dim=96,
            freq_dim=64,
            ffn_dim=256,
            num_layers=3,
            rope_max_seq_len=32,
            vace_layers=[0, 2],
            vace_in_channels=6,
        ),
        _wan_vace_inputs,
        54,
        39,
    ),
    "wan-animate": Tiny(
        _make(
            "WanAnimateTransformer3DModel",
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=12,
            latent_channels=4,
            out_channels=4,
            text_dim=96,
            freq_dim=64,
            ffn_dim=256,
            num_layers=2,
            image_dim=48,
            added_kv_proj_dim=128,
            rope_max_seq_len=32,
            motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=16,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        _wan_animate_inputs,
        29,
        20,
    ),
    "hunyuan-video": Tiny(
        _make(
            "HunyuanVideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=32,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=96,
            pooled_projection_dim=32,
            rope_axes_dim=(8, 12, 12),
        ),
        _hunyuan_inputs,
        33,
        23,
    ),
    "cogvideox": Tiny(
        _make(
            "CogVideoXTransformer3DModel",
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            time_embed_dim=64,
            text_embed_dim=96,
            num_layers=2,
            sample_width=8,
            sample_height=8,
            sample_frames=9,
            max_text_seq_length=8,
        ),
        _cogvideox_inputs,
        16,
        12,
    ),
    "ltx-video": Tiny(
        _make(
            "LTXVideoTransformer3DModel",
            in_channels=16,
            out_channels=16,
            num_attention_heads=4,
            attention_head_dim=32,
            cross_attention_dim=128,
            num_layers=2,
            caption_channels=96,
        ),
        _ltx_inputs,
        21,
        15,
    ),
    "qwen-image": Tiny(
        _make(
            "QwenImageTransformer2DModel",
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=96,
            axes_dims_rope=(8, 12, 12),
        ),
        _qwen_inputs,
        28,
        20,
    ),
    "z-image": Tiny(_make("ZImageTransformer2DModel", **_Z_IMAGE), _z_image_inputs, 31, 19),
    # Modulation runs twice a block, for noisy and clean tokens.
    "z-image-omni": Tiny(
        _make("ZImageTransformer2DModel", **_Z_IMAGE | {"in_channels": 16, "siglip_feat_dim": 48}),
        _z_image_omni_inputs,
        38,
        23,
    ),
    # 96 = 3 x 32 as in Sana's 2240 = 35 x 64: no block of 128.
    "sana": Tiny(
        _make(
            "SanaTransformer2DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=3,
            attention_head_dim=32,
            num_layers=2,
            num_cross_attention_heads=3,
            cross_attention_head_dim=32,
            cross_attention_dim=96,
            caption_channels=48,
            sample_size=6,
            guidance_embeds=True,
        ),
        _sana_inputs,
        17,
        11,
    ),
    "lumina2": Tiny(
        _make(
            "Lumina2Transformer2DModel",
            sample_size=8,
            in_channels=4,
            hidden_size=128,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=64,
            axes_dim_rope=(8, 12, 12),
            axes_lens=(64, 32, 32),
            cap_feat_dim=48,
        ),
        _lumina2_inputs,
        31,
        19,
    ),
    "hidream": Tiny(
        _make(
            "HiDreamImageTransformer2DModel",
            patch_size=2,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            caption_channels=[48, 96],
            text_emb_dim=32,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(16, 8, 8),
            max_resolution=(16, 16),
            llama_layers=[0, 1],
        ),
        _hidream_inputs,
        35,
        22,
    ),
}


def forward(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The output as one tensor."""
    with torch.no_grad():
        out = model(**{**inputs, "return_dict": False})[0]
    return torch.cat([item.flatten() for item in out]) if isinstance(out, list) else out


@functools.cache
def _quantized(family: str) -> tuple[nn.Module, QuantizedModel]:
    with of_the_run(family):
        model = TINY_FAMILIES[family].make()
        return model, quantize_model(model, QuantRecipe.from_name("w4a8"))


def quantized_family(family: str) -> tuple[nn.Module, QuantizedModel]:
    """An instance and what it quantizes to at W4A8, made once a process, since it takes a second:
    a copy of the model, and of the result the parts that may be replaced."""
    model, quantized = _quantized(family)
    return copy.deepcopy(model), replace(
        quantized, states=dict(quantized.states), dense=dict(quantized.dense)
    )
