"""Random arguments of one forward of a diffusion transformer, shaped as its pipeline passes them.

For benchmarks and `lrq profile`: for speed and memory shapes matter, values do not. Numbers of text
tokens and of frames are defaults of the pipelines of diffusers that each maker names; a text is as
long as they allow, and nothing is added for guidance: `batch` is the batch of the forward. Dtypes
are those of a pipeline whose model is in `dtype`; tests hold shapes and dtypes to the pipelines'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import older_diffusers

Config = Mapping[str, Any]


class Shape(NamedTuple):
    """size: pixels along a side; side: latent values along it; randn(*shape): normal values of
    `dtype`, the model's."""

    size: int
    side: int
    batch: int
    dtype: torch.dtype
    randn: Callable[..., Tensor]

    def times(self, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B], the same for all samples; in fp32, as schedulers give it."""
        return torch.full((self.batch,), value, dtype=dtype)

    def mask(self, tokens: int, dtype: torch.dtype = torch.long) -> Tensor:
        """[B, tokens], none masked; int64, as tokenizers give it."""
        return torch.ones(self.batch, tokens, dtype=dtype)


def _no_limit(config: Config) -> int | None:
    return None


class Maker(NamedTuple):
    """make(config, shape) gives the arguments; pixels(config) along a side of one latent value;
    patch(config): latent values along a side of one token; most(config): tokens along a side that
    the model has places for, None for any number."""

    make: Callable[[Config, Shape], dict[str, Any]]
    pixels: Callable[[Config], int] = lambda config: 8
    patch: Callable[[Config], int] = lambda config: config["patch_size"]
    most: Callable[[Config], int | None] = _no_limit


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
    them, the same for one seed: tensors, also within lists, tuples and dicts, and what else the
    class takes. config: all arguments of the class, as in model.config; dtype: of the model.

    Raises ValueError for a class without inputs here and for a size that does not fit it.
    """
    if class_name not in _MAKERS:
        raise ValueError(f"no inputs are known for {class_name}, only for {sorted(_MAKERS)}")
    maker = _MAKERS[class_name]
    pixels = maker.pixels(config)
    step, most = pixels * maker.patch(config), maker.most(config)
    if size <= 0 or size % step:
        raise ValueError(f"size must be a multiple of {step} pixels, got {size}")
    if most is not None and size > most * step:
        raise ValueError(f"size must be at most {most * step} pixels, got {size}")
    if batch < 1:
        raise ValueError(f"batch must be positive, got {batch}")
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        if torch.device(device).type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.randn(*shape, generator=generator).to(dtype)

    made = maker.make(config, Shape(size, size // pixels, batch, dtype, randn))
    moved: dict[str, Any] = tree_map_only(Tensor, lambda tensor: tensor.to(device), made)
    return moved


def classes_with_inputs() -> list[str]:
    return sorted(_MAKERS)


# ---- pictures -----------------------------------------------------------------------------------

# max_sequence_length of pipeline_flux.py, pipeline_flux2.py, pipeline_flux2_klein.py and
# pipeline_chroma.py; of pipeline_pixart_sigma.py and pipeline_pixart_alpha.py; of
# pipeline_stable_diffusion_3.py, after 77 tokens of CLIP.
FLUX_TEXT_TOKENS = 512
PIXART_TEXT_TOKENS, PIXART_ALPHA_TEXT_TOKENS = 300, 120
SD3_TEXT_TOKENS = 77 + 256


def _grid_ids(side: int, width: int, dtype: torch.dtype) -> Tensor:
    """[side^2, width]: row and column at places 1 and 2, zero elsewhere."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.zeros(side, side, width, dtype=dtype)
    ids[..., 1], ids[..., 2] = rows, columns
    return ids.view(-1, width)


def _packed(config: Config, shape: Shape, text_tokens: int) -> dict[str, Any]:
    """What FLUX.1 and those that follow it take: 2 x 2 latent values of a VAE of 8 pixels in a
    token, a patch_size of 1 notwithstanding, and the text beside them."""
    tokens, text = (shape.side // 2) ** 2, (text_tokens, config["joint_attention_dim"])
    return {
        "hidden_states": shape.randn(shape.batch, tokens, config["in_channels"]),
        "encoder_hidden_states": shape.randn(shape.batch, *text),
        "timestep": shape.times(0.5, shape.dtype),
    }


def _flux(config: Config, shape: Shape) -> dict[str, Any]:
    """pipeline_flux.py; guidance_scale 3.5."""
    return {
        **_packed(config, shape, FLUX_TEXT_TOKENS),
        "pooled_projections": shape.randn(shape.batch, config["pooled_projection_dim"]),
        "guidance": shape.times(3.5) if config["guidance_embeds"] else None,
        "img_ids": _grid_ids(shape.side // 2, 3, shape.dtype),
        "txt_ids": torch.zeros(FLUX_TEXT_TOKENS, 3, dtype=shape.dtype),
    }


def _flux2(config: Config, shape: Shape) -> dict[str, Any]:
    """pipeline_flux2.py, and pipeline_flux2_klein.py without guidance; packed as FLUX.1. Ids
    [B, S, 4] of time, row, column and place in the text; guidance_scale 4."""
    txt_ids = torch.zeros(FLUX_TEXT_TOKENS, 4, dtype=torch.long)
    txt_ids[:, 3] = torch.arange(FLUX_TEXT_TOKENS)
    return {
        **_packed(config, shape, FLUX_TEXT_TOKENS),
        "guidance": shape.times(4.0) if config.get("guidance_embeds", True) else None,
        "img_ids": _grid_ids(shape.side // 2, 4, torch.long).repeat(shape.batch, 1, 1),
        "txt_ids": txt_ids.repeat(shape.batch, 1, 1),
    }


def _chroma(config: Config, shape: Shape) -> dict[str, Any]:
    """pipeline_chroma.py; packed as FLUX.1. The mask of text and picture has the dtype of the text
    encoder, and the model multiplies it with itself."""
    tokens = FLUX_TEXT_TOKENS + (shape.side // 2) ** 2
    return {
        **_packed(config, shape, FLUX_TEXT_TOKENS),
        "img_ids": _grid_ids(shape.side // 2, 3, shape.dtype),
        "txt_ids": torch.zeros(FLUX_TEXT_TOKENS, 3, dtype=shape.dtype),
        "attention_mask": shape.mask(tokens, shape.dtype),
    }


def _pixart(config: Config, shape: Shape) -> dict[str, Any]:
    """pipeline_pixart_sigma.py; pipeline_pixart_alpha.py for a model that is told the size, as
    PixArt-alpha at 1024 pixels is. Of a smaller one the configuration is that of a Sigma."""
    is_told = config["use_additional_conditions"]
    if is_told is None:
        is_told = config["sample_size"] == 128  # as the class decides
    tokens = PIXART_ALPHA_TEXT_TOKENS if is_told else PIXART_TEXT_TOKENS
    resolution = aspect_ratio = None
    if is_told:
        resolution = torch.full((shape.batch, 2), float(shape.size), dtype=shape.dtype)
        aspect_ratio = torch.ones(shape.batch, 1, dtype=shape.dtype)
    return {
        "hidden_states": shape.randn(shape.batch, config["in_channels"], shape.side, shape.side),
        "encoder_hidden_states": shape.randn(shape.batch, tokens, config["caption_channels"]),
        "encoder_attention_mask": shape.mask(tokens),
        "timestep": shape.times(500, torch.long),
        "added_cond_kwargs": {"resolution": resolution, "aspect_ratio": aspect_ratio},
    }


def _sd3(config: Config, shape: Shape) -> dict[str, Any]:
    """pipeline_stable_diffusion_3.py."""
    text = (shape.batch, SD3_TEXT_TOKENS, config["joint_attention_dim"])
    return {
        "hidden_states": shape.randn(shape.batch, config["in_channels"], shape.side, shape.side),
        "encoder_hidden_states": shape.randn(*text),
        "pooled_projections": shape.randn(shape.batch, config["pooled_projection_dim"]),
        "timestep": shape.times(500.0),
    }


def _qwen_image(config: Config, shape: Shape) -> dict[str, Any]:
    """pipeline_qwenimage.py: max_sequence_length 512; packed as FLUX.1. img_shapes: frames, rows
    and columns of tokens of each picture. Texts of one length have no mask there: with one,
    attention would take a slower way."""
    side = shape.side // 2
    return {
        **_packed(config, shape, 512),
        "encoder_hidden_states_mask": None,
        "guidance": shape.times(3.5) if config["guidance_embeds"] else None,
        "img_shapes": [[(1, side, side)]] * shape.batch,
        **older_diffusers.qwen_image_lengths(shape.batch, 512),
    }


def _z_image(config: Config, shape: Shape) -> dict[str, Any]:
    """pipeline_z_image.py: max_sequence_length 512. A list of pictures [C, 1, H, W] and one of
    texts [S, C], which precede them: both have places among axes_lens, which leave less in tiny
    models. A model that reads pictures too (siglip_feat_dim) gets none."""
    picture = (config["in_channels"], 1, shape.side, shape.side)
    tokens = min(512, config["axes_lens"][0] - 64)
    return {
        "x": [shape.randn(*picture) for _ in range(shape.batch)],
        "t": shape.times(0.5),
        "cap_feats": [shape.randn(tokens, config["cap_feat_dim"]) for _ in range(shape.batch)],
    }


def _sana(config: Config, shape: Shape) -> dict[str, Any]:
    """pipeline_sana.py and, with guidance, pipeline_sana_sprint.py: max_sequence_length 300; a VAE
    of 32 pixels. guidance_scale 4.5 times guidance_embeds_scale."""
    tokens, guidance = 300, None
    if config["guidance_embeds"]:
        guidance = shape.times(4.5 * config["guidance_embeds_scale"], shape.dtype)
    return {
        "hidden_states": shape.randn(shape.batch, config["in_channels"], shape.side, shape.side),
        "encoder_hidden_states": shape.randn(shape.batch, tokens, config["caption_channels"]),
        "encoder_attention_mask": shape.mask(tokens),
        "timestep": shape.times(500.0),
        "guidance": guidance,
    }


def _lumina2(config: Config, shape: Shape) -> dict[str, Any]:
    """pipeline_lumina2.py: max_sequence_length 256, less where axes_lens leave less, as in tiny
    models."""
    tokens = min(256, config["axes_lens"][0] - 1)
    return {
        "hidden_states": shape.randn(shape.batch, config["in_channels"], shape.side, shape.side),
        "encoder_hidden_states": shape.randn(shape.batch, tokens, config["cap_feat_dim"]),
        "encoder_attention_mask": shape.mask(tokens),
        "timestep": shape.times(0.5),
    }


def _hidream(config: Config, shape: Shape) -> dict[str, Any]:
    """pipeline_hidream_image.py: max_sequence_length 128. llama3: hidden states of all its layers,
    of which llama_layers names those that are read. The pipeline scales any size to the area of
    1024 x 1024 pixels; here the size is as asked for, which the model takes too."""
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


# The VAE of Wan 2.2's small model, which has 48 channels.
_WAN22_VAE_CHANNELS = 48
_CLIP_TOKENS = 257  # of ViT-H at 224 pixels: 16 x 16 patches and the class


def _wan(config: Config, shape: Shape) -> dict[str, Any]:
    """pipeline_wan.py and, with a picture to start from, pipeline_wan_i2v.py: num_frames 81,
    compressed 4 times, max_sequence_length 512.

    Wan 2.2's small model is told the time of each token: [B, tokens] (expand_timesteps of its
    pipeline). One with places of pictures reads the first and the last: two for each sample."""
    frames = _latent_frames(81, 4)
    timestep = shape.times(500.0)
    if config["in_channels"] == _WAN22_VAE_CHANNELS:
        _, height, width = config["patch_size"]
        tokens = frames * (shape.side // height) * (shape.side // width)
        timestep = torch.full((shape.batch, tokens), 500.0)
    picture = None
    if config["image_dim"] is not None:
        pictures = 1 if config["pos_embed_seq_len"] is None else 2
        picture = shape.randn(pictures * shape.batch, _CLIP_TOKENS, config["image_dim"])
    video = (config["in_channels"], frames, shape.side, shape.side)
    return {
        "hidden_states": shape.randn(shape.batch, *video),
        "encoder_hidden_states": shape.randn(shape.batch, 512, config["text_dim"]),
        "encoder_hidden_states_image": picture,
        "timestep": timestep,
    }


def _wan_vace(config: Config, shape: Shape) -> dict[str, Any]:
    """pipeline_wan_vace.py: beside those of Wan the latents and masks of the video that controls,
    vace_in_channels of them, and conditioning_scale 1 for each of vace_layers."""
    inputs = _wan(config, shape)
    _, _, *grid = inputs["hidden_states"].shape
    scale = torch.ones(len(config["vace_layers"]), dtype=shape.dtype)
    return {
        **inputs,
        "control_hidden_states": shape.randn(shape.batch, config["vace_in_channels"], *grid),
        "control_hidden_states_scale": scale,
    }


def _wan_animate(config: Config, shape: Shape) -> dict[str, Any]:
    """pipeline_wan_animate.py: segment_frame_length 77, compressed 4 times, of which the pose has
    as many frames and the noise one more, a reference in front; the face in pixels, a square of
    motion_encoder_size."""
    frames, side = _latent_frames(77, 4), config["motion_encoder_size"]
    video = (frames, shape.side, shape.side)
    reference = (config["in_channels"], frames + 1, shape.side, shape.side)
    return {
        "hidden_states": shape.randn(shape.batch, *reference),
        "encoder_hidden_states": shape.randn(shape.batch, 512, config["text_dim"]),
        "encoder_hidden_states_image": shape.randn(shape.batch, _CLIP_TOKENS, config["image_dim"]),
        "timestep": shape.times(500.0),
        "pose_hidden_states": shape.randn(shape.batch, config["latent_channels"], *video),
        "face_pixel_values": shape.randn(shape.batch, 3, 77, side, side),
    }


# image_embed_interleave of pipeline_hunyuan_video_image2video.py by image_condition_type.
_HUNYUAN_INTERLEAVE = {"latent_concat": 2, "token_replace": 4}


def _hunyuan_video(config: Config, shape: Shape) -> dict[str, Any]:
    """pipeline_hunyuan_video.py: num_frames 129, compressed 4 times, max_sequence_length 256,
    guidance_scale 6 times 1000. For a model with an image_condition_type as
    pipeline_hunyuan_video_image2video.py: before the text every second or fourth of the
    image_emb_len 576 tokens of the picture that it starts from."""
    video = (config["in_channels"], _latent_frames(129, 4), shape.side, shape.side)
    tokens = 256
    if config["image_condition_type"] is not None:
        tokens += 576 // _HUNYUAN_INTERLEAVE[config["image_condition_type"]]
    return {
        "hidden_states": shape.randn(shape.batch, *video),
        "encoder_hidden_states": shape.randn(shape.batch, tokens, config["text_embed_dim"]),
        "encoder_attention_mask": shape.mask(tokens, shape.dtype),
        "pooled_projections": shape.randn(shape.batch, config["pooled_projection_dim"]),
        "timestep": shape.times(500.0),
        "guidance": shape.times(6000.0, shape.dtype) if config["guidance_embeds"] else None,
    }


def _cogvideox(config: Config, shape: Shape) -> dict[str, Any]:
    """pipeline_cogvideox.py, and pipeline_cogvideox_image2video.py for ofs: as many frames as the
    class is made for (sample_frames), compressed temporal_compression_ratio times and padded to
    patch_size_t; max_text_seq_length tokens, which is max_sequence_length."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    made_for = (config["sample_height"], config["sample_width"])
    if config["use_learned_positional_embeddings"] and made_for != (shape.side, shape.side):
        height, width = (8 * side for side in made_for)
        raise ValueError(
            f"size must be {width} x {height} pixels, of which this model learned the places, "
            f"got {shape.size} x {shape.size}"
        )
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
        "timestep": shape.times(500, torch.long),
        "image_rotary_emb": rotary,
        "ofs": None if config["ofs_embed_dim"] is None else torch.full((1,), 2.0).to(shape.dtype),
    }


