"""smoothing: the product is unchanged, outliers move, and no channel breaks it."""

from __future__ import annotations

import logging

import pytest
import torch

from lrq_kernels.exact_math import fits_bf16
from lrq_quant.smoothing import MAX_FACTOR, smooth_scale, to_bf16, weight_absmax


def test_product_is_unchanged() -> None:
    x, weight = torch.randn(32, 64, dtype=torch.float64), torch.randn(48, 64, dtype=torch.float64)
    s = smooth_scale(x.abs().amax(0), weight.abs().amax(0), 0.5).double()
    torch.testing.assert_close((x * s) @ (weight / s).T, x @ weight.T)


def test_alpha_half_balances_activation_and_weight() -> None:
    x, weight = torch.randn(512, 64), torch.randn(48, 64)
    x[:, 5] *= 245
    act, peak = x.abs().amax(0), weight.abs().amax(0)
    s = smooth_scale(act, peak, 0.5)
    ratio = (act * s) / (peak / s)
    torch.testing.assert_close(ratio, ratio[:1].expand(64))


def test_alpha_one_equalizes_the_activation_and_zero_ignores_it() -> None:
    act, peak = torch.rand(64) + 0.1, torch.rand(64) + 0.1
    equalized = act * smooth_scale(act, peak, 1.0)
    torch.testing.assert_close(equalized, equalized[:1].expand(64))
    torch.testing.assert_close(smooth_scale(act, peak, 0.0), smooth_scale(act * 9, peak, 0.0))


def test_published_form_is_not_normalized() -> None:
    act, peak = torch.rand(64) + 0.1, torch.rand(64) + 0.1
    published = smooth_scale(act, peak, 0.5, normalize=False)
    torch.testing.assert_close(published, (peak / act).sqrt())
    normalized = smooth_scale(act, peak, 0.5)
    assert float(normalized.log().mean()) == pytest.approx(0, abs=1e-5)


def test_dead_channels_get_factor_one_and_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    act, peak = torch.rand(64) + 5, torch.rand(64) + 0.1
    act[3], peak[9] = 0.0, 0.0
    with caplog.at_level(logging.WARNING):
        s = smooth_scale(act, peak, 0.5, name="blocks.0.to_q")
    assert s[3] == 1 and s[9] == 1
    assert "blocks.0.to_q: 2 of 64 channels are dead" in caplog.text
    caplog.clear()
    smooth_scale(act, peak, 0.5)
    assert not caplog.text


@pytest.mark.parametrize("normalize", [True, False])
def test_factors_are_always_finite_and_positive(normalize: bool) -> None:
    act, peak = torch.rand(64) + 0.1, torch.rand(64) + 0.1
    act[0], act[1], peak[2] = 1e-38, 1e38, 1e-38
    s = smooth_scale(act, peak, 0.7, normalize=normalize)
    assert torch.isfinite(s).all() and (s > 0).all()
    assert float(s.max() / s.min()) <= MAX_FACTOR**2 * 1.01
    nothing = smooth_scale(torch.zeros(64), peak, 0.5, normalize=normalize)
    assert (nothing == 1).all()


def test_weight_absmax_is_over_all_linears_of_the_input() -> None:
    q, k = torch.randn(16, 64), torch.randn(32, 64)
    assert torch.equal(weight_absmax([q, k]), torch.cat([q, k]).abs().amax(0))


def test_factors_in_bf16_are_the_nearest() -> None:
    scale = torch.exp(2 * torch.randn(4096)).clamp(1 / MAX_FACTOR, MAX_FACTOR)
    rounded = to_bf16(scale)
    assert fits_bf16(rounded) and not fits_bf16(scale)
    assert float(((rounded - scale) / scale).abs().max()) <= 2.0**-8
    assert torch.equal(to_bf16(rounded), rounded)


def test_bad_input_is_named() -> None:
    good = torch.ones(8)
    with pytest.raises(ValueError, match="alpha must be in"):
        smooth_scale(good, good, 1.5)
    with pytest.raises(ValueError, match="act must be finite"):
        smooth_scale(good * float("nan"), good, 0.5)
    with pytest.raises(ValueError, match="of one K"):
        smooth_scale(good, torch.ones(9), 0.5)
