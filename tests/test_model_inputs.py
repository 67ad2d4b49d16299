"""Random inputs of every family: what its class takes, at any size and batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_families import TINY_FAMILIES, build
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lrq_kernels.cuda_graph import Captured, GraphedForward, Options
from lrq_quant.families import FAMILIES
from lrq_quant.model_inputs import classes_with_inputs, model_inputs
from lrq_quant.model_shapes import MODEL_CONFIGS, named_inputs, names_with_inputs

# That one reads pictures beside the noise, and is the class of another.
NAMES = sorted({*TINY_FAMILIES} - {"z-image-omni"})
LATENTS = ("hidden_states", "x")
# [B, tokens, C] of these, whose pipelines pack patch_size x patch_size values into a token.
PACKED = ("flux", "flux2", "chroma", "qwen-image", "ltx-video")

# Latents of a forward at 1024 x 1024 pixels: [tokens, C], [C, H, W], [C, F, H, W] or, of CogVideoX,
# [F, C, H, W]; 4096 tokens a picture or frame but for the VAEs of 16 and 32 pixels.
PUBLISHED = {
    "flux-dev": (4096, 64),
    "flux-fill": (4096, 384),
    "flux2-dev": (4096, 128),
    "chroma": (4096, 64),
    "pixart-sigma": (4, 128, 128),
    "sd3.5-large": (16, 128, 128),
    "qwen-image": (4096, 64),
    "z-image": (16, 1, 128, 128),
    "lumina-image-2.0": (16, 128, 128),
    "hidream-i1": (16, 128, 128),
    "sana-1.6b": (32, 32, 32),
    "wan2.1-t2v-1.3b": (16, 21, 128, 128),
    "wan2.1-i2v-14b": (36, 21, 128, 128),
    "wan2.2-ti2v-5b": (48, 21, 64, 64),
    "wan2.1-vace-1.3b": (16, 21, 128, 128),
    "wan2.2-animate-14b": (36, 21, 128, 128),
    "hunyuan-video": (16, 33, 128, 128),
    "cogvideox-5b": (13, 16, 128, 128),
    "cogvideox1.5-5b": (22, 16, 128, 128),
    "ltx-video-2b": (21 * 32 * 32, 128),
}


def latents_of(inputs: dict[str, Any]) -> list[Tensor]:
    """Of each sample."""
    return list(next(inputs[name] for name in LATENTS if name in inputs))


def tiny(name: str, **changes: Any) -> nn.Module:
    """The tiny instance, with another configuration."""
    model = TINY_FAMILIES[name].make()
    if not changes:
        return model
    own = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return build(type(model).__name__, **{**own, **changes})


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Of each sample."""
    return list(model(**inputs, return_dict=False)[0])


def inputs_of(model: nn.Module, **options: Any) -> dict[str, Any]:
    options = {"size": 64, "device": "cpu", "dtype": torch.float32, **options}
    return model_inputs(type(model).__name__, model.config, **options)


