"""low_rank: the branch is the best of its rank, and a model quantized with it is nearer."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from test_pipeline import Runner, Stats, fast, pixart, pixart_forward
from tiny_models import TINY, linears, load, run
from torch import Tensor, nn

import lrq_quant
from lrq_kernels import LRQLinear, checkpoint, load_quantized
from lrq_kernels.checkpoint import stored_bits
from lrq_kernels.testing import relative_error, sqnr_db
from lrq_quant import (
    CalibrationOptions,
    LRQConfig,
    QuantRecipe,
    collect_stats,
    fuse_blocks,
    fused_blocks,
    quantize_model,
)
from lrq_quant.__main__ import main
from lrq_quant.demo import WEIGHTS_FOLDER
from lrq_quant.families import MODULATION
from lrq_quant.low_rank import LowRankBranch, low_rank_branch
from lrq_quant.mixed_precision import stored_costs
from lrq_quant.pipeline_io import load_report, save_transformer

F32 = torch.float32
SIZES, K, R = (96, 40, 8), 64, 5


def weights(sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    """Of a slowly falling spectrum, with a few strong directions that all of them have."""
    strong = torch.randn(4, K)
    return [torch.randn(n, K) + 2 * torch.randn(n, 4) @ strong for n in sizes]


def loudness() -> Tensor:
    """RMS of channels, a few of them loud."""
    return (torch.rand(K) + 0.1) * (1 + 30 * (torch.rand(K) < 0.1))


def factors(stacked: Tensor, act_rms: Tensor) -> Tensor:
    """s of the module: sqrt(||w_k|| / rms(x_k))."""
    return (stacked.double().norm(dim=0) / act_rms.double()).sqrt()


def product(branch: LowRankBranch) -> Tensor:
    return torch.cat([up.double() @ branch.down.double() for up in branch.ups])


# ---- the branch of one input --------------------------------------------------------------------


@pytest.mark.parametrize("calibrated", [True, False])
def test_no_product_of_its_rank_leaves_less(calibrated: bool):
    """Against the SVD in float64, by Eckart and Young, but for bfloat16."""
    given, act_rms = weights(), loudness()
    branch = low_rank_branch(given, R, act_rms if calibrated else None)
    assert branch.down.dtype == torch.bfloat16 and branch.down.shape == (R, K)
    assert [up.shape for up in branch.ups] == [(n, R) for n in SIZES]
    stacked = torch.cat(given).double()
    scale = factors(stacked, act_rms) if calibrated else torch.ones(K)
    values = torch.linalg.svdvals(stacked / scale)
    least = float(values[R:].square().sum())
    assert float(((stacked - product(branch)) / scale).square().sum()) < 1.01 * least
    if calibrated:  # and how loud a channel is decides what it counts
        blind = stacked - product(low_rank_branch(given, R))
        assert float((blind / scale).square().sum()) > 1.02 * least


def test_rest_and_branch_are_the_weight():
    """Whatever the factors lost as they were rounded."""
    given = weights()
    branch = low_rank_branch(given, R, loudness())
    rest = torch.cat(branch.rest(given)).double()
    assert relative_error(rest + product(branch), torch.cat(given).double()) < 1e-6
    for part, weight, up in zip(branch.rest(given), given, branch.ups, strict=True):
        assert relative_error(part, weight.double() - up.double() @ branch.down.double()) < 1e-5


def test_full_rank_leaves_roundings_alone():
    given = weights((16, 8))
    branch = low_rank_branch(given, 24, loudness())
    assert relative_error(product(branch), torch.cat(given).double()) < 0.02


def test_is_the_same_every_time_and_of_one_size_in_both_factors():
    given, act_rms = weights(), loudness()
    first, second = (low_rank_branch(given, R, act_rms, seed=3) for _ in range(2))
    assert torch.equal(first.down, second.down)
    assert all(map(torch.equal, first.ups, second.ups))
    down = first.down.float().norm(dim=1)
    torch.testing.assert_close(torch.cat(first.ups).float().norm(dim=0), down, rtol=0.01, atol=0)


def test_silent_channels_and_zeros_have_a_branch():
    given, act_rms = weights(), loudness()
    blind = low_rank_branch(given, R)
    assert torch.equal(low_rank_branch(given, R, torch.zeros(K)).down, blind.down)
    act_rms[::3] = 0
    given = [weight * (torch.arange(K) % 5 > 0) for weight in given]
    branch = low_rank_branch(given, R, act_rms)
    heard = act_rms.double()
    rest = torch.cat(given).double() - product(branch)
    assert float((rest * heard).norm()) < float((torch.cat(given).double() * heard).norm())
    zeros = low_rank_branch([torch.zeros(8, K)], 2, act_rms)
    assert bool(torch.isfinite(zeros.down).all()) and not zeros.ups[0].any()


@pytest.mark.parametrize("rank", [0, K + 1])
def test_a_rank_that_the_weights_do_not_have_is_refused(rank: int):
    with pytest.raises(ValueError, match=f"rank must be from 1 to {K}, got {rank}"):
        low_rank_branch(weights(), rank)


def test_what_is_not_finite_is_refused():
    given = weights()
    given[1][3, 4] = float("nan")
    with pytest.raises(ValueError, match="weights must be finite"):
        low_rank_branch(given, R)
    with pytest.raises(ValueError, match="act_rms must be finite"):
        low_rank_branch(weights(), R, torch.full((K,), float("inf")))


# ---- calibration --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Weights with a few strong directions, as those of trained models have."""
    torch.manual_seed(11)
    made = pixart()
    for name, parameter in made.named_parameters():
        if parameter.dim() == 2 and "transformer_blocks" in name and "weight" in name:
            n, k = parameter.shape
            strong = torch.randn(n, 4) @ torch.randn(4, k)
            parameter.data += strong * (2 * parameter.std() / strong.std())
    return made


