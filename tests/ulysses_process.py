"""A process of test_what_processes_exchange, in a module that is quick to import."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed

from lrq_quant import ulysses


def check_processes(rank: int, file: Path, processes: int) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(file), processes)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    check_exchange(rank, file, processes)
    check_obstacles(rank)
    distributed.barrier()
    distributed.destroy_process_group()


def check_exchange(rank: int, file: Path, processes: int) -> None:
    """Each process has its part of the tokens; all drew the same whole."""
    generator = torch.Generator().manual_seed(int(file.stem))
    for batch, tokens, heads in ((1, 5, processes), (3, 4, 2 * processes)):
        shape = (3, batch, processes * tokens, heads, 8)
        whole = torch.randn(shape, generator=generator, dtype=torch.float64)
        mine = slice(rank * tokens, (rank + 1) * tokens)
        exact = dense_attention(*whole).flatten(2)
        by_part = whole[:, :, mine].unflatten(3, (processes, -1)).permute(3, 1, 2, 0, 4, 5)
        got = ulysses.attention_of_parts(by_part, dense_attention, distributed.group.WORLD)
        torch.testing.assert_close(got, exact[:, mine], rtol=1e-12, atol=1e-12)


def check_obstacles(rank: int) -> None:
    """What one process alone is in the way of, none does; nobody hangs or decides otherwise."""
    from lrq_kernels import peer_memory

    def found(index: int = rank, **changes: Any) -> tuple[str | None, list[int]]:
        """Of changes to this process."""
        made: list[int] = []

        class Memory:
            def __init__(self, group: Any, size: int, device: torch.device) -> None:
                if "memory" in changes:
                    raise RuntimeError(changes["memory"])
                made.append(size)

        with (
            patch.object(peer_memory, "_own_obstacle", lambda device: changes.get("own")),
            patch.object(peer_memory, "_place", lambda: changes.get("place", ("here",))),
            patch.object(peer_memory, "_Memory", Memory),
            patch("torch.cuda.device", lambda device: nullcontext()),
        ):
            peers = peer_memory._Peers(distributed.group.WORLD, torch.device("cuda", index))
        return peers.obstacle, made

    def mine(**changes: Any) -> dict[str, Any]:
        return changes if rank == 1 else {}

    assert found() == (None, [1 << 16])
    assert found(**mine(own="no access")) == ("no access", [])
    assert found(**mine(place=("there",)))[0] == (
        "the processes are not on one host, or in several containers"
    )
    assert "must see all GPUs" in str(found(0)[0])
    assert found(**mine(memory="no\nroom"))[0] == "torch's symmetric memory: no"


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of [B, S, H, D], to the same."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1).matmul(v).transpose(1, 2)
