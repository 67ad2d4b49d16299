"""Ways to run one transformer, for benchmarks and `lrq profile`.

eager      without a compiler: lrq_quant.fuse_blocks where it is quantized and has such blocks
loaded     as it is
compiled   torch.compile(fullgraph=True), blocks alone where a model is compiled best so
graph      eager, then lrq_kernels.graph
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lrq_kernels
from lrq_kernels import LRQLinear

from .fused_blocks import fuse_blocks, fused_blocks

MODES = ("eager", "loaded", "compiled", "graph")
COMPILE_KINDS = ("whole", "blocks")


def apply_mode(model: nn.Module, mode: str, compile: str | None = None) -> dict[str, str]:
    """Make `model` run in `mode`, in place. Compilation and capture happen in the next forward.

    compile: one of COMPILE_KINDS; by default "blocks" for FLUX, whose blocks are few kinds and
    many, else "whole". Returns what was done, as "compile" and, of a quantized model,
    "fused_blocks" ("57 of 57", with the first obstacle where blocks stay as they are). Raises
    ValueError for an unknown mode and what graph raises: ValueError where no GPU holds the model.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    done: dict[str, str] = {}
    is_quantized = any(isinstance(module, LRQLinear) for module in model.modules())
    if mode in ("eager", "graph") and is_quantized:
        blocks = fused_blocks(model)
        if blocks and None not in blocks.values():  # none is fused yet
            fuse_blocks(model)
        done["fused_blocks"] = _blocks_fused(model)
    if mode == "graph":
        lrq_kernels.graph(model)
    if mode == "compiled":
        done["compile"] = compile or _compile_kind(model)
        if done["compile"] == "blocks":
            model.compile_repeated_blocks(fullgraph=True)
        else:
            model.compile(fullgraph=True)
    return done


def remove_compiled_and_graph(model: nn.Module) -> None:
    """Undo the modes "compiled" and "graph", and forget all graphs that were compiled."""
    lrq_kernels.ungraph(model)
    for module in model.modules():
        module._compiled_call_impl = None
    torch._dynamo.reset()


def _compile_kind(model: nn.Module) -> str:
    return "blocks" if type(model).__name__.startswith("Flux") else "whole"


def _blocks_fused(model: nn.Module) -> str:
    obstacles: list[Any] = [why for why in fused_blocks(model).values() if why is not None]
    count = len(fused_blocks(model))
    if not count:
        return "no block of a kind that is known"
    text = f"{count - len(obstacles)} of {count}"
    return f"{text}; {obstacles[0]}" if obstacles else text
