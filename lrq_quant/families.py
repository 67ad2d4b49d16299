"""What each family of diffusion transformers computes: which linears read the same tensor, what
role they play, and what stays in the model's own precision (decision 6 of the method).

A rule names linears relative to their parent module, so one rule covers every block.  Linears share
an input only where the model hands them one and the same tensor object: an equal copy (proj_mlp of
a HunyuanVideo single block) would be quantized twice and the first result never given up.
"""

from __future__ import annotations

from dataclasses import dataclass

ATTENTION, FEED_FORWARD, MODULATION = "attention", "feed_forward", "modulation"
ROLES = (ATTENTION, FEED_FORWARD, MODULATION)


@dataclass(frozen=True)
class SharedInput:
    """Linears that read one and the same tensor, so that it is rotated and quantized once.

    parent: fnmatch pattern of the full name of the module that holds them ("" is the model itself);
    members: their names relative to it, in the order in which they are fused.
    """

    parent: str
    members: tuple[str, ...]
    role: str


@dataclass(frozen=True)
class Family:
    """One model class: inputs to quantize, and patterns of linears that stay, with the reason."""

    model_class: str
    inputs: tuple[SharedInput, ...]
    stays: tuple[tuple[str, str], ...]


def _inputs(parent: str, role: str, *members: str) -> tuple[SharedInput, ...]:
    """One SharedInput for each string: the names, separated by blanks, that read one tensor."""
    return tuple(SharedInput(parent, tuple(names.split()), role) for names in members)


def _self_attention(parent: str) -> tuple[SharedInput, ...]:
    return _inputs(parent, ATTENTION, "to_q to_k to_v", "to_out.0")


def _cross_attention(parent: str) -> tuple[SharedInput, ...]:
    """Keys and values read the caption, the queries the picture."""
    return _inputs(parent, ATTENTION, "to_q", "to_k to_v", "to_out.0")


def _joint_attention(parent: str) -> tuple[SharedInput, ...]:
    """Picture and text each have their own projections and attend together."""
    return _self_attention(parent) + _inputs(
        parent, ATTENTION, "add_q_proj add_k_proj add_v_proj", "to_add_out"
    )


def _feed_forward(parent: str) -> tuple[SharedInput, ...]:
    return _inputs(parent, FEED_FORWARD, "net.0.proj", "net.2")


# What stays is the same in most families.
_TIME = "timestep, guidance and text embedding"
_PATCH, _CAPTION = "patch embedding", "caption embedding"
_NORM_OUT, _PROJ_OUT = "modulation of the last projection", "last projection"

PIXART = Family(
    "PixArtTransformer2DModel",
    inputs=_self_attention("transformer_blocks.*.attn1")
    + _cross_attention("transformer_blocks.*.attn2")
    + _feed_forward("transformer_blocks.*.ff")
    + _inputs("adaln_single", MODULATION, "linear"),
    stays=(
        ("adaln_single.emb.*", "timestep and size embedding"),
        ("caption_projection.*", _CAPTION),
        ("pos_embed.*", _PATCH),
        ("proj_out", _PROJ_OUT),
    ),
)

# dev, schnell, Kontext, Fill, Canny and Depth differ in in_channels and guidance only.
FLUX = Family(
    "FluxTransformer2DModel",
    inputs=_joint_attention("transformer_blocks.*.attn")
    + _feed_forward("transformer_blocks.*.ff")
    + _feed_forward("transformer_blocks.*.ff_context")
    # A single block is parallel: attention and feed-forward read the same normed tokens.
    + _inputs("single_transformer_blocks.*", ATTENTION, "attn.to_q attn.to_k attn.to_v proj_mlp")
    + _inputs("single_transformer_blocks.*", FEED_FORWARD, "proj_out")
    + _inputs("transformer_blocks.*", MODULATION, "norm1.linear", "norm1_context.linear")
    + _inputs("single_transformer_blocks.*", MODULATION, "norm.linear"),
    stays=(
        ("x_embedder", _PATCH),
        ("context_embedder", _CAPTION),
        ("time_text_embed.*", _TIME),
        ("norm_out.linear", _NORM_OUT),
        ("proj_out", _PROJ_OUT),
    ),
)

