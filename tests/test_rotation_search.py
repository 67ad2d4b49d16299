"""rotation_search: what is chosen is what measures best, and the candidates are what they claim."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lrq_kernels import QuantScheme, TwinLogCodebook, unpack_codes
from lrq_kernels.exact_math import fits_bf16
from lrq_kernels.rotation import Rotation
from lrq_quant import rotation_search
from lrq_quant.calibration import ActivationStats
from lrq_quant.pipeline import quantize_linear
from lrq_quant.recipe import SearchOptions
from lrq_quant.rotation_search import (
    RotationChoice,
    SearchedLinear,
    choose_rotation,
    choose_rotation_paper,
    data_free_rotation,
    dequantized_activation,
    dual_rotation,
    largest_block,
    zigzag_permutation,
)
from lrq_quant.twin_log import sqnr_db


def stats_of(x: Tensor, name: str = "layer") -> ActivationStats:
    stats = ActivationStats(name, x.shape[-1])
    stats.update(x)
    return stats


def linears(name: str, *weights: Tensor) -> list[SearchedLinear]:
    return [SearchedLinear(weight, QuantScheme.from_name(name)) for weight in weights]


def output_db(choice: RotationChoice, scheme: QuantScheme, x: Tensor, weight: Tensor) -> float:
    """Output SQNR of the finished layer on tokens x, by the reference arithmetic."""
    full = choice.scheme(scheme)
    state = quantize_linear(
        weight, None, full, smooth_scale=choice.smooth_scale, rotation=choice.rotation
    )
    smoothed = x if choice.smooth_scale is None else x * choice.smooth_scale
    x_q = dequantized_activation(
        choice.rotation.apply(smoothed), full.act_bits, full.scale_mode, full.scale_factor
    )
    codes = unpack_codes(state.codes, full.weight_bits, weight.shape[1])
    decoded = TwinLogCodebook(state.levels, state.weight_scale).decode(codes)
    return sqnr_db(x @ weight.T, x_q @ decoded.T)


# Small problems: a test is about the decision, not about its last percent.
FAST = SearchOptions(alphas=(0.5,), sample_rows=192, weight_rows=96, dual_steps=16)


def test_a_salient_channel_is_handled() -> None:
    """One channel at 245 (PixArt): without smoothing no rotation saves int4 tokens (method.md
    5.11). The statistics are of other tokens than those that the layer is judged on."""
    x, weight = torch.randn(1500, 384), torch.randn(128, 384) * 0.05
    x[:, 77] *= 245
    # The output that matters is not that of the one channel.
    weight[:, 77] *= 0.02
    scheme = QuantScheme.from_name("w4a4")
    choice = choose_rotation(stats_of(x[:1000]), linears("w4a4", weight), FAST)
    assert choice.alpha == 0.5 and choice.smooth_scale is not None
    assert fits_bf16(choice.smooth_scale)
    assert choice.peak_ratio is not None and choice.peak_ratio > 15
    assert float(choice.smooth_scale[77] / choice.smooth_scale.median()) < 0.05
    ours = output_db(choice, scheme, x[1000:], weight)
    plain = data_free_rotation("layer", 384, scheme)
    assert ours > output_db(plain, scheme, x[1000:], weight) + 6


def test_the_cheapest_within_the_tolerance_wins() -> None:
    x, weight = torch.randn(600, 256), torch.randn(128, 256)
    choice = choose_rotation(stats_of(x), linears("w4a8", weight), FAST)
    best = min(choice.errors.values())
    assert choice.errors[choice.label] <= best * (1 + FAST.tolerance)
    greedy = choose_rotation(
        stats_of(x), linears("w4a8", weight), SearchOptions(alphas=(0.5,), tolerance=1.0)
    )
    # With a wide tolerance nothing beats doing nothing.
    assert greedy.rotation.kind == "none"


def test_the_reported_error_is_that_of_the_layer_on_fresh_tokens() -> None:
    x, weight = torch.randn(2000, 256) * torch.exp(torch.randn(256)), torch.randn(96, 256)
    for name in ("w4a4", "w3a8"):
        choice = choose_rotation(stats_of(x[:1000]), linears(name, weight), FAST)
        reported = -10 * torch.log10(torch.tensor(choice.errors[choice.label]))
        fresh = output_db(choice, QuantScheme.from_name(name), x[1000:], weight)
        assert fresh == pytest.approx(float(reported), abs=1.0)


def test_errors_are_those_of_rows_with_full_gain() -> None:
    """Clipping takes 2 to 3 % of every product at the int4 scale of least error, W2 12 %."""
    x, weight = torch.randn(4000, 256), torch.randn(96, 256)
    choice = choose_rotation(stats_of(x[:2000]), linears("w2a4", weight), FAST)
    reported = choice.errors[choice.label]
    noise = 10 ** (-output_db(choice, QuantScheme.from_name("w2a4"), x[2000:], weight) / 10)
    # What is left of an error of which the lost gain was a part: D / (1 - D).
    lloyd = 0.118
    assert lloyd / (1 - lloyd) < reported < 1.15 * noise


def test_candidates_measured_together_are_those_measured_alone(monkeypatch) -> None:
    """Of linears of two widths, whatever fits into one go."""
    x = torch.randn(300, 256) * torch.rand(256).exp()
    weights = [torch.randn(24, 256), torch.randn(40, 256)]
    given = [
        SearchedLinear(weight, QuantScheme.from_name(name), bias_correction=correct)
        for weight, name, correct in zip(weights, ("w4a4", "w2a4"), (True, False), strict=True)
    ]
    found = []
    for together in (1, 256 * 300 * 5, 1 << 30):
        monkeypatch.setitem(rotation_search._TOGETHER, "cpu", together)
        found.append(choose_rotation(stats_of(x), given, SearchOptions(alphas=(0.4, 0.6))))
    assert len(found[0].errors) > 3
    for other in found[1:]:
        assert other.label == found[0].label and other.scale_mode == found[0].scale_mode
        assert other.errors == pytest.approx(found[0].errors, rel=1e-5)


def test_int4_scale_is_chosen_by_error() -> None:
    """Absmax costs 2 dB on rotated int4 tokens; the published rule keeps it."""
    x, weight = torch.randn(800, 1024), torch.randn(64, 1024)
    stats = stats_of(x)
    choice = choose_rotation(stats, linears("w4a4", weight), FAST)
    assert (choice.scale_mode, choice.scale_factor) != ("absmax", 1.0)
    paper = choose_rotation_paper(stats, [weight], FAST)
    scheme = QuantScheme.from_name("w4a4")
    assert output_db(choice, scheme, x, weight) > output_db(paper, scheme, x, weight) + 1


def test_one_choice_for_all_linears_of_the_input() -> None:
    x = torch.randn(400, 256)
    choice = choose_rotation(
        stats_of(x),
        [
            SearchedLinear(torch.randn(32, 256), QuantScheme(3, 8)),
            SearchedLinear(torch.randn(200, 256), QuantScheme(4, 8), bias_correction=True),
        ],
        FAST,
    )
    assert choice.scheme(QuantScheme(3, 8)).weight_bits == 3
    with pytest.raises(ValueError, match="one act_bits"):
        mixed = [*linears("w4a8", torch.randn(8, 256)), *linears("w4a4", torch.randn(8, 256))]
        choose_rotation(stats_of(x), mixed, FAST)


def test_same_name_same_choice_and_other_name_other_signs() -> None:
    x, weight = torch.randn(300, 256), torch.randn(64, 256)
    options = SearchOptions(rotations=("hadamard",), alphas=())
    first, again = (choose_rotation(stats_of(x), linears("w4a8", weight), options) for _ in "ab")
    other = choose_rotation(stats_of(x, "other"), linears("w4a8", weight), options)
    assert torch.equal(first.rotation.signs, again.rotation.signs)
    assert first.errors == again.errors
    assert not torch.equal(first.rotation.signs, other.rotation.signs)


def test_regular_signs_are_chosen_where_channels_share_a_mean() -> None:
    """Of a large mean random signs leave some coefficients with three times their share.

    The median of nine draws: how the mean itself happens to round decides one draw in sixteen (the
    ratio is 0.45 in the median of 300, and above 0.95 in 17)."""
    options = replace(FAST, rotations=("hadamard", "regular"), alphas=())
    only_random = replace(options, rotations=("hadamard",))
    ratios, regulars = [], 0
    for _ in range(9):
        stats, weight = stats_of(torch.randn(400, 512) + 12), torch.randn(64, 512)
        choice = choose_rotation(stats, linears("w4a4", weight), options)
        if choice.label.startswith("regular"):
            regulars += 1
            regular = Rotation.regular(512, choice.rotation.block_size)
            assert torch.equal(choice.rotation.signs, regular.signs)
        random = choose_rotation(stats, linears("w4a4", weight), only_random)
        ratios.append(choice.errors[choice.label] / random.errors[random.label])
    assert regulars >= 5
    assert sorted(ratios)[4] < 0.95


@pytest.mark.parametrize(("width", "block"), [(192, 64), (96, 32), (1152, 128), (12288, 1024)])
def test_block_falls_back_where_128_does_not_divide(width: int, block: int) -> None:
    assert largest_block(width) == block
    assert largest_block(width + 16) == 0 or (width + 16) % 32 == 0
    if width > 1000:
        return
    options = SearchOptions(rotations=("hadamard", "dual"), alphas=())
    weight = torch.randn(32, width)
    choice = choose_rotation(stats_of(torch.randn(100, width)), linears("w4a8", weight), options)
    assert choice.rotation.block_size == block
    assert f"K = {width} has no block above {block}" in choice.why


def test_dual_is_not_tried_where_its_matrices_weigh_more_than_the_codes() -> None:
    x, weight = torch.randn(200, 256), torch.randn(64, 256)
    options = SearchOptions(alphas=(), dual_steps=4)
    choice = choose_rotation(stats_of(x), linears("w4a4", weight), options)
    assert not any("dual" in label for label in choice.errors)
    allowed = SearchOptions(alphas=(), dual_steps=4, max_dual_bits=1e9)
    choice = choose_rotation(stats_of(x), linears("w4a4", weight), allowed)
    assert any("dual" in label for label in choice.errors)


def test_a_permutation_that_is_folded_is_preferred() -> None:
    """Of the channels that a feed-forward makes alone, where that spreads the loud ones as well."""
    attention, made = 256, 1024
    x, weight = torch.randn(800, attention + made), torch.randn(64, attention + made)
    x[:, attention : attention + 128] *= 12  # one block holds nearly all
    x[:, :attention] *= 4.3  # as loud as a block of the others, once that is spread
    options = SearchOptions(
        rotations=("hadamard", "permuted"),
        alphas=(),
        tolerance=0.06,  # the two lie 1 to 3 % apart
        sample_rows=256,
        weight_rows=64,
    )
    given = (stats_of(x), linears("w4a4", weight), options)
    anywhere = choose_rotation(*given)
    choice = choose_rotation(*given, first_made=attention)
    assert anywhere.label.startswith("permuted") and "part" not in anywhere.label
    assert choice.label.startswith("permuted-part")
    moved = choice.rotation.permutation
    assert torch.equal(moved[:attention], torch.arange(attention, dtype=torch.int32))
    assert not torch.equal(moved, torch.arange(attention + made, dtype=torch.int32))
    best = min(choice.errors.values())
    assert choice.errors[choice.label] <= best * (1 + options.tolerance)
    assert not any("hadamard" in label for label in choice.errors)  # hopeless without one
    # Loud heads can be spread by a gather alone, which is then worth it.
    x[:, :128] *= 8
    given = (stats_of(x), *given[1:])
    loud = choose_rotation(*given, first_made=attention)
    assert loud.label.startswith("permuted") and "part" not in loud.label
    # Blocks that hold channels of both cannot keep them apart.
    across = choose_rotation(*given, first_made=attention - 64)
    assert not any("part" in label for label in across.errors)


def test_weight_only_inputs_have_no_activation_error() -> None:
    """Modulation: a row a step, 16-bit tokens."""
    x, weight = torch.randn(20, 256), torch.randn(64, 256)
    choice = choose_rotation(stats_of(x), linears("w4a16", weight), FAST)
    assert (choice.scale_mode, choice.scale_factor) == ("absmax", 1.0)
    assert choice.errors[choice.label] < 0.012


def test_paper_mode_decides_by_j() -> None:
    weight = torch.randn(64, 256)
    mild, salient = torch.randn(300, 256) * 0.9, torch.randn(300, 256)
    salient[:, 3] *= 245
    choice = choose_rotation_paper(stats_of(mild), [weight])
    assert choice.rotation.kind == "hadamard" and choice.rotation.block_size == 256
    assert choice.j is not None and choice.j < 1 and "below 1" in choice.why
    choice = choose_rotation_paper(stats_of(salient), [weight])
    assert choice.rotation.kind == "dual" and choice.j is not None and choice.j >= 1
    assert (choice.alpha, choice.scale_mode, choice.scale_factor) == (0.5, "absmax", 1.0)
    expected = (weight.abs().amax(0) / salient.abs().amax(0)).sqrt()
    torch.testing.assert_close(choice.smooth_scale, expected)


def test_without_data_the_scheme_decides() -> None:
    choice = data_free_rotation("layer", 192, QuantScheme(4, 8, block_size=128))
    assert choice.rotation.block_size == 64 and choice.smooth_scale is None
    again = data_free_rotation("layer", 192, QuantScheme(4, 8, block_size=128))
    assert torch.equal(choice.rotation.signs, again.rotation.signs)
    none = data_free_rotation("layer", 192, QuantScheme(4, 16, rotation="none"))
    assert none.rotation.kind == "none"
    with pytest.raises(ValueError, match="layer: rotation 'dual' needs calibration"):
        data_free_rotation("layer", 256, QuantScheme(4, 8, rotation="dual"))


def test_dead_channels_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(200, 128)
    x[:, 5] = 0
    with caplog.at_level(logging.WARNING):
        choice = choose_rotation(stats_of(x), linears("w4a8", torch.randn(32, 128)))
    assert [r.getMessage() for r in caplog.records if "dead" in r.getMessage()] == [
        "smoothing of layer: 1 of 128 channels are dead in calibration, their factor is 1"
    ]
    assert choice.smooth_scale is None or choice.smooth_scale[5] == 1


def test_zigzag_spreads_the_heaviest_channels_and_balances_the_blocks() -> None:
    """Fault D3: the published stride of 9 leaves most blocks without an outlier at 4608."""
    mass = torch.exp(2 * torch.randn(4608))
    permutation = zigzag_permutation(mass, 128)
    Rotation.hadamard(4608, 128, permutation=permutation).validate(4608)
    blocks = mass[permutation.long()].view(36, 128)
    heaviest = mass.topk(36).values.min()
    assert torch.equal((blocks >= heaviest).sum(1), torch.ones(36, dtype=torch.int64))
    even = torch.linspace(1, 2, 4608)
    sums = even[zigzag_permutation(even, 128).long()].view(36, 128).sum(1)
    assert float(sums.max() / sums.min()) < 1.001


def test_dual_rotation_is_orthogonal_and_lowers_the_peak() -> None:
    x = torch.randn(256, 384)
    x[:, 7] *= 60
    rotation = dual_rotation(x, torch.Generator().manual_seed(0), steps=32)
    rotation.validate(384)
    rotated = rotation.apply(x)
    torch.testing.assert_close(rotation.inverse(rotated), x, rtol=1e-3, atol=1e-3)
    hadamard = Rotation.hadamard(384, 128, generator=torch.Generator().manual_seed(0)).apply(x)
    assert rotated.abs().max() < hadamard.abs().max() * 1.1 < x.abs().max() / 4
    again = dual_rotation(x, torch.Generator().manual_seed(0), steps=32)
    assert torch.equal(rotation.matrices, again.matrices)


def test_statistics_without_a_sample_are_refused() -> None:
    with pytest.raises(ValueError, match="hold no sample"):
        choose_rotation(ActivationStats("x", 128), linears("w4a8", torch.randn(8, 128)))
    with pytest.raises(ValueError, match="must have K = 128"):
        choose_rotation(stats_of(torch.randn(9, 128)), linears("w4a8", torch.randn(8, 64)))
