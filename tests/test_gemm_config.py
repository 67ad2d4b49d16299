"""The table of GEMM configurations and the choice among them, on any machine."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
planner = pytest.importorskip("lrq_kernels._planner")

CONFIGS = planner.gemm_configs()
PORTABLE = [config for config in CONFIGS if config.arch == 80]
HOPPER = [config for config in CONFIGS if config.arch == 90]
ARCHS = (80, 86, 89, 90, 100, 120)

# (M, N, K) of real layers, and what a wrong rule would do there.
PROBLEMS = (
    (1, 64, 256),  # less than one tile every way
    (17, 1152, 1152),  # few tokens: the smallest tile spreads them widest
    (64, 12288, 3072),  # many channels fill the GPU at a middle tile
    (512, 3072, 3072),  # text tokens: the largest tile would leave SMs idle
    (4608, 12288, 3072),  # image tokens: the largest tile
)


@pytest.mark.parametrize("config", PORTABLE, ids=lambda config: config.name)
def test_every_portable_configuration_is_chosen_for_some_layer(config) -> None:  # type: ignore[no-untyped-def]
    chosen = {planner.select(*problem, 4, 90, sm90=False).name for problem in PROBLEMS}
    assert config.name in chosen


@pytest.mark.parametrize("sm90", (False, True))
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("bits", (2, 3, 4))
def test_chosen_configuration_is_legal(arch: int, bits: int, sm90: bool) -> None:
    for m, n, k in PROBLEMS:
        config = planner.select(m, n, k, bits, arch, sm90=sm90)
        assert config.is_legal(m, n, k, bits, arch)
        assert config.arch == (90 if sm90 and arch == 90 else 80)
        assert config.arch <= arch
        assert config.shared_bytes(bits) <= planner.max_shared_bytes(arch)


# (tile_m, tile_n, split_k) that was fastest, or within 2 % of it, on one H100 in November 2026.
@pytest.mark.parametrize(
    ("m", "n", "k", "tile_m", "tile_n", "split_k"),
    [
        (4608, 12288, 3072, 256, 128, 1),  # FLUX proj_mlp: many waves, the largest tile
        (4096, 9216, 3072, 256, 128, 1),
        (4608, 3072, 3072, 192, 192, 1),  # 256 tokens would leave a last wave of a quarter
        (4096, 1152, 4608, 192, 192, 1),  # PixArt: one wave of exactly 132 tiles
        (4096, 3456, 1152, 192, 192, 1),  # three of them
        (512, 3072, 12288, 128, 192, 2),  # 64 tiles, half the GPU
        (512, 3072, 3072, 128, 192, 2),
        (512, 12288, 3072, 256, 128, 1),  # 192 tiles, 60 of them in halves
        (64, 18432, 3072, 128, 192, 1),  # 96 tiles, where 144 of 128 channels are two waves
        (256, 3072, 12288, 256, 128, 4),
        (256, 3072, 3072, 128, 128, 2),
        (64, 3072, 12288, 64, 128, 4),
        (16, 18432, 3072, 128, 192, 1),
        (16, 9216, 3072, 16, 128, 1),  # fewer channel tiles than SMs
        (300, 1152, 1152, 32, 128, 1),
    ],
)
def test_hopper_tiles_that_were_fastest_are_chosen(
    m: int, n: int, k: int, tile_m: int, tile_n: int, split_k: int
) -> None:
    config = planner.select(m, n, k, 4, 90)
    assert (config.tile_m, config.tile_n, config.split_k) == (tile_m, tile_n, split_k)


def test_selection_is_within_5_percent_of_the_fastest_configuration() -> None:
    """Of every Hopper row on the shapes of real layers, as an H100 ran them, and an H200 those with
    a tail. Rows that differ in the cluster alone take the same clocks, so the smaller figure of the
    two counts for both."""
    too_slow = []
    files = [ROOT / "benchmarks" / f"gemm_configs_{gpu}.json" for gpu in ("h100", "h200")]
    tables = [json.loads(file.read_text())["us"] for file in files]
    for bits, shapes in itertools.chain(*(table.items() for table in tables)):
        for shape, measured in shapes.items():
            times: dict[str, float] = {}
            for name, us in measured.items():
                tile = name.replace("_c2", "")
                times[tile] = min(us, times.get(tile, us))
            chosen = planner.select(*map(int, shape.split("x")), int(bits), 90).name
            ratio = times[chosen.replace("_c2", "")] / min(times.values())
            if ratio > 1.05:
                too_slow.append((bits, shape, chosen, round(ratio, 3)))
    assert too_slow == []


def test_hopper_rows_run_on_hopper_alone_and_clusters_want_whole_groups() -> None:
    for config in HOPPER:
        assert [arch for arch in ARCHS if config.is_legal(300, 768, 1024, 4, arch)] == [90]
        # Three channel tiles of 128, or two of 192; two k tiles.
        whole_groups = config.cluster == 1 or config.tile_n == 192
        # A part of K for three consumers has two k tiles.
        steps = config.split_k * (2 if config.tile_n == 192 else 1)
        parts = config.split_k == 1 or steps <= 2
        assert config.is_legal(300, 384, 256, 4, 90) == (whole_groups and parts)


def test_hopper_rows_are_chosen_on_hopper_alone() -> None:
    for problem in PROBLEMS:
        assert planner.select(*problem, 4, 90).arch == 90
        assert all(planner.select(*problem, 4, arch).arch == 80 for arch in ARCHS if arch != 90)


def test_configuration_prints_its_tile() -> None:
    text = repr(planner.select(4608, 3072, 3072, 4, 80))
    assert "tile_m=128" in text and "stages=" in text


def test_old_gpu_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"8\.0 or newer, got 7\.5"):
        planner.select(128, 128, 128, 4, 75)


@pytest.mark.parametrize(
    "problem",
    [(0, 128, 128, 4), (128, 128, 128, 5), (2**31, 128, 128, 4), (128, 128, 131072, 4)],
    ids=["no tokens", "5 bits", "more tokens than int32", "sums past int32"],
)
def test_impossible_problem_is_named(problem: tuple[int, int, int, int]) -> None:
    m, n, k, bits = problem
    with pytest.raises(ValueError, match=f"M={m}, N={n}, K={k}, weight_bits={bits}"):
        planner.select(*problem, 90)


@pytest.mark.parametrize(
    ("problem", "tile"),
    [
        ((4608, 12288, 3072), (256, 128)),  # products bound it
        ((64, 12288, 3072), (64, 128)),  # decoding does: no more tokens than there are
        ((32, 18432, 3072), (64, 192)),  # 144 tiles of 128 channels would be two waves
        ((300, 2304, 1152), (64, 128)),  # larger ones would leave SMs idle
        ((4096, 1152, 4608), None),  # a small weight, tiles that fill one wave and a half
    ],
)
def test_way_of_16_bit_activations(
    problem: tuple[int, int, int], tile: tuple[int, int] | None
) -> None:
    chosen = planner.a16_tile(*problem, 4, 132)
    assert (planner.a16_tiles()[chosen] if chosen >= 0 else None) == tile


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_ways_of_16_bit_activations_exist_and_few_tokens_do_not_dequantize(bits: int) -> None:
    """Writing a large weight in 16 bits costs more than few tokens are worth."""
    for n, k in ((1152, 1152), (3072, 3072), (18432, 3072)):
        tiles = {planner.a16_tile(m, n, k, bits, 132) for m in range(17, 9000, 61)}
        assert tiles <= set(range(-1, len(planner.a16_tiles())))
    assert all(planner.a16_tile(m, 18432, 3072, bits, 132) >= 0 for m in range(17, 600))


# ---- the walk over tiles ------------------------------------------------------------------------


@pytest.mark.parametrize("config", HOPPER, ids=lambda config: config.name)
def test_clusters_walk_over_every_tile_once(config) -> None:  # type: ignore[no-untyped-def]
    groups_of = config.cluster * config.tile_n
    for _ in range(40):
        m = int(torch.randint(1, 6000, ()))
        groups = int(torch.randint(1, 60, ()))
        sms = int(torch.randint(1, 140, ()))
        walks = planner.walks(config, m, groups * groups_of, 3072, 4, sms)
        covered = torch.zeros(groups, m + 2 * config.tile_m, dtype=torch.int32)
        for walk in walks:
            assert walk  # a cluster that is launched has work
            for token, tokens, group in walk:
                covered[group, token : token + tokens] += 1
        assert bool((covered[:, :m] == 1).all()), (m, groups, sms)
        assert not bool((covered > 1).any())
        # The parts of the tail come last, one a cluster.
        assert all(tokens == config.tile_m for walk in walks for _, tokens, _ in walk[:-1])


@pytest.mark.parametrize(
    ("m", "n", "lengths", "tokens"),
    [
        (4608, 12288, [14] * 48 + [13] * 18, 32),  # 864 tiles on 66 clusters leave 6
        (1024, 9216, [3] * 48 + [2] * 18, 64),  # 144 leave 12
        (512, 12288, [2] * 60 + [1] * 6, 128),  # 96 leave 30
        (4096, 12288, [12] * 42 + [11] * 24, 256),  # 768 leave 42, too many
    ],
)
def test_a_last_wave_of_few_tiles_is_cut_into_parts(
    m: int, n: int, lengths: list[int], tokens: int
) -> None:
    config = next(config for config in HOPPER if config.name == "sm90_m256_c2")
    walks = planner.walks(config, m, n, 3072, 4, 132)
    assert [len(walk) for walk in walks] == lengths
    last = {walk[-1][1] for walk in walks if len(walk) == max(lengths)}
    assert last == {tokens}


def test_walks_of_what_is_no_hopper_tile_are_refused() -> None:
    with pytest.raises(ValueError, match=r"walks: needs a configuration of arch 90.*sm80_m128"):
        planner.walks(PORTABLE[0], 128, 128, 128, 4, 132)