# The single block holds q, k, v and the feed-forward input in one linear; modulation is computed
# once for all blocks.
FLUX2 = Family(
    "Flux2Transformer2DModel",
    inputs=_joint_attention("transformer_blocks.*.attn")
    + _inputs("transformer_blocks.*.ff", FEED_FORWARD, "linear_in", "linear_out")
    + _inputs("transformer_blocks.*.ff_context", FEED_FORWARD, "linear_in", "linear_out")
    + _inputs("single_transformer_blocks.*.attn", ATTENTION, "to_qkv_mlp_proj", "to_out")
    + _inputs("double_stream_modulation_img", MODULATION, "linear")
    + _inputs("double_stream_modulation_txt", MODULATION, "linear")
    + _inputs("single_stream_modulation", MODULATION, "linear"),
    stays=(
        ("x_embedder", _PATCH),
        ("context_embedder", _CAPTION),
        ("time_guidance_embed.*", _TIME),
        ("norm_out.linear", _NORM_OUT),
        ("proj_out", _PROJ_OUT),
    ),
)

# FLUX blocks whose modulation comes from one network for all blocks.
CHROMA = Family(
    "ChromaTransformer2DModel",
    inputs=_joint_attention("transformer_blocks.*.attn")
    + _feed_forward("transformer_blocks.*.ff")
    + _feed_forward("transformer_blocks.*.ff_context")
    + _inputs("single_transformer_blocks.*", ATTENTION, "attn.to_q attn.to_k attn.to_v proj_mlp")
    + _inputs("single_transformer_blocks.*", FEED_FORWARD, "proj_out")
    + _inputs("distilled_guidance_layer.layers.*", MODULATION, "linear_1", "linear_2"),
    stays=(
        ("x_embedder", _PATCH),
        ("context_embedder", _CAPTION),
        ("distilled_guidance_layer.*_proj", "timestep embedding, first and last projection"),
        ("proj_out", _PROJ_OUT),
    ),
)

# attn2: the second, picture-only attention of SD3.5-medium's first blocks.  The last block has no
# to_add_out and no ff_context.
SD3 = Family(
    "SD3Transformer2DModel",
    inputs=_joint_attention("transformer_blocks.*.attn")
    + _self_attention("transformer_blocks.*.attn2")
    + _feed_forward("transformer_blocks.*.ff")
    + _feed_forward("transformer_blocks.*.ff_context")
    + _inputs("transformer_blocks.*", MODULATION, "norm1.linear", "norm1_context.linear"),
    stays=(
        ("context_embedder", _CAPTION),
        ("time_text_embed.*", _TIME),
        ("norm_out.linear", _NORM_OUT),
        ("proj_out", _PROJ_OUT),
    ),
)


def _wan_blocks(parent: str) -> tuple[SharedInput, ...]:
    """add_k_proj and add_v_proj read the reference picture (Wan 2.1 I2V)."""
    return (
        _self_attention(f"{parent}.attn1")
        + _cross_attention(f"{parent}.attn2")
        + _inputs(f"{parent}.attn2", ATTENTION, "add_k_proj add_v_proj")
        + _feed_forward(f"{parent}.ffn")
    )


_WAN_TIME = _inputs("condition_embedder", MODULATION, "time_proj")
_WAN_STAYS = (
    ("condition_embedder.time_embedder.*", "timestep embedding"),
    ("condition_embedder.text_embedder.*", _CAPTION),
    ("condition_embedder.image_embedder.*", "picture embedding"),
    ("proj_out", _PROJ_OUT),
)
WAN = Family("WanTransformer3DModel", inputs=_wan_blocks("blocks.*") + _WAN_TIME, stays=_WAN_STAYS)

# Blocks that run beside the others on the control video; the first takes in the noisy one, and what
# each gives is projected and added to a block of the others.
WAN_VACE = Family(
    "WanVACETransformer3DModel",
    inputs=_wan_blocks("blocks.*")
    + _wan_blocks("vace_blocks.*")
    + _inputs("vace_blocks.*", FEED_FORWARD, "proj_in", "proj_out")
    + _WAN_TIME,
    stays=_WAN_STAYS,
)

