"""A process of test_heads_are_exchanged_for_tokens, in a module that is quick to import."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, distributed

from lrq_quant import ulysses


def check_exchange(rank: int, file: Path, processes: int) -> None:
    """One of several processes, each with its part of the tokens; all drew the same whole."""
    torch.set_num_threads(1)
    store = distributed.FileStore(str(file), processes)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    generator = torch.Generator().manual_seed(int(file.stem))
    for batch, tokens, heads in ((1, 5, processes), (3, 4, 2 * processes)):
        shape = (3, batch, processes * tokens, heads, 8)
        whole = torch.randn(shape, generator=generator, dtype=torch.float64)
        mine = slice(rank * tokens, (rank + 1) * tokens)
        exact = dense_attention(*whole).flatten(2)
        by_part = whole[:, :, mine].unflatten(3, (processes, -1)).permute(3, 1, 2, 0, 4, 5)
        got = ulysses.attention_of_parts(by_part, dense_attention, distributed.group.WORLD)
        torch.testing.assert_close(got, exact[:, mine], rtol=1e-12, atol=1e-12)
    distributed.barrier()
    distributed.destroy_process_group()


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of [B, S, H, D], to the same."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1).matmul(v).transpose(1, 2)
