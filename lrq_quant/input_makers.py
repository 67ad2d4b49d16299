"""Which linears make the input of another by their rows, so that a permutation of it folds there.

Between the two stands an activation that acts on each channel alone: with the rows of the makers in
another order, the channels of the input come in that order, and nothing else changes.

    net.0.proj  ->  GELU  ->  net.2         one row a channel
    net.0.proj  ->  GEGLU  ->  net.2        two rows a channel, from either half
    w1, w3  ->  silu(w1) * w3  ->  w2       one row of each a channel
    proj_mlp  ->  GELU  ->  proj_out        the last channels; attention makes those before

Any other input keeps its order: what a norm or an embedding gives is in the order of a stream that
others read too, and attention gives head after head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Makers:
    """Of the input of `reader`, by names relative to the module that holds both.

    between: the modules that the input passes; classes: of the holding module, as module:name,
    whose forward is known to be this and nothing else; activations: likewise of between[0], where
    the holding module takes any.
    """

    reader: str
    makers: tuple[str, ...]
    between: tuple[str, ...]
    classes: tuple[str, ...]
    activations: tuple[str, ...] = ()


_TRANSFORMERS = "diffusers.models.transformers.transformer_"
_OF_LINEAR = tuple(
    f"diffusers.models.activations:{name}"
    for name in ("GELU", "GEGLU", "SwiGLU", "ApproximateGELU", "LinearActivation")
)
_MAKERS = (
    Makers(
        "net.2",
        ("net.0.proj",),
        ("net.0", "net.1"),
        ("diffusers.models.attention:FeedForward",),
        _OF_LINEAR,
    ),
    Makers(
        "proj_out",
        ("proj_mlp",),
        ("act_mlp",),
        (
            f"{_TRANSFORMERS}flux:FluxSingleTransformerBlock",
            f"{_TRANSFORMERS}chroma:ChromaSingleTransformerBlock",
            f"{_TRANSFORMERS}hunyuan_video:HunyuanVideoSingleTransformerBlock",
        ),
        ("torch.nn.modules.activation:GELU",),
    ),
    Makers("linear_out", ("linear_in",), ("act_fn",), (f"{_TRANSFORMERS}flux2:Flux2FeedForward",)),
    Makers(
        "w2",
        ("w1", "w3"),
        (),
        (
            f"{_TRANSFORMERS}z_image:FeedForward",
            f"{_TRANSFORMERS}hidream_image:HiDreamImageFeedForwardSwiGLU",
        ),
    ),
    Makers(
        "linear_2",
        ("linear_1", "linear_3"),
        ("silu",),
        ("diffusers.models.attention:LuminaFeedForward",),
    ),
)
_BY_CLASS = {name: makers for makers in _MAKERS for name in makers.classes}

_ATTENTION_OUTPUTS = ("to_out.0", "to_out", "to_add_out", "to_out_t")
_OF_STREAM = (
    *("to_q", "to_k", "to_v", "to_q_t", "to_k_t", "to_v_t", "to_qkv", "to_kv", "to_qkv_mlp_proj"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_added_qkv"),
    *(maker for makers in _MAKERS for maker in makers.makers),
)
OF_ATTENTION = "attention makes the input, head by head"
OF_STREAM = "the channels of the input are those of a stream that others read"
MOVES_HEADS = "it moves channels that attention makes, head by head"
UNKNOWN = "no quantized linear is known to make the input"


def class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}:{type(module).__qualname__}"


def makers_in(module: nn.Module) -> Makers | None:
    """What stands in a module of a known class, None of any other."""
    return _BY_CLASS.get(class_name(module))


def makers_by_name(name: str, rows: Mapping[str, int], channels: int) -> tuple[list[str], int]:
    """The names of the linears that make the input of linear `name`, and the first of its
    `channels` that they make; no names where none are known. rows: of every linear that may be
    one. By names alone: what a plan or a report, which hold no modules, can tell."""
    for known in _MAKERS:
        parent = name.removesuffix(known.reader)
        if parent == name or not f".{parent}".endswith("."):
            continue
        found = [f"{parent}{maker}" for maker in known.makers]
        if set(found) <= rows.keys():
            first = first_made([rows[maker] for maker in found], channels)
            return (found, first) if first is not None else ([], 0)
    return [], 0


def first_made(rows: list[int], channels: int) -> int | None:
    """The first of `channels` that linears of so many rows make; None where they do not fit."""
    if len(set(rows)) != 1:
        return None
    if rows[0] == 2 * channels and len(rows) == 1:  # two halves, one the gate of the other
        return 0
    return channels - rows[0] if rows[0] <= channels else None


def order_of_rows(permutation: Tensor, first: int, rows: int) -> Tensor | None:
    """The order of a maker's rows that permutes the input: int32 [rows]. None where channels move
    that it does not make, those before `first`. permutation: int32 [K], channel at each place."""
    start = torch.arange(first, dtype=permutation.dtype, device=permutation.device)
    if not torch.equal(permutation[:first], start):
        return None
    made = permutation[first:] - first
    return torch.cat([made + start for start in range(0, rows, made.numel())])


def why_gathered(name: str) -> str:
    """Of linear `name`, whose input no linear makes in the sense above."""
    for leaves, why in ((_ATTENTION_OUTPUTS, OF_ATTENTION), (_OF_STREAM, OF_STREAM)):
        if f".{name}".endswith(tuple(f".{leaf}" for leaf in leaves)):
            return why
    return UNKNOWN