# Every few blocks attend to the motion of a face, which encoders of their own read from pixels.
WAN_ANIMATE = Family(
    "WanAnimateTransformer3DModel",
    inputs=_wan_blocks("blocks.*")
    + _inputs("face_adapter.*", ATTENTION, "to_q", "to_k to_v", "to_out")
    + _WAN_TIME,
    stays=(*_WAN_STAYS, ("face_encoder.*", "face embedding")),
)

HUNYUAN_VIDEO = Family(
    "HunyuanVideoTransformer3DModel",
    inputs=_joint_attention("transformer_blocks.*.attn")
    + _feed_forward("transformer_blocks.*.ff")
    + _feed_forward("transformer_blocks.*.ff_context")
    # The attention of a single block splits its input and joins it again: proj_mlp has its own.
    + _inputs("single_transformer_blocks.*", ATTENTION, "attn.to_q attn.to_k attn.to_v")
    + _inputs("single_transformer_blocks.*", FEED_FORWARD, "proj_mlp", "proj_out")
    + _self_attention("*.refiner_blocks.*.attn")
    + _feed_forward("*.refiner_blocks.*.ff")
    + _inputs("transformer_blocks.*", MODULATION, "norm1.linear", "norm1_context.linear")
    + _inputs("single_transformer_blocks.*", MODULATION, "norm.linear")
    + _inputs("*.refiner_blocks.*", MODULATION, "norm_out.linear"),
    stays=(
        ("context_embedder.proj_in", _CAPTION),
        ("context_embedder.time_text_embed.*", _TIME),
        ("time_text_embed.*", _TIME),
        ("norm_out.linear", _NORM_OUT),
        ("proj_out", _PROJ_OUT),
    ),
)

COGVIDEOX = Family(
    "CogVideoXTransformer3DModel",
    inputs=_self_attention("transformer_blocks.*.attn1")
    + _feed_forward("transformer_blocks.*.ff")
    + _inputs("transformer_blocks.*", MODULATION, "norm1.linear", "norm2.linear"),
    stays=(
        ("patch_embed.*", "patch and caption embedding"),
        ("time_embedding.*", "timestep embedding"),
        ("ofs_embedding.*", "frame rate embedding"),
        ("norm_out.linear", _NORM_OUT),
        ("proj_out", _PROJ_OUT),
    ),
)

LTX_VIDEO = Family(
    "LTXVideoTransformer3DModel",
    inputs=_self_attention("transformer_blocks.*.attn1")
    + _cross_attention("transformer_blocks.*.attn2")
    + _feed_forward("transformer_blocks.*.ff")
    + _inputs("time_embed", MODULATION, "linear"),
    stays=(
        ("proj_in", _PATCH),
        ("time_embed.emb.*", "timestep embedding"),
        ("caption_projection.*", _CAPTION),
        ("proj_out", _PROJ_OUT),
    ),
)

QWEN_IMAGE = Family(
    "QwenImageTransformer2DModel",
    inputs=_joint_attention("transformer_blocks.*.attn")
    + _feed_forward("transformer_blocks.*.img_mlp")
    + _feed_forward("transformer_blocks.*.txt_mlp")
    + _inputs("transformer_blocks.*", MODULATION, "img_mod.1", "txt_mod.1"),
    stays=(
        ("img_in", _PATCH),
        ("txt_in", _CAPTION),
        ("time_text_embed.*", "timestep embedding"),
        ("norm_out.linear", _NORM_OUT),
        ("proj_out", _PROJ_OUT),
    ),
)

# noise_refiner, context_refiner, siglip_refiner and layers hold the same blocks.
Z_IMAGE = Family(
    "ZImageTransformer2DModel",
    inputs=_self_attention("*.attention")
    + _inputs("*.feed_forward", FEED_FORWARD, "w1 w3", "w2")
    + _inputs("*", MODULATION, "adaLN_modulation.0"),
    stays=(
        ("all_x_embedder.*", _PATCH),
        ("t_embedder.*", "timestep embedding"),
        ("cap_embedder.*", _CAPTION),
        ("siglip_embedder.*", "picture embedding"),
        ("all_final_layer.*", _PROJ_OUT),
    ),
)

