"""Random arguments of one forward of a diffusion transformer, shaped as its pipeline passes them.

For benchmarks and `lrq profile`: for speed and memory shapes matter, values do not. Numbers of text
tokens and of frames are defaults of diffusers' pipelines; a text is as long as they allow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Config = Mapping[str, Any]


class Shape(NamedTuple):
    """height = width = side of the latents; randn(*shape): fp32 normal values."""

    side: int
    batch: int
    randn: Callable[..., Tensor]

    def times(self, value: float) -> Tensor:
        """[B], the same for all samples."""
        return torch.full((self.batch,), value)


class Maker(NamedTuple):
    """make(config, shape) gives the arguments; pixels(config) along a side of one latent value;
    patch(config): latent values along a side of one token."""

    make: Callable[[Config, Shape], dict[str, Any]]
    pixels: Callable[[Config], int] = lambda config: 8
    patch: Callable[[Config], int] = lambda config: config["patch_size"]


def model_inputs(
    class_name: str,
    config: Config,
    *,
    size: int = 1024,
    batch: int = 1,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments of one forward at `size` x `size` pixels, as the class's pipeline passes
    them, the same for one seed. config: all arguments of the class, as in model.config. Floating
    point tensors, also within lists, are of `dtype`.

    Raises ValueError for a class without inputs here and for a size that does not fit it.
    """
    if class_name not in _MAKERS:
        raise ValueError(f"no inputs are known for {class_name}, only for {sorted(_MAKERS)}")
    maker = _MAKERS[class_name]
    pixels = maker.pixels(config)
    step = pixels * maker.patch(config)
    if size <= 0 or size % step:
        raise ValueError(f"size must be a multiple of {step} pixels, got {size}")
    if batch < 1:
        raise ValueError(f"batch must be positive, got {batch}")
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    return tree_map(moved, maker.make(config, Shape(size // pixels, batch, randn)))


def classes_with_inputs() -> list[str]:
    return sorted(_MAKERS)


# ---- pictures -----------------------------------------------------------------------------------

FLUX_TEXT_TOKENS, PIXART_TEXT_TOKENS, SD3_TEXT_TOKENS = 512, 300, 333


def _grid_ids(side: int, width: int) -> Tensor:
    """[side^2, width]: row and column at places 1 and 2, zero elsewhere."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.zeros(side, side, width)
    ids[..., 1], ids[..., 2] = rows, columns
    return ids.view(-1, width)


def _flux(config: Config, shape: Shape) -> dict[str, Any]:
    """FLUX packs 2 x 2 latent values into a token, its patch_size of 1 notwithstanding."""
    side = shape.side // 2
    text = (shape.batch, FLUX_TEXT_TOKENS, config["joint_attention_dim"])
    return {
        "hidden_states": shape.randn(shape.batch, side**2, config["in_channels"]),
        "encoder_hidden_states": shape.randn(*text),
        "pooled_projections": shape.randn(shape.batch, config["pooled_projection_dim"]),
        "timestep": shape.times(0.5),
        "guidance": shape.times(3.5) if config["guidance_embeds"] else None,
        "img_ids": _grid_ids(side, 3),
        "txt_ids": torch.zeros(FLUX_TEXT_TOKENS, 3),
    }


def _flux2(config: Config, shape: Shape) -> dict[str, Any]:
    """Ids of time, row, column and place in the text."""
    side = shape.side // 2
    txt_ids = torch.zeros(FLUX_TEXT_TOKENS, 4)
    txt_ids[:, 3] = torch.arange(FLUX_TEXT_TOKENS)
    text = (shape.batch, FLUX_TEXT_TOKENS, config["joint_attention_dim"])
    return {
        "hidden_states": shape.randn(shape.batch, side**2, config["in_channels"]),
        "encoder_hidden_states": shape.randn(*text),
        "timestep": shape.times(0.5),
        "guidance": shape.times(4.0) if config["guidance_embeds"] else None,
        "img_ids": _grid_ids(side, 4),
        "txt_ids": txt_ids,
    }


def _chroma(config: Config, shape: Shape) -> dict[str, Any]:
    side = shape.side // 2
    text = (shape.batch, FLUX_TEXT_TOKENS, config["joint_attention_dim"])
    return {
        "hidden_states": shape.randn(shape.batch, side**2, config["in_channels"]),
        "encoder_hidden_states": shape.randn(*text),
        "timestep": shape.times(0.5),
        "img_ids": _grid_ids(side, 3),
        "txt_ids": torch.zeros(FLUX_TEXT_TOKENS, 3),
        "attention_mask": torch.ones(shape.batch, FLUX_TEXT_TOKENS + side**2),
    }


def _pixart(config: Config, shape: Shape) -> dict[str, Any]:
    text = (shape.batch, PIXART_TEXT_TOKENS, config["caption_channels"])
    # PixArt-alpha at 1024 pixels is told the size, as its pipeline does.
    is_told = config["use_additional_conditions"]
    size = None
    if is_told or (is_told is None and config["sample_size"] == 128):
        size = torch.full((shape.batch, 2), 8.0 * shape.side)
    return {
        "hidden_states": shape.randn(shape.batch, config["in_channels"], shape.side, shape.side),
        "encoder_hidden_states": shape.randn(*text),
        "encoder_attention_mask": torch.ones(shape.batch, PIXART_TEXT_TOKENS),
        "timestep": shape.times(500.0),
        "added_cond_kwargs": {
            "resolution": size,
            "aspect_ratio": None if size is None else torch.ones(shape.batch, 1),
        },
    }


def _sd3(config: Config, shape: Shape) -> dict[str, Any]:
    """Text: 77 tokens of CLIP and 256 of T5."""
    text = (shape.batch, SD3_TEXT_TOKENS, config["joint_attention_dim"])
    return {
        "hidden_states": shape.randn(shape.batch, config["in_channels"], shape.side, shape.side),
        "encoder_hidden_states": shape.randn(*text),
        "pooled_projections": shape.randn(shape.batch, config["pooled_projection_dim"]),
        "timestep": shape.times(500.0),
    }


def _qwen_image(config: Config, shape: Shape) -> dict[str, Any]:
    """Packed as FLUX; img_shapes: frames, rows and columns of tokens of each picture."""
    side, tokens = shape.side // 2, 512
    return {
        "hidden_states": shape.randn(shape.batch, side**2, config["in_channels"]),
        "encoder_hidden_states": shape.randn(shape.batch, tokens, config["joint_attention_dim"]),
        "encoder_hidden_states_mask": torch.ones(shape.batch, tokens, dtype=torch.long),
        "timestep": shape.times(0.5),
        "guidance": shape.times(3.5) if config["guidance_embeds"] else None,
        "img_shapes": [[(1, side, side)]] * shape.batch,
    }


def _z_image(config: Config, shape: Shape) -> dict[str, Any]:
    """A list of pictures [C, 1, H, W] and one of texts [S, C], which precede them: both have
    places among axes_lens."""
    picture = (config["in_channels"], 1, shape.side, shape.side)
    tokens = min(512, config["axes_lens"][0] - 64)
    return {
        "x": [shape.randn(*picture) for _ in range(shape.batch)],
        "t": shape.times(0.5),
        "cap_feats": [shape.randn(tokens, config["cap_feat_dim"]) for _ in range(shape.batch)],
    }


def _sana(config: Config, shape: Shape) -> dict[str, Any]:
    tokens = 300
    return {
        "hidden_states": shape.randn(shape.batch, config["in_channels"], shape.side, shape.side),
        "encoder_hidden_states": shape.randn(shape.batch, tokens, config["caption_channels"]),
        "encoder_attention_mask": torch.ones(shape.batch, tokens),
        "timestep": shape.times(500.0),
        "guidance": shape.times(0.45) if config["guidance_embeds"] else None,
    }


def _lumina2(config: Config, shape: Shape) -> dict[str, Any]:
    tokens = min(256, config["axes_lens"][0] - 1)
    return {
        "hidden_states": shape.randn(shape.batch, config["in_channels"], shape.side, shape.side),
        "encoder_hidden_states": shape.randn(shape.batch, tokens, config["cap_feat_dim"]),
        "encoder_attention_mask": torch.ones(shape.batch, tokens, dtype=torch.bool),
        "timestep": shape.times(0.5),
    }


def _hidream(config: Config, shape: Shape) -> dict[str, Any]:
    """llama3: hidden states of all its layers, of which llama_layers names those that are read."""
    tokens, (t5, llama3) = 128, config["caption_channels"]
    layers = max(config["llama_layers"]) + 1
    return {
        "hidden_states": shape.randn(shape.batch, config["in_channels"], shape.side, shape.side),
        "timesteps": shape.times(500.0),
        "encoder_hidden_states_t5": shape.randn(shape.batch, tokens, t5),
        "encoder_hidden_states_llama3": shape.randn(layers, shape.batch, tokens, llama3),
        "pooled_embeds": shape.randn(shape.batch, config["text_emb_dim"]),
    }


# ---- videos -------------------------------------------------------------------------------------


def _latent_frames(frames: int, compression: int) -> int:
    """The first frame is on its own."""
    return (frames - 1) // compression + 1


def _wan(config: Config, shape: Shape) -> dict[str, Any]:
    """81 frames, compressed 4 times; 512 tokens of text, 257 of a picture to start from."""
    video = (config["in_channels"], _latent_frames(81, 4), shape.side, shape.side)
    picture = None
    if config["image_dim"] is not None:
        picture = shape.randn(shape.batch, 257, config["image_dim"])
    return {
        "hidden_states": shape.randn(shape.batch, *video),
        "encoder_hidden_states": shape.randn(shape.batch, 512, config["text_dim"]),
        "encoder_hidden_states_image": picture,
        "timestep": shape.times(500.0),
    }


def _hunyuan_video(config: Config, shape: Shape) -> dict[str, Any]:
    """129 frames, compressed 4 times."""
    video = (config["in_channels"], _latent_frames(129, 4), shape.side, shape.side)
    return {
        "hidden_states": shape.randn(shape.batch, *video),
        "encoder_hidden_states": shape.randn(shape.batch, 256, config["text_embed_dim"]),
        "encoder_attention_mask": torch.ones(shape.batch, 256),
        "pooled_projections": shape.randn(shape.batch, config["pooled_projection_dim"]),
        "timestep": shape.times(500.0),
        "guidance": shape.times(6000.0) if config["guidance_embeds"] else None,
    }


def _cogvideox(config: Config, shape: Shape) -> dict[str, Any]:
    """As many frames as the class is made for, compressed 4 times."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames = _latent_frames(config["sample_frames"], config["temporal_compression_ratio"])
    if config["patch_size_t"] is not None:
        frames += -frames % config["patch_size_t"]
    side, tokens = shape.side // config["patch_size"], config["max_text_seq_length"]
    rotary = None
    if config["use_rotary_positional_embeddings"]:
        rotary = get_3d_rotary_pos_embed(
            embed_dim=config["attention_head_dim"],
            crops_coords=((0, 0), (side, side)),
            grid_size=(side, side),
            temporal_size=frames // (config["patch_size_t"] or 1),
        )
    video = (frames, config["in_channels"], shape.side, shape.side)
    return {
        "hidden_states": shape.randn(shape.batch, *video),
        "encoder_hidden_states": shape.randn(shape.batch, tokens, config["text_embed_dim"]),
        "timestep": torch.full((shape.batch,), 500),
        "image_rotary_emb": rotary,
    }


def _ltx_video(config: Config, shape: Shape) -> dict[str, Any]:
    """161 frames at 25 a second, compressed 8 times; a token is a latent value of all channels."""
    frames = _latent_frames(161, 8)
    tokens = frames * shape.side**2
    return {
        "hidden_states": shape.randn(shape.batch, tokens, config["in_channels"]),
        "encoder_hidden_states": shape.randn(shape.batch, 128, config["caption_channels"]),
        "encoder_attention_mask": torch.ones(shape.batch, 128),
        "timestep": shape.times(500.0),
        "num_frames": frames,
        "height": shape.side,
        "width": shape.side,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _two(config: Config) -> int:
    return 2


def _thirty_two(config: Config) -> int:
    return 32


_MAKERS: dict[str, Maker] = {
    "FluxTransformer2DModel": Maker(_flux, patch=_two),
    "Flux2Transformer2DModel": Maker(_flux2, patch=_two),
    "ChromaTransformer2DModel": Maker(_chroma, patch=_two),
    "PixArtTransformer2DModel": Maker(_pixart),
    "SD3Transformer2DModel": Maker(_sd3),
    "QwenImageTransformer2DModel": Maker(_qwen_image, patch=_two),
    "ZImageTransformer2DModel": Maker(_z_image, patch=lambda config: config["all_patch_size"][0]),
    "SanaTransformer2DModel": Maker(_sana, pixels=_thirty_two),
    "Lumina2Transformer2DModel": Maker(_lumina2),
    "HiDreamImageTransformer2DModel": Maker(_hidream),
    # The VAE of Wan 2.2's small model, of 48 channels, compresses twice as much.
    "WanTransformer3DModel": Maker(
        _wan,
        pixels=lambda config: 16 if config["in_channels"] == 48 else 8,
        patch=lambda config: config["patch_size"][-1],
    ),
    "HunyuanVideoTransformer3DModel": Maker(_hunyuan_video),
    "CogVideoXTransformer3DModel": Maker(_cogvideox),
    "LTXVideoTransformer3DModel": Maker(_ltx_video, pixels=_thirty_two),
}
