"""Tiny random instances of real diffusers classes, and inputs that fit them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
)

from lrq_quant.demo.pipeline import ShapesPipeline
from lrq_quant.demo.text import CaptionEncoder


def tiny_pixart() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
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
    ).eval()


def tiny_flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
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
    ).eval()


def flux_inputs(dtype: torch.dtype) -> dict:
    return {
        "hidden_states": torch.randn(1, 9, 16, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 5, 64, dtype=dtype),
        "pooled_projections": torch.randn(1, 32, dtype=dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "guidance": torch.tensor([3.5], dtype=dtype),
        "img_ids": torch.randint(0, 3, (9, 3)).to(dtype),
        "txt_ids": torch.zeros(5, 3, dtype=dtype),
        "return_dict": False,
    }


def pixart_inputs(dtype: torch.dtype) -> dict:
    return {
        "hidden_states": torch.randn(2, 3, 32, 32, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, 7, 64, dtype=dtype),
        "encoder_attention_mask": torch.tensor([[1.0] * 7, [1.0] * 4 + [0.0] * 3], dtype=dtype),
        "timestep": torch.tensor([500.0, 500.0]),
        "return_dict": False,
    }


def tiny_pipeline() -> ShapesPipeline:
    encoder = CaptionEncoder(embed_dim=64)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    return ShapesPipeline(tiny_pixart(), encoder, scheduler)


# Name -> (model, its inputs in a dtype).
TINY: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[torch.dtype], dict]]] = {
    "pixart": (tiny_pixart, pixart_inputs),
    "flux": (tiny_flux, flux_inputs),
}
