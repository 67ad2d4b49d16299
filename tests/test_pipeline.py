"""pipeline: a real diffusers model end to end, and a run that is killed and continued."""

from __future__ import annotations

import copy
import os
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lrq_kernels import LRQLinear, QuantScheme, load, load_quantized, unpack_codes
from lrq_kernels.checkpoint import state_tensors, stored_bits
from lrq_kernels.codebook import TwinLogCodebook
from lrq_kernels.loader import build_linears
from lrq_quant import (
    ActivationStats,
    CalibrationOptions,
    QuantRecipe,
    QuantReport,
    SearchOptions,
    collect_stats,
    pipeline,
    quantize_linear,
    quantize_model,
)
from lrq_quant.rotation_search import dequantized_activation
from lrq_quant.twin_log import sqnr_db
from lrq_quant.work_folder import WorkFolder

diffusers = pytest.importorskip("diffusers")

Stats = dict[str, ActivationStats]
FAST = SearchOptions(alphas=(0.5,), sample_rows=128, weight_rows=64)


def fast(name: str, **changes: object) -> QuantRecipe:
    return QuantRecipe.from_name(name, search=FAST, **changes)


def pixart(blocks: int = 1) -> nn.Module:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=3,
        out_channels=3,
        num_layers=blocks,
        cross_attention_dim=128,
        sample_size=16,
        patch_size=4,
        caption_channels=32,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.eval().requires_grad_(False)


