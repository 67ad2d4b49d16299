"""Attention whose tokens several processes hold parts of: Ulysses (arXiv 2309.14509), for the fused
blocks under diffusers' ContextParallelConfig(ulysses_degree=...).

    projections, norm, rope     all heads of 1/W of the tokens
    all-to-all                  -> 1/W of the heads of all tokens
    attention
    all-to-all                  -> all heads of 1/W of the tokens

diffusers' own exchange sends q, k and v one by one and copies each before and after. Here the three
are one message, which the kernel of the norm writes as it is sent and attention reads as it
arrives, and what attention writes is sent as it lies. So of a single sample nothing is copied but
the heads that came back, which are put side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed


def group_of(parallel_config: Any, heads: int) -> Any:
    """The process group among which attention(...) may exchange heads, or None where that is
    diffusers' to do: no Ulysses, rings as well, or parts that are not equal."""
    config = getattr(parallel_config, "context_parallel_config", None)
    if config is None or config.ulysses_degree <= 1 or config.ring_degree > 1:
        return None
    if config.ulysses_anything or heads % config.ulysses_degree:
        return None
    return config._ulysses_mesh.get_group()


def attention(
    qkv: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor], group: Any
) -> Tensor:
    """[B, S, H * D] of q, k and v of this process's S tokens of W * S, as ops.qk_norm_rope_parts
    gives them: [W, B, S, 3, H / W, D]. All processes of `group` call it with as many.

    attend: of q, k, v [B, W * S, H / W, D] to the same shape; tokens are in the order of the
    processes.
    """
    parts, _, tokens = qkv.shape[:3]
    q, k, v = _exchange(qkv, group).transpose(0, 1).flatten(1, 2).unbind(2)
    out = attend(q, k, v)
    out = _exchange(out.unflatten(1, (parts, tokens)).transpose(0, 1), group)
    return out.permute(1, 2, 0, 3, 4).flatten(2)


def _exchange(x: Tensor, group: Any) -> Tensor:
    """x [W, ...], one part for each process, to what each process has for this one, [W, ...]."""
    x = x.contiguous()
    received = torch.empty_like(x)
    distributed.all_to_all_single(received, x, group=group)
    return received
