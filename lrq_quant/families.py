"""What each family of diffusion transformers computes: which linears read the same tensor, what
role they play, and what stays in the model's own precision (decision 6 of the method).

A rule names linears relative to their parent module, so one rule covers every block.
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


PIXART = Family(
    "PixArtTransformer2DModel",
    inputs=(
        SharedInput("transformer_blocks.*", ("attn1.to_q", "attn1.to_k", "attn1.to_v"), ATTENTION),
        SharedInput("transformer_blocks.*", ("attn1.to_out.0",), ATTENTION),
        SharedInput("transformer_blocks.*", ("attn2.to_q",), ATTENTION),
        # Keys and values of cross-attention read the caption, the queries the picture.
        SharedInput("transformer_blocks.*", ("attn2.to_k", "attn2.to_v"), ATTENTION),
        SharedInput("transformer_blocks.*", ("attn2.to_out.0",), ATTENTION),
        SharedInput("transformer_blocks.*", ("ff.net.0.proj",), FEED_FORWARD),
        SharedInput("transformer_blocks.*", ("ff.net.2",), FEED_FORWARD),
        SharedInput("", ("adaln_single.linear",), MODULATION),
    ),
    stays=(
        ("adaln_single.emb.*", "timestep and size embedding"),
        ("caption_projection.*", "caption embedding"),
        ("pos_embed.*", "patch embedding"),
        ("proj_out", "last projection"),
    ),
)

FLUX = Family(
    "FluxTransformer2DModel",
    inputs=(
        SharedInput("transformer_blocks.*", ("attn.to_q", "attn.to_k", "attn.to_v"), ATTENTION),
        SharedInput(
            "transformer_blocks.*",
            ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            ATTENTION,
        ),
        SharedInput("transformer_blocks.*", ("attn.to_out.0",), ATTENTION),
        SharedInput("transformer_blocks.*", ("attn.to_add_out",), ATTENTION),
        SharedInput("transformer_blocks.*", ("ff.net.0.proj",), FEED_FORWARD),
        SharedInput("transformer_blocks.*", ("ff.net.2",), FEED_FORWARD),
        SharedInput("transformer_blocks.*", ("ff_context.net.0.proj",), FEED_FORWARD),
        SharedInput("transformer_blocks.*", ("ff_context.net.2",), FEED_FORWARD),
        # A single block is parallel: attention and feed-forward read the same normed tokens.
        SharedInput(
            "single_transformer_blocks.*",
            ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            ATTENTION,
        ),
        SharedInput("single_transformer_blocks.*", ("proj_out",), FEED_FORWARD),
        SharedInput("transformer_blocks.*", ("norm1.linear",), MODULATION),
        SharedInput("transformer_blocks.*", ("norm1_context.linear",), MODULATION),
        SharedInput("single_transformer_blocks.*", ("norm.linear",), MODULATION),
    ),
    stays=(
        ("x_embedder", "patch embedding"),
        ("context_embedder", "caption embedding"),
        ("time_text_embed.*", "timestep, guidance and text embedding"),
        ("norm_out.linear", "modulation of the last projection"),
        ("proj_out", "last projection"),
    ),
)

FAMILIES: dict[str, Family] = {family.model_class: family for family in (PIXART, FLUX)}


def family_of(model: object) -> Family:
    """The family of a model by the name of its class or of a base; ValueError when unknown."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise ValueError(
        f"lrq_quant: model must be one of {sorted(FAMILIES)}, got {type(model).__name__}"
    )