def _ltx_video(config: Config, shape: Shape) -> dict[str, Any]:
    """pipeline_ltx.py: num_frames 161 at a frame_rate of 25, compressed 8 times; a VAE of 32
    pixels, of which a token is a latent value of all channels; max_sequence_length 128."""
    frames, tokens = _latent_frames(161, 8), 128
    return {
        "hidden_states": shape.randn(shape.batch, frames * shape.side**2, config["in_channels"]),
        "encoder_hidden_states": shape.randn(shape.batch, tokens, config["caption_channels"]),
        "encoder_attention_mask": shape.mask(tokens, torch.bool),
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


def _of_axes(config: Config) -> int:
    """Rows and columns that the rotary embedding has angles for."""
    return int(min(config["axes_lens"][1:]))


_wan_maker = functools.partial(
    Maker,
    patch=lambda config: config["patch_size"][-1],
    most=lambda config: config["rope_max_seq_len"],
)

# A VAE of 8 pixels (vae_scale_factor of the pipelines) where nothing else is said.
_MAKERS: dict[str, Maker] = {
    "FluxTransformer2DModel": Maker(_flux, patch=_two),
    "Flux2Transformer2DModel": Maker(_flux2, patch=_two),
    "ChromaTransformer2DModel": Maker(_chroma, patch=_two),
    "PixArtTransformer2DModel": Maker(_pixart),
    "SD3Transformer2DModel": Maker(_sd3, most=lambda config: config["pos_embed_max_size"]),
    "QwenImageTransformer2DModel": Maker(_qwen_image, patch=_two),
    "ZImageTransformer2DModel": Maker(
        _z_image, patch=lambda config: config["all_patch_size"][0], most=_of_axes
    ),
    "SanaTransformer2DModel": Maker(_sana, pixels=_thirty_two),
    "Lumina2Transformer2DModel": Maker(_lumina2, most=_of_axes),
    "HiDreamImageTransformer2DModel": Maker(_hidream),
    # Wan 2.2's VAE compresses twice as much (scripts/convert_wan_to_diffusers.py).
    "WanTransformer3DModel": _wan_maker(
        _wan, pixels=lambda config: 16 if config["in_channels"] == _WAN22_VAE_CHANNELS else 8
    ),
    "WanVACETransformer3DModel": _wan_maker(_wan_vace),
    "WanAnimateTransformer3DModel": _wan_maker(_wan_animate),
    "HunyuanVideoTransformer3DModel": Maker(_hunyuan_video),
    "CogVideoXTransformer3DModel": Maker(_cogvideox),
    "LTXVideoTransformer3DModel": Maker(_ltx_video, pixels=_thirty_two),
}
