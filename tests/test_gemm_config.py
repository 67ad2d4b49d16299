"""The table of GEMM configurations and the choice among them, on any machine."""

from __future__ import annotations

import pytest

planner = pytest.importorskip("lrq_kernels._planner")

CONFIGS = planner.gemm_configs()
ARCHS = (80, 86, 89, 90, 100, 120)

# (M, N, K) of real layers, and what a wrong rule would do there.
PROBLEMS = (
    (1, 64, 256),  # less than one tile every way
    (17, 1152, 1152),  # few tokens: the smallest tile spreads them widest
    (64, 12288, 3072),  # many channels fill the GPU at a middle tile
    (512, 3072, 3072),  # text tokens: the largest tile would leave SMs idle
    (4608, 12288, 3072),  # image tokens: the largest tile
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_every_configuration_is_chosen_for_some_layer(config) -> None:  # type: ignore[no-untyped-def]
    chosen = {planner.select(*problem, 4, 90).name for problem in PROBLEMS}
    assert config.name in chosen


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("bits", (2, 3, 4))
def test_chosen_configuration_is_legal(arch: int, bits: int) -> None:
    for m, n, k in PROBLEMS:
        config = planner.select(m, n, k, bits, arch)
        assert config.is_legal(m, n, k, bits, arch)
        assert config.arch <= arch
        assert config.shared_bytes(bits) <= planner.max_shared_bytes(arch)
        assert planner.workspace_bytes(config, m, n, k, bits) == 0


def test_configuration_prints_its_tile() -> None:
    text = repr(planner.select(4608, 3072, 3072, 4, 90))
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
