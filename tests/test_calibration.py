"""calibration: streaming equals one batch, everything is seen, and wrong input is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lrq_kernels import QuantScheme
from lrq_quant.calibration import ActivationStats, collect_stats
from lrq_quant.recipe import CalibrationOptions, InputGroup, LinearPlan


def group(*names: str, in_features: int = 16) -> InputGroup:
    scheme = QuantScheme()
    return InputGroup(tuple(LinearPlan(n, "attention", scheme, 8, in_features) for n in names))


class Model(nn.Module):
    """q, k and v read x, out reads their sum; v is called first, as proj_mlp is in FLUX."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 8)
        self.out = nn.Linear(8, 4)
        self.split = False

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.v(x) + self.q(x) + self.k(x + 1 if self.split else input_copy(x)))


def input_copy(x: Tensor) -> Tensor:
    return x.clone()


def test_streamed_statistics_equal_those_of_one_batch() -> None:
    options = CalibrationOptions(gram=True)
    batches = [torch.randn(torch.randint(0, 40, ()).item(), 2, 16) * (i + 1) for i in range(6)]
    streamed, at_once = ActivationStats("x", 16, options), ActivationStats("x", 16, options)
    for batch in batches:
        streamed.update(batch)
    x = torch.cat(batches)
    at_once.update(x)
    rows = x.reshape(-1, 16).double()
    for stats in (streamed, at_once):
        assert stats.count == rows.shape[0]
        assert torch.equal(stats.absmax, rows.abs().amax(0).float())
        torch.testing.assert_close(stats.rms, rows.square().mean(0).sqrt().float())
        torch.testing.assert_close(stats.mean, rows.mean(0).float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.gram, (rows.T @ rows).float(), rtol=1e-4, atol=1e-2)
        assert stats.j == pytest.approx(float(rows.square().mean().sqrt()))


def test_the_sample_is_bounded_even_and_repeatable() -> None:
    """Rows carry their index: a sampler that favours early or late steps shows."""
    rows = torch.arange(20_000.0)[:, None].expand(-1, 16).contiguous()
    options = CalibrationOptions(sample_rows=400)
    samples = []
    for _ in range(2):
        stats = ActivationStats("x", 16, options)
        for batch in rows.split(700):
            stats.update(batch)
        samples.append(stats.sample)
    assert torch.equal(samples[0], samples[1])
    index = samples[0][:, 0]
    assert index.shape == (400,) and index.unique().numel() == 400
    quarters = torch.histc(index, bins=4, min=0, max=20_000)
    assert (quarters > 60).all(), quarters
    other = ActivationStats("y", 16, options)
    other.update(rows)
    assert not torch.equal(other.sample.sort(0).values, samples[0].sort(0).values)


def test_few_tokens_are_all_kept() -> None:
    """Modulation linears see one row a step."""
    stats = ActivationStats("x", 16)
    for _ in range(5):
        stats.update(torch.randn(2, 16, dtype=torch.bfloat16))
    assert stats.sample.shape == (10, 16) and stats.sample.dtype == torch.bfloat16


def test_tensors_round_trip() -> None:
    stats = ActivationStats("x", 16, CalibrationOptions(gram=True))
    stats.update(torch.randn(50, 16))
    again = ActivationStats.from_tensors("x", stats.tensors())
    for part, tensor in stats.tensors().items():
        assert torch.equal(tensor, again.tensors()[part]), part
    assert again.j == stats.j


def test_collect_sees_every_prompt_step_and_guidance_half() -> None:
    model = Model()
    seen: list[Tensor] = []

    def run(prompts: list[str]) -> None:
        for _ in range(3):  # steps
            x = torch.randn(2 * len(prompts), 5, 16)  # both halves
            seen.append(x)
            model(x)

    calls: list[tuple] = []
    stats = collect_stats(
        run,
        model,
        [group("q", "k", "v"), group("out", in_features=8)],
        ["a", "b", "c"],
        CalibrationOptions(batch_size=2),
        progress=lambda *call: calls.append(call),
    )
    assert set(stats) == {"q", "out"}
    assert stats["q"].count == stats["out"].count == 3 * 2 * 3 * 5
    assert torch.equal(stats["q"].absmax, torch.cat(seen).abs().amax((0, 1)))
    assert calls == [("calibration", 2, 3), ("calibration", 3, 3)]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_are_gone_after_an_error_and_the_layer_is_named() -> None:
    model = Model()

    def run(prompts: list[str]) -> None:
        x = torch.randn(4, 16)
        x[1, 2] = float("nan")
        model(x)

    with pytest.raises(ValueError, match="input of q holds NaN or inf"):
        collect_stats(run, model, [group("q", "k", "v")], ["a"])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_members_that_read_different_tensors_are_refused() -> None:
    model = Model()
    model.split = True
    with pytest.raises(ValueError, match="k must read the same tensor"):
        collect_stats(lambda p: model(torch.randn(4, 16)), model, [group("q", "k", "v")], ["a"])


def test_inputs_never_reached_are_refused() -> None:
    model = Model()
    with pytest.raises(ValueError, match="never reached 1 of 2 inputs, such as out"):
        collect_stats(
            lambda prompts: model.q(torch.randn(4, 16)),
            model,
            [group("q"), group("out", in_features=8)],
            ["a"],
        )


def test_bad_arguments_are_named() -> None:
    model = Model()
    with pytest.raises(ValueError, match="at least one prompt"):
        collect_stats(print, model, [group("q")], [])
    with pytest.raises(TypeError, match="list of prompts, got a str"):
        collect_stats(print, model, [group("q")], "a red circle")
    with pytest.raises(ValueError, match="must have K = 16 channels"):
        ActivationStats("x", 16).update(torch.randn(3, 8))