@pytest.fixture(scope="module")
def stats(model: nn.Module) -> Stats:
    groups = fast("w4a4").resolve(model).groups
    return collect_stats(Runner(model, 1), model, groups, ["a", "b"], CalibrationOptions(gram=True))


def output(model: nn.Module) -> Tensor:
    return pixart_forward(model, 4, torch.Generator().manual_seed(99))


@pytest.mark.parametrize("how", ["feedback", "nearest", "weights-only"])
def test_a_branch_lowers_the_error_at_the_same_scheme(
    model: nn.Module, stats: Stats, tmp_path: Path, how: str
) -> None:
    given = None if how == "weights-only" else stats
    errors, exact = {}, output(model)
    for rank in (0, 8):
        rounding = "feedback" if how == "weights-only" else how
        recipe = fast("w4a4", low_rank=rank, rounding=rounding)
        quantized = quantize_model(model, recipe, stats=given)
        file = quantized.save(tmp_path / f"{rank}.safetensors")
        errors[rank] = relative_error(output(load_quantized(copy.deepcopy(model), file)), exact)
        decibels = [linear.weight_sqnr_db for linear in quantized.report.linears
                    if linear.role != MODULATION]  # fmt: skip
        errors[rank, "weights"] = -min(decibels)
    assert errors[8] < 0.8 * errors[0]
    assert errors[8, "weights"] < errors[0, "weights"] - 1


def test_reported_errors_are_those_of_the_whole_linear(model: nn.Module) -> None:
    """Power of the whole weight over the error of what stands for it, branch included; where
    nothing is smoothed, the rotated domain has the same norms."""
    quantized = quantize_model(model, fast("w4a8", low_rank=8))
    for linear in quantized.report.linears:
        dense = LRQLinear.from_state(quantized.states[linear.name]).dense_weight()
        measured = sqnr_db(model.get_submodule(linear.name).weight, dense)
        assert linear.weight_sqnr_db == pytest.approx(measured, abs=0.05)