def test_every_family_has_inputs():
    assert {*FAMILIES} == {*classes_with_inputs()}
    assert {*MODEL_CONFIGS} <= {*names_with_inputs()}


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_takes_them(name: str):
    """The output is as the latents are, with the channels that the class gives."""
    model = tiny(name)
    inputs = inputs_of(model, batch=2)
    latents, outputs = latents_of(inputs), outputs_of(model, inputs)
    channels = model.config.get("out_channels") or model.config["in_channels"]
    axis = {"cogvideox": 1}.get(name, -1 if name in PACKED else 0)
    if name in PACKED:
        channels *= model.config["patch_size"] ** 2
    expected = list(latents[0].shape)
    expected[axis] = channels
    assert [list(output.shape) for output in outputs] == 2 * [expected]
    assert all(output.isfinite().all() for output in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_they_grow_with_size_and_batch(name: str):
    model = tiny(name)
    small, large, both = (
        inputs_of(model, size=size, batch=batch, dtype=torch.bfloat16)
        for size, batch in ((64, 1), (128, 1), (128, 2))
    )
    of_small, of_large, of_both = map(latents_of, (small, large, both))
    assert (len(of_small), len(of_large), len(of_both)) == (1, 1, 2)
    assert of_large[0].numel() == 4 * of_small[0].numel()
    assert {x.shape for x in of_both} == {of_large[0].shape}
    assert {x.dtype for x in of_both} == {torch.bfloat16}
    # The text does not.
    text = next(key for key in large if key.startswith(("encoder_hidden_states", "cap_feats")))
    assert large[text][0].shape == small[text][0].shape == both[text][0].shape
    with pytest.raises(ValueError, match=r"size must be a multiple of \d+ pixels, got 65"):
        inputs_of(model, size=65)
    with pytest.raises(ValueError, match="batch must be positive, got 0"):
        inputs_of(model, batch=0)


@pytest.mark.parametrize("name", NAMES)
def test_on_no_device(name: str):
    """Every tensor is moved, also within lists; shapes and dtypes are those on a device."""
    model = tiny(name)
    real, meta = (tree_leaves(inputs_of(model, device=device)) for device in ("cpu", "meta"))
    assert len(real) == len(meta)
    for one, other in zip(real, meta, strict=True):
        if isinstance(one, Tensor):
            assert other.is_meta and (one.shape, one.dtype) == (other.shape, other.dtype)
        else:
            assert one == other


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_is_kept_for_them(name: str):
    """lrq_kernels.graph looks at every argument, also within lists: the same are one graph."""
    model = tiny(name)
    first, again = (inputs_of(model, seed=seed) for seed in (0, 1))
    expected = [outputs_of(model, inputs) for inputs in (first, again)]
    captures = []

    def capture(call: Callable, inputs: list[Tensor], warmup: int, pool: Any) -> Captured:
        """Runs the model again in place of a replay."""
        captures.append(inputs)
        outputs = list(call(inputs)[0])

        def replay() -> None:
            for old, new in zip(outputs, call(inputs)[0], strict=True):
                old.copy_(new)

        return Captured(inputs, replay, outputs, None)

    model.forward = GraphedForward(model, capture, Options(device=torch.device("cpu")))
    with torch.no_grad():
        got = [model(**inputs, return_dict=False) for inputs in (first, again)]
    assert len(captures) == 1
    for one, other in zip(expected, got, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", PUBLISHED)
def test_latents_of_published_shapes(name: str):
    inputs = named_inputs(name, size=1024, batch=2, device="meta")
    assert [tuple(x.shape) for x in latents_of(inputs)] == 2 * [PUBLISHED[name]]


# ---- what only some models of a class take ------------------------------------------------------

LEARNED = {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}
T2V = {"image_dim": None, "added_kv_proj_dim": None}
VARIANTS = {
    "alpha": (
        "pixart",  # its width is that of three embeddings
        {
            "sample_size": 128,
            "use_additional_conditions": None,
            "num_attention_heads": 3,
            "cross_attention_dim": 96,
        },
    ),
    "klein": ("flux2", {"guidance_embeds": False}),
    "no sprint": ("sana", {"guidance_embeds": False}),
    "t2v": ("wan", T2V),
    "ti2v": ("wan", {**T2V, "in_channels": 48, "out_channels": 48}),
    "first and last frame": ("wan", {"pos_embed_seq_len": 2 * 257}),
    "33 channels": (
        "hunyuan-video",
        {"in_channels": 9, "image_condition_type": "latent_concat", "guidance_embeds": False},
    ),
    "first frame replaced": ("hunyuan-video", {"image_condition_type": "token_replace"}),
    "rotary": ("cogvideox", {"use_rotary_positional_embeddings": True}),
    "1.5": (
        "cogvideox",
        {
            "use_rotary_positional_embeddings": True,
            "patch_size_t": 2,
            "sample_frames": 17,  # 5 latent frames, padded
            "ofs_embed_dim": 64,
            "in_channels": 8,
        },
    ),
    "learned places": ("cogvideox", LEARNED),
    "of pictures": ("z-image", {"siglip_feat_dim": 48}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_a_class(variant: str):
    name, changes = VARIANTS[variant]
    model = tiny(name, **changes)
    inputs = inputs_of(model, batch=2)
    outputs = outputs_of(model, inputs)
    assert len(outputs) == 2 and all(output.isfinite().all() for output in outputs)


def test_what_variants_are_told():
    def told(variant: str) -> dict[str, Any]:
        name, changes = VARIANTS[variant]
        return inputs_of(tiny(name, **changes), batch=2)

    alpha = told("alpha")
    assert alpha["added_cond_kwargs"]["resolution"].tolist() == 2 * [[64.0, 64.0]]
    assert alpha["encoder_hidden_states"].shape[1] == 120
    # A VAE of 16 pixels, patches of 2.
    assert told("ti2v")["timestep"].shape == (2, 21 * 2 * 2)
    assert told("first and last frame")["encoder_hidden_states_image"].shape[:2] == (4, 257)
    assert told("first frame replaced")["encoder_hidden_states"].shape[1] == 256 + 576 // 4
    assert told("1.5")["hidden_states"].shape[1] == 6


@pytest.mark.parametrize(
    "name, changes, size, message",
    [
        ("sd3.5", {}, 144, "size must be at most 128 pixels, got 144"),
        ("z-image", {}, 528, "size must be at most 512 pixels, got 528"),
        ("lumina2", {}, 528, "size must be at most 512 pixels, got 528"),
        ("wan", {}, 528, "size must be at most 512 pixels, got 528"),
        (
            "cogvideox",
            {**LEARNED, "sample_width": 12},
            64,
            "size must be 96 x 64 pixels, of which this model learned the places, got 64 x 64",
        ),
    ],
)
def test_a_size_that_a_model_has_no_places_for(name: str, changes: dict, size: int, message: str):
    model = tiny(name, **changes)
    with pytest.raises(ValueError, match=message):
        inputs_of(model, size=size)
    if not changes:
        most = int(message.split()[5])
        assert len(latents_of(inputs_of(model, size=most, device="meta"))) == 1
