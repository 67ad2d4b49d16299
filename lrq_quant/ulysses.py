"""Attention whose tokens several processes hold parts of: Ulysses (arXiv 2309.14509), for the fused
blocks under diffusers' ContextParallelConfig(ulysses_degree=...).

    projections, norm, rope     all heads of 1/W of the tokens
    all-to-all                  -> 1/W of the heads of all tokens
    attention
    all-to-all                  -> all heads of 1/W of the tokens

diffusers' own exchange sends q, k and v one by one and copies each before and after. Here the three
are one message. Among GPUs of one host that have access to each other's memory, the kernel of the
norm writes it to where attention reads it, and one more kernel what attention gives to where the
next linear reads it (lrq_kernels.peer_memory). Elsewhere both go through torch.distributed, and the
heads that came back are put side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from lrq_kernels import ops

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def group_of(parallel_config: Any, heads: int) -> Any:
    """The process group among which attention(...) may exchange heads, or None where that is
    diffusers' to do: no Ulysses, rings as well, or parts that are not equal."""
    config = getattr(parallel_config, "context_parallel_config", None)
    if config is None or config.ulysses_degree <= 1 or config.ring_degree > 1:
        return None
    if config.ulysses_anything or heads % config.ulysses_degree:
        return None
    return config._ulysses_mesh.get_group()


def attention(arguments: Sequence[Any], attend: Attend, group: Any) -> Tensor:
    """[B, S, H * D] of this process's S tokens of W * S. All processes of `group` call it with as
    many.

    arguments: those of ops.qk_norm_rope, from q to eps; attend: of q, k, v [B, W * S, H / W, D] to
    the same shape; tokens are in the order of the processes.
    """
    parts = group.size()
    peer_memory = None if torch.compiler.is_compiling() else _peer_memory(arguments[0], group)
    if peer_memory is None:
        return attention_of_parts(ops.qk_norm_rope_parts(*arguments, parts=parts), attend, group)
    heads = peer_memory.send_heads(group, *arguments, "rms", "interleaved", parts)
    heads.wait()
    out = attend(*_joined(heads.mine))
    tokens = peer_memory.send_tokens(group, out.flatten(2))
    tokens.wait()
    return tokens.mine.flatten(2)


def _peer_memory(q: Tensor, group: Any) -> Any:
    """The module, which needs Triton, where the processes can use it."""
    if not q.is_cuda:
        return None
    from lrq_kernels import peer_memory

    return peer_memory if peer_memory.obstacle(group, q.device) is None else None


def attention_of_parts(qkv: Tensor, attend: Attend, group: Any) -> Tensor:
    """attention() of q, k and v as ops.qk_norm_rope_parts gives them, [W, B, S, 3, H / W, D],
    through torch.distributed."""
    parts, _, tokens = qkv.shape[:3]
    out = attend(*_joined(_exchange(qkv, group)))
    out = _exchange(out.unflatten(1, (parts, tokens)).transpose(0, 1), group)
    return out.permute(1, 2, 0, 3, 4).flatten(2)


def _joined(qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k, v [B, W * S, H / W, D] of [W, B, S, 3, H / W, D]; without a copy of a single sample."""
    return qkv.transpose(0, 1).flatten(1, 2).unbind(2)


def _exchange(x: Tensor, group: Any) -> Tensor:
    """x [W, ...], one part for each process, to what each process has for this one, [W, ...]."""
    x = x.contiguous()
    received = torch.empty_like(x)
    distributed.all_to_all_single(received, x, group=group)
    return received