# The feed-forward is made of convolutions (GLUMBConv), which stay: half of the model.
SANA = Family(
    "SanaTransformer2DModel",
    inputs=_self_attention("transformer_blocks.*.attn1")
    + _cross_attention("transformer_blocks.*.attn2")
    + _inputs("time_embed", MODULATION, "linear"),
    stays=(
        ("time_embed.emb.*", "timestep embedding"),
        ("time_embed.*_embedder.*", "timestep and guidance embedding"),
        ("caption_projection.*", _CAPTION),
        ("proj_out", _PROJ_OUT),
    ),
)

# noise_refiner, context_refiner and layers hold the same blocks.
LUMINA2 = Family(
    "Lumina2Transformer2DModel",
    inputs=_self_attention("*.attn")
    + _inputs("*.feed_forward", FEED_FORWARD, "linear_1 linear_3", "linear_2")
    + _inputs("*", MODULATION, "norm1.linear"),
    stays=(
        ("x_embedder", _PATCH),
        ("time_caption_embed.*", "timestep and caption embedding"),
        ("norm_out.linear_1", _NORM_OUT),
        ("norm_out.linear_2", _PROJ_OUT),
    ),
)

# ff_i is a mixture: experts, of which each reads its own tokens, and shared_experts; ff_t and an
# ff_i without experts are one SwiGLU.  The gate is no linear and stays.
HIDREAM = Family(
    "HiDreamImageTransformer2DModel",
    inputs=_inputs(
        "*_blocks.*.attn1",
        ATTENTION,
        "to_q to_k to_v",
        "to_q_t to_k_t to_v_t",
        "to_out",
        "to_out_t",
    )
    + _inputs("*_blocks.*.ff_*", FEED_FORWARD, "w1 w3", "w2")
    + _inputs("*_blocks.*.block", MODULATION, "adaLN_modulation.1"),
    stays=(
        ("x_embedder.*", _PATCH),
        ("t_embedder.*", "timestep embedding"),
        ("p_embedder.*", "pooled text embedding"),
        ("caption_projection.*", _CAPTION),
        ("final_layer.*", _PROJ_OUT),
    ),
)

_ALL = (
    PIXART,
    FLUX,
    FLUX2,
    CHROMA,
    SD3,
    WAN,
    WAN_VACE,
    WAN_ANIMATE,
    HUNYUAN_VIDEO,
    COGVIDEOX,
    LTX_VIDEO,
    QWEN_IMAGE,
    Z_IMAGE,
    SANA,
    LUMINA2,
    HIDREAM,
)
FAMILIES: dict[str, Family] = {family.model_class: family for family in _ALL}


# Text encoders of transformers name the linears of a block in one of these ways; embeddings, heads
# and vision towers, which name theirs otherwise, stay.
_TEXT_ENCODER = (
    _inputs("*.SelfAttention", ATTENTION, "q k v", "o")  # T5
    + _inputs("*.DenseReluDense", FEED_FORWARD, "wi_0 wi_1", "wi", "wo")
    + _inputs("*.self_attn", ATTENTION, "q_proj k_proj v_proj", "qkv_proj", "o_proj", "out_proj")
    + _inputs("*.mlp", FEED_FORWARD, "gate_proj up_proj", "gate_up_proj", "down_proj", "fc1", "fc2")
)


def find_family(model: object) -> Family | None:
    """The family of a model by the name of its class or of a base; models of the transformers
    package are text encoders."""
    classes = type(model).__mro__
    for cls in classes:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    if any(cls.__module__.startswith("transformers.models.") for cls in classes):
        stays = (("*", "embedding, head or vision tower"),)
        return Family(type(model).__name__, _TEXT_ENCODER, stays)
    return None


def family_of(model: object) -> Family:
    """The family of a model; ValueError when unknown."""
    family = find_family(model)
    if family is None:
        raise ValueError(
            f"lrq_quant: model must be one of {sorted(FAMILIES)}, got {type(model).__name__}. "
            "Watch another with register_family(auto_family(model, run)), or describe it by "
            "QuantRecipe(family=Family(...))"
        )
    return family


def register_family(family: Family) -> Family:
    """Make `family` known by the name of its model class, in place of one of that name."""
    FAMILIES[family.model_class] = family
    return family