def test_linears_of_one_input_share_the_first_factor_and_modulation_has_none(
    model: nn.Module, stats: Stats, tmp_path: Path
) -> None:
    recipe = fast("w4a8", low_rank=8)
    quantized = quantize_model(model, recipe, stats=stats)
    plan = recipe.resolve(model)
    for group in plan.groups:
        states = [quantized.states[linear.name] for linear in group.linears]
        rank = 0 if group.linears[0].role == MODULATION else 8
        assert [state.low_rank for state in states] == [rank] * len(states)
        if rank:
            assert all(state.low_rank_down is states[0].low_rank_down for state in states)
    assert {linear.role for linear in plan.linears} > {MODULATION}
    report = quantized.report
    file = quantized.save(tmp_path / "model.safetensors")
    stored = checkpoint.load(file).states
    bits = {
        name: sum(n for field, n in stored_bits(state).items() if field != "bias")
        for name, state in stored.items()
    }
    assert {linear.name: linear.stored_bits for linear in report.linears} == bits
    plain = quantize_model(model, fast("w4a8"), stats=stats).report
    more = sum(
        16 * 8 * (group.in_features + group.weights // group.in_features)
        for group in plan.groups
        if group.linears[0].role != MODULATION
    )
    # Rotations may differ, by what they store.
    rotations = 40 * sum(group.in_features for group in plan.groups)
    total = sum(bits.values()) - sum(linear.stored_bits for linear in plain.linears)
    assert abs(total - more) <= rotations and more > rotations / 4
    assert "branches of rank 8" in report.summary()
    assert "branches" not in plain.summary()


def test_rank_is_no_more_than_the_weights_have(model: nn.Module) -> None:
    recipe = QuantRecipe.from_name("w4a8", low_rank=10**6)
    for group in recipe.resolve(model).groups:
        rows = sum(linear.out_features for linear in group.linears)
        expected = 0 if group.linears[0].role == MODULATION else min(group.in_features, rows)
        assert recipe.low_rank_of(group) == expected


@pytest.mark.parametrize("rank", [-1, 2.0, True, "8"])
def test_ranks_that_are_none_are_refused(rank: object) -> None:
    for make in (QuantRecipe, LRQConfig):
        with pytest.raises(ValueError, match=f"{make.__name__}: low_rank must be a whole number"):
            make(low_rank=rank)
    with pytest.raises(ValueError, match="low_rank must be 0 in mode 'paper', got 8"):
        QuantRecipe(mode="paper", low_rank=8)


@pytest.mark.parametrize("options", [{"low_rank": 8}, {"shared_tables": 4}])
def test_a_killed_run_continues_and_ends_the_same(
    options: dict[str, int], model: nn.Module, stats: Stats, tmp_path: Path
) -> None:
    recipe, work = fast("w4a8", **options), tmp_path / "work"

    def kill(what: str, done: int, total: int) -> None:
        if what == "quantization" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, recipe, stats=stats, work_folder=work, progress=kill)
    assert len(list(work.glob("group-*.json"))) > 2
    resumed = quantize_model(model, recipe, stats=stats, work_folder=work)
    whole = quantize_model(model, recipe, stats=stats)
    assert resumed.report.to_dict() == whole.report.to_dict()
    for name, state in whole.states.items():
        other = resumed.states[name]
        for field in ("codes", "levels", "table_of_row", "low_rank_down", "low_rank_up"):
            mine, kept = getattr(state, field), getattr(other, field)
            assert (mine is None and kept is None) or torch.equal(mine, kept), (name, field)
    # Another rank is another recipe: nothing that was kept is taken for it.
    ((option, value),) = options.items()
    half = fast("w4a8", **{option: value // 2})
    again = quantize_model(model, half, stats=stats, work_folder=work)
    assert {getattr(state, option) for state in again.states.values()} == {0, value // 2}


def test_a_budget_of_mixed_precision_counts_the_branch() -> None:
    model = TINY["pixart"][0]()
    bits = {}
    for rank in (0, 4):
        recipe = fast("w4a8", low_rank=rank, modulation=None)
        groups = {group.name: group for group in recipe.resolve(model).groups}
        costs = stored_costs({4: quantize_model(model, recipe).states}, groups)
        bits[rank] = {name: cost[4] for name, cost in costs.items()}
    for name, group in groups.items():
        outputs = sum(linear.out_features for linear in group.linears)
        assert bits[4][name] - bits[0][name] == 16 * 4 * (group.in_features + outputs), name


# ---- whole models -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["flux", "pixart"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny model, quantized from weights with a branch."""
    kind = request.param
    model = TINY[kind][0]()
    made = tmp_path_factory.mktemp(kind) / kind
    save_transformer(model, quantize_model(model, fast("w4a8", low_rank=8)), made)
    return made


def test_fused_blocks_decline_and_say_so(folder: Path) -> None:
    model = load(folder.name, folder, torch_dtype=F32)
    expected = run(model, folder.name, F32)
    fused = fuse_blocks(model)
    reasons = fused_blocks(fused)
    assert reasons and all("has a low-rank branch" in why for why in reasons.values() if why)
    assert None not in reasons.values()
    text = str(lrq_quant.check(fused))
    assert "blocks run unfused, by their own forward: " in text
    assert "of them have a low-rank branch, of rank 8" in text
    # Projections are fused and modulation is stacked, as ever, and the branch has its effect.
    assert lrq_quant.fused_projections(fused)
    error = relative_error(run(fused, folder.name, F32), expected.double())
    for linear in linears(fused).values():
        if linear.has_low_rank:
            linear.low_rank_up.zero_()
    assert error < 0.1 * relative_error(run(fused, folder.name, F32), expected.double())


def test_a_lora_acts_on_top(folder: Path) -> None:
    """What it adds to the output of a linear is its own product, of the same x."""
    kind = folder.name
    model = load(kind, folder, torch_dtype=F32)
    plain = run(model, kind, F32)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q", "to_out.0"]), model)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert layers and all(layer.base_layer.has_low_rank for layer in layers)
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        x = torch.randn(5, layer.in_features)
        added = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
        torch.testing.assert_close(layer(x), layer.base_layer(x) + added, rtol=1e-4, atol=1e-4)
    assert relative_error(run(model, kind, F32), plain.double()) > 0.05
    for layer in layers:
        layer.enable_adapters(False)
    assert torch.equal(run(model, kind, F32), plain)


def test_saved_again_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    model = load(folder.name, folder, torch_dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["low_rank"], config["format_version"]) == (8, 2)
    lrq_quant.fuse_projections(model).save_pretrained(tmp_path)
    again = load(folder.name, tmp_path, torch_dtype=torch.bfloat16)
    before, after = (checkpoint.load(at).states for at in (folder, tmp_path))
    for name, state in before.items():
        assert after[name].low_rank == state.low_rank
        if state.low_rank:
            assert torch.equal(after[name].low_rank_down, state.low_rank_down)
            assert torch.equal(after[name].low_rank_up, state.low_rank_up)
    first = load(folder.name, folder, torch_dtype=torch.bfloat16)
    assert torch.equal(run(again, folder.name), run(first, folder.name))


def test_without_a_branch_config_and_version_are_as_before(tmp_path: Path) -> None:
    model = TINY["pixart"][0]()
    save_transformer(model, quantize_model(model, fast("w4a8")), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "low_rank" not in config and config["format_version"] == 1


def test_quantized_while_it_loads(tmp_path: Path) -> None:
    """The linears of an input wait for each other, and make what quantize_model makes."""
    dense = TINY["flux"][0]()
    dense.save_pretrained(tmp_path / "dense")
    config = LRQConfig("w4a8", low_rank=8)
    model = type(dense).from_pretrained(
        tmp_path / "dense", quantization_config=config, torch_dtype=F32
    )
    expected = quantize_model(dense, QuantRecipe.from_name("w4a8", low_rank=8)).states
    assert linears(model).keys() == expected.keys()
    for name, linear in linears(model).items():
        state = linear.to_state()
        assert state.low_rank == expected[name].low_rank
        assert torch.equal(state.codes, expected[name].codes), name
        if state.low_rank:
            assert torch.equal(state.low_rank_down, expected[name].low_rank_down)
            assert torch.equal(state.low_rank_up, expected[name].low_rank_up)
    model.save_pretrained(tmp_path / "saved")
    assert checkpoint.load(tmp_path / "saved").states["transformer_blocks.0.attn.to_q"].low_rank


def test_dense_again_it_holds_the_branch(folder: Path) -> None:
    model = load(folder.name, folder, torch_dtype=F32)
    expected = {name: linear.dense_weight() for name, linear in linears(model).items()}
    model.dequantize()
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight)


def test_the_command_line_takes_a_rank(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "shapes"
    arguments = ["quantize", str(WEIGHTS_FOLDER), str(out), "--weights-only", "--device", "cpu"]
    assert main([*arguments, "--low-rank", "4", "--pictures", "0"]) == 0
    assert "branches of rank 4" in capsys.readouterr().out
    report = load_report(out)
    assert report.recipe["low_rank"] == 4
    assert main(["inspect", str(out)]) == 0
    assert "branches of rank 4" in capsys.readouterr().out
    assert main([*arguments[:2], str(tmp_path / "x"), "--weights-only", "--low-rank", "-1"]) == 1
    assert "low_rank must be a whole number" in capsys.readouterr().err
