"""Exchange through memory of other GPUs: what is written where. test_parallel has the processes."""

from __future__ import annotations

import pytest
import torch
from rotate_cases import in_interpreter

DTYPES = (torch.float16, torch.bfloat16)


def check_tokens(device: str, dtype: torch.dtype) -> None:
    """Each rank sends to inboxes that lie anywhere; each then has the tokens of its process."""
    from lrq_kernels import peer_memory

    for parts, batch, tokens, channels in ((2, 1, 5, 48), (3, 2, 4, 130), (2, 1, 0, 8)):
        sent = torch.randn(parts, batch, parts * tokens, channels, device=device).to(dtype)
        shape = (batch, tokens, parts, channels)
        size = (torch.Size(shape).numel() + 15) // 16 * 16
        memory = torch.full((3 * parts, size), torch.nan, dtype=dtype, device=device)
        places = torch.randperm(3 * parts)[:parts]
        inboxes = [memory[int(p)][: torch.Size(shape).numel()].view(shape) for p in places]
        for rank in range(parts):
            offsets = ((places - places[rank]) * size).to(device)
            peer_memory.write_tokens(sent[rank], inboxes[rank], rank, offsets)
        for rank, inbox in enumerate(inboxes):
            mine = slice(rank * tokens, (rank + 1) * tokens)
            assert torch.equal(inbox, sent[:, :, mine].permute(1, 2, 0, 3))
        others = [p for p in range(3 * parts) if p not in places]
        assert memory[others].isnan().all()


@in_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_reach_their_process_interpreted(dtype: torch.dtype):
    check_tokens("cpu", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_reach_their_process(dtype: torch.dtype):
    check_tokens("cuda", dtype)