def pixart_forward(model: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
    return model(
        torch.randn(batch, 3, 16, 16, generator=generator),
        encoder_hidden_states=torch.randn(batch, 7, 32, generator=generator),
        timestep=torch.rand(batch, generator=generator) * 1000,
        return_dict=False,
    )[0]


class Runner:
    """Three denoising steps with both guidance halves; counts its calls. Latents follow the
    prompts, as those of a pipeline do: quantization runs them again for the gram matrices."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model, self.seed, self.calls = model, seed, 0

    def __call__(self, prompts: list[str]) -> None:
        self.calls += 1
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(repr(prompts).encode()))
        for _ in range(3):
            pixart_forward(self.model, 2 * len(prompts), generator)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(7)
    return pixart()


@pytest.fixture(scope="module")
def stats(model: nn.Module) -> Stats:
    plan = fast("w4a8").resolve(model)
    options = CalibrationOptions(gram=True)
    return collect_stats(Runner(model, 1), model, plan.groups, ["a", "b", "c", "d"], options)


@pytest.mark.parametrize(("name", "bar"), [("w4a8", 20.0), ("w4a4", 14.0), ("w3a4", 11.0)])
def test_pixart_quantizes_saves_loads_and_draws_nearly_the_same(
    model: nn.Module,
    stats: Stats,
    tmp_path: Path,
    name: str,
    bar: float,
) -> None:
    quantized = quantize_model(model, fast(name), stats=stats)
    file = quantized.save(tmp_path / "model.safetensors")
    low_bit = load_quantized(copy.deepcopy(model), file)
    linears = {n for n, m in low_bit.named_modules() if isinstance(m, LRQLinear)}
    assert linears == set(quantized.states) and len(linears) == 11
    exact, ours = (
        pixart_forward(m, 2, torch.Generator().manual_seed(99)) for m in (model, low_bit)
    )
    assert sqnr_db(exact, ours) > bar


@pytest.mark.parametrize("rotation", ["none", "hadamard", "permuted", "dual"])
def test_every_rotation_survives_save_and_load(
    model: nn.Module, stats: Stats, tmp_path: Path, rotation: str
) -> None:
    """The order of smoothing, permutation and signs is the trap: a wrong one gives noise."""
    search = SearchOptions(
        rotations=(rotation,), alphas=(0.5,), sample_rows=64, dual_steps=8, max_dual_bits=1e9
    )
    quantized = quantize_model(model, QuantRecipe.from_name("w4a8", search=search), stats=stats)
    kinds = {state.scheme.rotation for state in quantized.states.values()}
    assert kinds == {{"permuted": "hadamard"}.get(rotation, rotation)}
    low_bit = load_quantized(copy.deepcopy(model), quantized.save(tmp_path / "m.safetensors"))
    exact, ours = (
        pixart_forward(m, 2, torch.Generator().manual_seed(99)) for m in (model, low_bit)
    )
    assert sqnr_db(exact, ours) > 20


def test_a_silent_model_is_quantized_all_the_same(model: nn.Module, stats: Stats) -> None:
    """Inputs that are zero in all of calibration: no NaN, no division by zero."""
    silent = {}
    for name, entry in stats.items():
        silent[name] = ActivationStats(name, entry.in_features, CalibrationOptions(gram=True))
        silent[name].update(torch.zeros(10, entry.in_features))
    for state in quantize_model(model, fast("w4a4"), stats=silent).states.values():
        assert torch.isfinite(state.weight_scale).all() and torch.isfinite(state.bias).all()
        assert state.smooth_scale is None or (state.smooth_scale == 1).all()


def test_members_of_a_group_share_smoothing_and_rotation(model: nn.Module, stats: Stats) -> None:
    recipe = fast("w4a4", overrides=(("*.to_k", QuantScheme(3, 4)),))
    states = quantize_model(model, recipe, stats=stats).states
    q, k, v = (states[f"transformer_blocks.0.attn1.to_{n}"] for n in "qkv")
    assert q.shared_input is None
    assert k.shared_input == v.shared_input == "transformer_blocks.0.attn1.to_q"
    assert k.scheme.weight_bits == 3 and k.scheme.act_bits == q.scheme.act_bits
    for other in (k, v):
        assert other.rotation is q.rotation and other.smooth_scale is q.smooth_scale


def test_report_counts_every_stored_bit(model: nn.Module, stats: Stats, tmp_path: Path) -> None:
    # To nearest: feedback gives up weight SQNR for output SQNR.
    quantized = quantize_model(model, fast("w4a8", rounding="nearest"), stats=stats)
    report = quantized.report
    by_state = {
        name: sum(bits for field, bits in stored_bits(state).items() if field != "bias")
        for name, state in quantized.states.items()
    }
    assert {linear.name: linear.stored_bits for linear in report.linears} == by_state
    total = sum(linear.weights for linear in report.linears)
    assert report.weight_bits == pytest.approx(sum(by_state.values()) / total)
    assert 4 < report.weight_bits < 6  # a codebook is one bit a weight at K = 128
    file = quantized.save(tmp_path / "model.safetensors")
    dense = sum(t.numel() * t.element_size() for t in quantized.dense.values())
    biases = sum(s.bias.numel() * 4 for s in quantized.states.values() if s.bias is not None)
    expected = sum(by_state.values()) / 8 + biases + dense
    header = file.stat().st_size - expected
    assert 0 < header < 40_000
    for linear in report.linears:
        assert linear.weight_sqnr_db > 17 and linear.output_sqnr_db > 17 and linear.j > 0
    again = QuantReport.from_dict(report.to_dict())
    assert again.to_dict() == report.to_dict() and again.table() == report.table()
    assert "transformer_blocks.0.attn1.to_q" in report.table()
    assert f"coverage {report.coverage:.2%}" in report.summary()


def test_reported_weight_error_is_that_of_the_state(model: nn.Module, stats: Stats) -> None:
    quantized = quantize_model(model, fast("w3a8"), stats=stats)
    for linear in quantized.report.linears:
        state = quantized.states[linear.name]
        codes = unpack_codes(state.codes, state.scheme.weight_bits, state.in_features)
        decoded = TwinLogCodebook(state.levels, state.weight_scale).decode(codes)
        weight = model.get_submodule(linear.name).weight.float()
        if state.smooth_scale is not None:
            weight = weight / state.smooth_scale
        rotated = state.rotation.apply(weight)
        assert linear.weight_sqnr_db == pytest.approx(sqnr_db(rotated, decoded), abs=0.01)
        if state.smooth_scale is None:  # orthogonal: the same in the original domain
            original = state.rotation.inverse(decoded)
            assert linear.weight_sqnr_db == pytest.approx(sqnr_db(weight, original), abs=0.01)


def test_what_clipping_takes_comes_back_without_feedback_too(model: nn.Module) -> None:
    """Rounded to nearest: products of sampled tokens as large as the exact ones, in all. The bias
    takes up the mean of what the codes stand for, which clipping has moved."""
    plan = fast("w4a4").resolve(model)
    stats = collect_stats(Runner(model, 1), model, plan.groups, [str(i) for i in range(24)])
    quantized = quantize_model(model, fast("w4a4", rounding="nearest"), stats=stats)
    clipped, means, errors = 0, 0.0, 0.0
    for group in plan.groups:
        tokens = stats[group.name].sample.float()
        for linear in group.linears:
            state = quantized.states[linear.name]
            scheme = state.scheme
            x = tokens if state.smooth_scale is None else tokens * state.smooth_scale
            x_q = dequantized_activation(
                state.rotation.apply(x), scheme.act_bits, scheme.scale_mode, scheme.scale_factor
            )
            codes = unpack_codes(state.codes, scheme.weight_bits, state.in_features)
            decoded = TwinLogCodebook(state.levels, state.weight_scale).decode(codes)
            module = model.get_submodule(linear.name)
            y, product = tokens @ module.weight.float().T, x_q @ decoded.T
            gain = float((y * product).sum() / y.square().sum())
            assert gain == pytest.approx(1, abs=0.012), (linear.name, gain)
            if scheme.act_bits == 4 and module.bias is not None:
                clipped += 1
                missing = (y + module.bias.float() - product - state.bias).mean(0)
                means += float(y.mean(0).square().sum())
                errors += float(missing.square().sum())
    assert clipped >= 10
    assert errors**0.5 < 0.009 * means**0.5


@pytest.mark.parametrize(("name", "gain"), [("w4a8", 2.0), ("w4a4", 0.8), ("w2a8", 2.0)])
def test_feedback_lowers_the_error_of_tokens_it_never_saw(
    model: nn.Module, name: str, gain: float
) -> None:
    """Whole model, fresh latents: gain in dB over rounding to nearest, with the same rotations."""
    plan, options = fast(name).resolve(model), CalibrationOptions(gram=True)
    prompts = [str(i) for i in range(24)]
    stats = collect_stats(Runner(model, 1), model, plan.groups, prompts, options)
    errors = {}
    exact = pixart_forward(model, 8, torch.Generator().manual_seed(1234))
    for rounding in ("nearest", "feedback"):
        states = quantize_model(model, fast(name, rounding=rounding), stats=stats).states
        low_bit = copy.deepcopy(model)
        for layer, linear in build_linears(states, torch.float32).items():
            low_bit.set_submodule(layer, linear)
        ours = pixart_forward(low_bit, 8, torch.Generator().manual_seed(1234))
        errors[rounding] = sqnr_db(exact, ours)
    assert errors["feedback"] > errors["nearest"] + gain, errors


def test_feedback_of_few_tokens_does_no_harm(model: nn.Module, stats: Stats) -> None:
    """384 tokens for up to 512 channels: moments that say little must not be trusted."""
    exact = pixart_forward(model, 8, torch.Generator().manual_seed(1234))
    errors = {}
    for rounding in ("nearest", "feedback"):
        states = quantize_model(model, fast("w4a4", rounding=rounding), stats=stats).states
        low_bit = copy.deepcopy(model)
        for layer, linear in build_linears(states, torch.float32).items():
            low_bit.set_submodule(layer, linear)
        ours = pixart_forward(low_bit, 8, torch.Generator().manual_seed(1234))
        errors[rounding] = sqnr_db(exact, ours)
    assert errors["feedback"] > errors["nearest"], errors


def test_feedback_without_gram_matrices_is_an_error(model: nn.Module, stats: Stats) -> None:
    bare = {}
    for name, entry in stats.items():
        tensors = {part: t for part, t in entry.tensors().items() if part != "gram"}
        bare[name] = ActivationStats.from_tensors(name, tensors)
    with pytest.raises(
        ValueError, match="needs the gram matrix of transformer_blocks.0.attn1.to_q"
    ):
        quantize_model(model, fast("w4a8"), stats=bare)
    quantize_model(model, fast("w4a8", rounding="nearest"), stats=bare)


def test_gram_matrices_come_in_parts_that_fit(model: nn.Module) -> None:
    """A small limit runs the prompts more often and changes nothing."""
    results, calls = [], []
    for limit in (1, 1 << 40):
        options = CalibrationOptions(gram_bytes=limit)
        runner = Runner(model, 5)
        recipe = fast("w4a4", calibration=options)
        results.append(quantize_model(model, recipe, run=runner, prompts=["a"]).states)
        calls.append(runner.calls)
    assert calls == [1 + len(fast("w4a4").resolve(model).groups), 2]
    for name, state in results[0].items():
        assert torch.equal(state.codes, results[1][name].codes), name
        assert torch.equal(state.bias, results[1][name].bias), name


def test_paper_mode_is_the_published_method(model: nn.Module, stats: Stats) -> None:
    quantized = quantize_model(model, fast("w4a4", mode="paper"), stats=stats)
    for linear in quantized.report.linears:
        assert linear.alpha == 0.5
        assert (linear.scheme.rotation == "dual") == (linear.j >= 1)
        assert (linear.scheme.scale_mode, linear.scheme.scale_factor) == ("absmax", 1.0)
        bias = model.get_submodule(linear.name).bias
        assert torch.equal(quantized.states[linear.name].bias, bias)
    default = quantize_model(model, fast("w4a4"), stats=stats).report
    worse = [
        paper.output_sqnr_db < ours.output_sqnr_db
        for paper, ours in zip(quantized.report.linears, default.linears, strict=True)
    ]
    assert sum(worse) >= 9


def test_without_calibration_signs_and_hadamard_and_no_smoothing(model: nn.Module) -> None:
    quantized = quantize_model(model)
    assert not quantized.report.calibrated
    for name, state in quantized.states.items():
        assert state.smooth_scale is None
        modulation = name == "adaln_single.linear"
        assert state.rotation.kind == ("none" if modulation else "hadamard")
        assert state.scheme.act_bits == (16 if modulation else 8)
    assert all(linear.output_sqnr_db is None for linear in quantized.report.linears)
    with pytest.raises(ValueError, match="paper' needs calibration"):
        quantize_model(model, QuantRecipe(mode="paper"))


def test_flux_shares_the_input_of_a_single_block(tmp_path: Path) -> None:
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=(16, 24, 24),
    ).eval()

    def forward(net: nn.Module, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            return net(
                torch.randn(2, 16, 16, generator=generator),
                encoder_hidden_states=torch.randn(2, 8, 64, generator=generator),
                pooled_projections=torch.randn(2, 32, generator=generator),
                timestep=torch.rand(2, generator=generator),
                img_ids=torch.zeros(16, 3),
                txt_ids=torch.zeros(8, 3),
                return_dict=False,
            )[0]

    quantized = quantize_model(
        model, fast("w4a8"), run=lambda prompts: forward(model, 1), prompts=["a"]
    )
    owner = "single_transformer_blocks.0.attn.to_q"
    assert quantized.states["single_transformer_blocks.0.proj_mlp"].shared_input == owner
    low_bit = load_quantized(copy.deepcopy(model), quantized.save(tmp_path / "flux.safetensors"))
    assert sqnr_db(forward(model, 2), forward(low_bit, 2)) > 15


def test_bias_correction_removes_the_mean_error() -> None:
    """After GELU the mean is a third of the power; (W - W^) E[x] goes into the bias."""

    class PixArtTransformer2DModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer_blocks = nn.ModuleList([nn.Module()])
            self.transformer_blocks[0].ff = nn.Module()
            layers = [nn.Module(), nn.Identity(), nn.Linear(256, 64)]
            self.transformer_blocks[0].ff.net = nn.ModuleList(layers)

    model = PixArtTransformer2DModel()
    linear = model.transformer_blocks[0].ff.net[2]
    x = torch.nn.functional.gelu(2 * torch.randn(4000, 256))
    model.requires_grad_(False)
    decibel = {}
    for correction in (True, False):
        quantized = quantize_model(
            model,
            # Feedback without the correction makes up for the mean itself.
            fast("w3a8", bias_correction=correction, rounding="nearest"),
            run=lambda prompts: linear(x[:2000]),
            prompts=["a"],
        )
        state = quantized.states["transformer_blocks.0.ff.net.2"]
        ours = LRQLinear.from_state(state)(x[2000:])
        decibel[correction] = sqnr_db(linear(x[2000:]), ours)
    assert decibel[True] > decibel[False] + 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["w4a8", "w4a4", "w3a4"])
def test_a_gpu_calibrates_and_quantizes_like_the_cpu(model: nn.Module, name: str) -> None:
    """Everything random is drawn on the CPU, so the same rotations are compared on both."""
    plan = fast(name).resolve(model)
    reports = {}
    for device in ("cpu", "cuda"):
        placed = copy.deepcopy(model).to(device)

        def run(prompts: list[str], placed: nn.Module = placed, device: str = device) -> None:
            generator = torch.Generator().manual_seed(3)
            placed(
                torch.randn(8, 3, 16, 16, generator=generator).to(device),
                encoder_hidden_states=torch.randn(8, 7, 32, generator=generator).to(device),
                timestep=torch.rand(8, generator=generator).to(device) * 1000,
            )

        quantized = quantize_model(placed, fast(name), run=run, prompts=["a"])
        assert all(not state.codes.is_cuda for state in quantized.states.values())
        reports[device] = quantized.report
    assert len(reports["cuda"].linears) == len(plan.linears)
    for on_cpu, on_gpu in zip(reports["cpu"].linears, reports["cuda"].linears, strict=True):
        assert on_gpu.j == pytest.approx(on_cpu.j, rel=1e-2)
        assert on_gpu.output_sqnr_db == pytest.approx(on_cpu.output_sqnr_db, abs=0.5)


class Killed(Exception):
    pass


def test_a_killed_run_continues_and_ends_the_same(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, work = fast("w4a8"), tmp_path / "out.partial"
    arguments = {"prompts": ["a", "b"], "work_folder": work}

    def kill(what: str, done: int, total: int) -> None:
        if what == "quantization" and done > total // 2:
            raise Killed

    with pytest.raises(Killed):
        quantize_model(model, recipe, run=Runner(model, 1), progress=kill, **arguments)
    kept = len(list(work.glob("group-*.json")))
    assert kept > 2

    quantized_groups: list[str] = []
    plain = pipeline._GroupJob.run

    def counted(job: pipeline._GroupJob) -> tuple:
        quantized_groups.append(job.group.name)
        return plain(job)

    monkeypatch.setattr(pipeline._GroupJob, "run", counted)
    runner = Runner(model, 1)
    resumed = quantize_model(model, recipe, run=runner, **arguments)
    groups = len(recipe.resolve(model).groups)
    # One run for the gram matrices of what is left: the other statistics were kept.
    assert runner.calls == len(arguments["prompts"])
    assert len(quantized_groups) == groups - kept
    whole = quantize_model(model, recipe, run=Runner(model, 1), prompts=["a", "b"])
    assert resumed.report.to_dict() == whole.report.to_dict()
    first, second = (load(q.save(tmp_path / n)) for q, n in ((resumed, "a"), (whole, "b")))
    for name, state in first.states.items():
        tensors, other = (state_tensors(s, with_input=True) for s in (state, second.states[name]))
        assert state.scheme == second.states[name].scheme and set(tensors) == set(other)
        assert all(torch.equal(tensors[field], other[field]) for field in tensors), name
    resumed.remove_work_folder()
    assert not work.exists()


def test_a_kept_group_of_another_model_or_recipe_is_not_used(tmp_path: Path) -> None:
    work = tmp_path / "work"
    first, second = pixart(), pixart()
    quantize_model(first, work_folder=work)
    for model, recipe in ((second, QuantRecipe()), (first, QuantRecipe.from_name("w3a8"))):
        resumed = quantize_model(model, recipe, work_folder=work)
        fresh = quantize_model(model, recipe)
        for name, state in fresh.states.items():
            assert torch.equal(state.codes, resumed.states[name].codes), name


def test_a_damaged_kept_group_is_quantized_again(model: nn.Module, tmp_path: Path) -> None:
    work = tmp_path / "work"
    fresh = quantize_model(model, work_folder=work)
    for file in work.glob("group-*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 0xFF
        file.write_bytes(data)
    resumed = quantize_model(model, work_folder=work)
    for name, state in fresh.states.items():
        assert torch.equal(state.levels, resumed.states[name].levels)
        assert torch.equal(state.codes, resumed.states[name].codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_bad_weights_are_named_before_anything_is_written(
    tmp_path: Path, value: float, part: str
) -> None:
    model, work = pixart(), tmp_path / "work"
    name = f"transformer_blocks.0.ff.net.2.{part}"
    model.get_parameter(name).data.view(-1)[3] = value
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        quantize_model(model, work_folder=work)
    assert not work.exists()


def test_models_without_values_or_family_are_refused(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with torch.device("meta"):
        empty = pixart_on_meta()
    with pytest.raises(ValueError, match="on the meta device"):
        quantize_model(empty, work_folder=work)
    with pytest.raises(ValueError, match="must be one of .*Flux.*, got Linear"):
        quantize_model(nn.Linear(4, 4), work_folder=work)
    assert not work.exists()


def pixart_on_meta() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_layers=1, caption_channels=32, use_additional_conditions=False
    )


def test_unusable_work_folders_are_refused(model: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        quantize_model(model, work_folder=file)
    with pytest.raises(OSError, match="cannot write to the work folder"):
        quantize_model(model, work_folder=file / "below")
    with pytest.raises(FileExistsError, match="holds other files"):
        quantize_model(model, work_folder=tmp_path)
    if os.geteuid():
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        with pytest.raises(OSError, match="cannot write to the work folder"):
            quantize_model(model, work_folder=closed / "work")
    assert file.read_text() == "mine"


def test_hidden_files_in_a_work_folder_stay(tmp_path: Path) -> None:
    for name in (".DS_Store", ".nfs123"):
        (tmp_path / name).write_text("of the system")
    WorkFolder(tmp_path).remove()
    assert sorted(file.name for file in tmp_path.iterdir()) == [".DS_Store", ".nfs123"]


def test_missing_statistics_are_named(model: nn.Module, stats: Stats) -> None:
    name = "transformer_blocks.0.ff.net.2"
    with pytest.raises(ValueError, match=f"stats must hold {name}"):
        quantize_model(model, stats={n: s for n, s in stats.items() if n != name})


def test_quantize_linear_refuses_what_does_not_fit() -> None:
    weight = torch.randn(16, 128)
    with pytest.raises(ValueError, match="rotation must be 'hadamard' as in the scheme"):
        quantize_linear(weight, None, QuantScheme(4, 8))
    with pytest.raises(ValueError, match="weight must be finite"):
        quantize_linear(weight * float("nan"), None, QuantScheme(4, 8, rotation="none"))


def test_the_model_is_left_as_it_was(model: nn.Module, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = quantize_model(model).save(tmp_path / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    loaded = load(saved)
    assert set(loaded.dense) == {
        n for n in before if not n.startswith(tuple(f"{s}." for s in loaded.states))
    }
