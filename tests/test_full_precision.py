"""full_precision: statistics and weights are the same whatever torch may do to products of fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_models import pixart_inputs, tiny_pixart
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lrq_quant import (
    ActivationStats,
    CalibrationOptions,
    QuantRecipe,
    SearchOptions,
    quantize_model,
)
from lrq_quant.full_precision import full_precision

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "addr")


def allowed() -> tuple[str, str]:
    """On a GPU and on the CPU."""
    backends = torch.backends
    return backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision


class Products(TorchDispatchMode):
    """Notes what was allowed in every product of fp32 matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name in PRODUCTS and args[0].dtype == torch.float32:
            self.seen.append(allowed())
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["high", "medium"])
def low_precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = allowed()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before


def test_the_setting_comes_back(low_precision: str) -> None:
    before = allowed()
    assert before[0] == "tf32"
    with full_precision():
        assert allowed() == ("ieee", "ieee")
        with full_precision():
            pass
        assert allowed() == ("ieee", "ieee")
    assert allowed() == before
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert allowed() == before
    assert torch.get_float32_matmul_precision() == low_precision


@pytest.mark.parametrize("low_precision", ["high"], indirect=True)
def test_calibration_does_not_follow_the_setting(low_precision: str) -> None:
    stats = ActivationStats("x", 16, CalibrationOptions(gram=True))
    with Products() as products:
        stats.update(torch.randn(32, 16))
        torch.randn(4, 4) @ torch.randn(4, 4)  # the caller's own
    assert products.seen == [("ieee", "ieee"), allowed()]
    model = tiny_pixart().float()
    inputs = pixart_inputs(torch.float32)
    search = SearchOptions(alphas=(0.5,), sample_rows=64, weight_rows=64, dual_steps=4)
    recipe = QuantRecipe.from_name("w4a4", search=search)
    forwards = Products()

    def run(prompts: list[str]) -> None:
        with forwards:
            model(**inputs)

    with Products() as products:
        quantize_model(model, recipe, run=run, prompts=["a"])
    assert allowed() in forwards.seen  # pictures are drawn as the caller says
    outside = [setting for setting in products.seen if setting != ("ieee", "ieee")]
    assert len(products.seen) > 100
    assert outside.count(allowed()) == len(outside) <= len(forwards.seen)


@pytest.mark.gpu
def test_second_moments_on_a_gpu(low_precision: str) -> None:
    # 60 + 1/128 is 60 in TF32, for all tokens alike, so that the error does not average out.
    tokens = 60 + 1 / 128 + 1e-3 * torch.randn(4096, 256, device="cuda")
    exact = (tokens.double().T @ tokens.double()).float()
    stats = ActivationStats("x", 256, CalibrationOptions(gram=True))
    stats.update(tokens)

    def error(gram: Tensor) -> float:
        return float((gram - exact).abs().max() / exact.abs().max())

    assert error(tokens.T @ tokens) > 1e-4  # what the setting does
    assert stats.gram is not None
    assert error(stats.gram) < 2e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_second_moments_of_16_bits_on_a_gpu(dtype: torch.dtype) -> None:
    """Tensor cores take such tokens as they are: what is left is the rounding of fp32 sums."""
    tokens = (60 + 3 * torch.randn(4608, 320, device="cuda")).to(dtype)
    exact = tokens.double().T @ tokens.double()
    stats = ActivationStats("x", 320, CalibrationOptions(gram=True))
    for _ in range(3):
        stats.update(tokens)
    assert stats.gram is not None and stats.gram.dtype == torch.float32
    # Small beside what the noise alone adds, which is all that a large mean leaves to see.
    noise = float((tokens - tokens.float().mean(0)).double().square().sum(0).mean())
    assert float((stats.gram.double() / 3 - exact).abs().max()) < 0.02 * noise
    other = tokens.roll(1, 0)
    assert float((other.double().T @ tokens.double() - exact).abs().max()) > 0.02 * noise
