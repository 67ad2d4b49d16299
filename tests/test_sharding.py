"""Sharded calibration: how many processes there are, and which of them dies, changes nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from test_calibration import group
from test_pipeline import Runner, pixart
from tiny_models import tiny_pipeline
from torch import distributed
from two_devices import cpu_and_two_gpus

from lrq_kernels.checkpoint import LinearState, state_tensors
from lrq_quant import (
    BitBudget,
    CalibrationOptions,
    QuantRecipe,
    SearchOptions,
    budgeted_recipe,
    collect_stats,
    quantize_model,
    sharding,
)
from lrq_quant.pipeline_io import load_report
from lrq_quant.work_folder import WorkFolder

ROOT = Path(__file__).resolve().parents[1]
# Five batches: neither two nor three processes get the same number of them.
PROMPTS = ["a", "b", "c", "d", "e"]
SEARCH = SearchOptions(
    rotations=("none", "hadamard"), alphas=(0.5,), sample_rows=64, weight_rows=32
)
# Small limits: a sample that drops tokens, gram matrices in several parts.
RECIPE = QuantRecipe.from_name(
    "w4a4", search=SEARCH, calibration=CalibrationOptions(sample_rows=64, gram_bytes=500_000)
)
Task = Callable[..., Any]


# ---- processes ----------------------------------------------------------------------------------


def _process(rank: int, count: int, port: int, file: Path, task: Task, arguments: tuple) -> None:
    """Keeps ("done", result) or ("raised", type and message) of task(rank, ...)."""
    torch.set_num_threads(1)
    address = f"tcp://localhost:{port}"
    options = {"rank": rank, "world_size": count, "timeout": timedelta(seconds=60)}
    distributed.init_process_group("gloo", init_method=address, **options)
    try:
        outcome = ("done", task(rank, *arguments))
    except Exception as error:
        outcome = ("raised", f"{type(error).__name__}: {error}")
    torch.save(outcome, file)
    distributed.destroy_process_group()


def run_processes(count: int, folder: Path, task: Task, *arguments: Any) -> list[tuple[str, Any]]:
    """Outcome of task(rank, *arguments) by rank; ("killed", None) of one that was killed, and of
    all that were then waiting for it: as torchrun does, the rest is stopped."""
    context = multiprocessing.get_context("forkserver")  # imports once for all tests
    context.set_forkserver_preload(["lrq_quant", "diffusers", "torch.distributed"])
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    files = [folder / f"{rank}.pt" for rank in range(count)]
    started = [
        context.Process(target=_process, args=(rank, count, port, files[rank], task, arguments))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    deadline = time.monotonic() + 100
    while any(process.is_alive() for process in started):
        if any(process.exitcode for process in started) or time.monotonic() > deadline:
            for process in started:
                process.kill()
        time.sleep(0.02)
    assert time.monotonic() < deadline, "the processes hung"
    return [
        torch.load(file, weights_only=False) if file.exists() else ("killed", None)
        for file in files
    ]


def results(outcomes: list[tuple[str, Any]]) -> list[Any]:
    assert [kind for kind, _ in outcomes] == ["done"] * len(outcomes), outcomes
    return [result for _, result in outcomes]


def fresh_seed() -> int:
    return int(torch.randint(1 << 30, ()))


def fresh_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return pixart()


# ---- statistics ---------------------------------------------------------------------------------


def collect(rank: int, seed: int, gram: bool = True, **options: Any) -> dict[str, dict]:
    model = fresh_model(seed)
    groups = RECIPE.resolve(model).groups
    calibration = CalibrationOptions(sample_rows=options.pop("sample_rows", 64), gram=gram)
    stats = collect_stats(Runner(model, seed), model, groups, PROMPTS, calibration, **options)
    return {name: entry.tensors() for name, entry in stats.items()}


def test_statistics_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    seed = fresh_seed()
    two = results(run_processes(2, tmp_path / "2", collect, seed))
    three = results(run_processes(3, tmp_path / "3", collect, seed))
    by_batch = collect(0, seed, by_batch=True)
    alone, everything = collect(0, seed), collect(0, seed, sample_rows=10_000)
    for name, expected in by_batch.items():
        for found in (*two, *three):
            assert found[name].keys() == expected.keys()
            for part, tensor in expected.items():
                assert torch.equal(found[name][part], tensor), (name, part)
        # One process adds as it goes: the same within the rounding of sums.
        plain = alone[name]
        assert "by_batch" not in plain and plain["count"] == expected["count"]
        assert torch.equal(plain["absmax"], expected["absmax"])
        for part in ("sum", "square_sum"):
            torch.testing.assert_close(expected[part], plain[part], rtol=1e-11, atol=1e-9)
        scale = float(plain["gram"].abs().max())
        assert float((plain["gram"] - expected["gram"]).abs().max()) < 1e-5 * scale, name
        rows = {row.numpy().tobytes() for row in everything[name]["sample"]}
        sample = [row.numpy().tobytes() for row in expected["sample"]]
        assert set(sample) <= rows and len(sample) == min(64, int(plain["count"])), name


class Wide(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(32, 32, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def collect_rows(rank: int, prompts: list[str]) -> dict[str, torch.Tensor]:
    """500 rows a prompt that carry its number, of which 400 in all are sampled."""
    model, options = Wide(), CalibrationOptions(sample_rows=400, gram=True)
    stats = collect_stats(
        lambda batch: model(torch.full((500, 32), float(batch[0]), dtype=torch.bfloat16)),
        model,
        [group("linear", in_features=32)],
        prompts,
        options,
        by_batch=True,
    )
    return stats["linear"].tensors()


def test_a_sample_is_drawn_evenly_from_all_batches() -> None:
    sample = collect_rows(0, [str(i) for i in range(8)])["sample"]
    counts = torch.bincount(sample[:, 0].long(), minlength=8)
    assert int(counts.sum()) == 400 and int(counts.min()) > 20, counts


def test_a_process_without_prompts_has_the_statistics_of_the_others(tmp_path: Path) -> None:
    expected = collect_rows(0, ["3"])
    for found in results(run_processes(2, tmp_path, collect_rows, ["3"])):
        for part, tensor in expected.items():
            assert found[part].dtype == tensor.dtype and torch.equal(found[part], tensor), part


# ---- quantization -------------------------------------------------------------------------------


def quantize(rank: int, seed: int, work: Path, kill_rank: int | None = None) -> dict[str, Any]:
    """What quantize_model gave, the groups that this process did and the progress it showed;
    process kill_rank is killed when its second group is finished and not yet kept."""
    model, groups, shown = fresh_model(seed), [], []
    plain = WorkFolder.save_group

    def save_group(folder: WorkFolder, name: str, *rest: Any) -> None:
        if rank == kill_rank and groups:
            os.kill(os.getpid(), signal.SIGKILL)
        groups.append(name)
        plain(folder, name, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "save_group", save_group)
        runner = Runner(model, seed)
        quantized = quantize_model(
            model,
            RECIPE,
            run=runner,
            prompts=PROMPTS,
            work_folder=work,
            progress=lambda *call: shown.append(call),
        )
    return {
        "states": quantized.states,
        "dense": sorted(quantized.dense),
        "report": quantized.report.to_dict(),
        "whole": quantized.whole,
        "groups": groups,
        "shown": shown,
        "calls": runner.calls,
    }


def assert_same_states(found: dict[str, LinearState], expected: dict[str, LinearState]) -> None:
    assert list(found) == list(expected) and found
    for name, state in expected.items():
        assert found[name].scheme == state.scheme
        tensors = state_tensors(state, with_input=True)
        others = state_tensors(found[name], with_input=True)
        assert tensors.keys() == others.keys()
        for field, tensor in tensors.items():
            assert torch.equal(others[field], tensor), (name, field)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict[str, Any]]]:
    """A seed, and what two processes made of it."""
    seed, folder = fresh_seed(), tmp_path_factory.mktemp("undisturbed")
    return seed, results(run_processes(2, folder, quantize, seed, folder / "work"))


def test_two_processes_share_the_groups_and_agree_with_one(
    undisturbed: tuple[int, list[dict[str, Any]]], tmp_path: Path
) -> None:
    seed, (first, second) = undisturbed
    again, _ = results(run_processes(2, tmp_path / "b", quantize, seed, tmp_path / "other"))
    model = fresh_model(seed)
    groups = RECIPE.resolve(model).groups
    # Work was shared: every group once, prompts and groups in both.
    assert sorted(first["groups"] + second["groups"]) == sorted(group.name for group in groups)
    assert len(first["groups"]) > 2 and len(second["groups"]) > 2
    assert first["calls"] > second["calls"] > 2
    assert_same_states(again["states"], first["states"])
    assert again["report"] == first["report"] == second["report"]

    options = CalibrationOptions(sample_rows=64, gram=True)
    stats = collect_stats(Runner(model, seed), model, groups, PROMPTS, options, by_batch=True)
    alone = quantize_model(model, RECIPE, stats=stats)
    assert_same_states(first["states"], alone.states)
    assert first["dense"] == sorted(alone.dense) and first["report"] == alone.report.to_dict()

    # The first process alone has the result and shows progress, that of both.
    assert first["whole"] and not second["whole"] and not second["states"] and not second["shown"]
    for stage, total in (("calibration", 5), ("quantization", alone.report.weights)):
        done = [call[1:] for call in first["shown"] if call[0] == stage]
        assert done == sorted(done) and done[-1] == (total, total)


@pytest.mark.parametrize(("killed", "count"), [(0, 2), (1, 3), (1, 1)])
def test_a_killed_process_is_made_good_by_any_number(
    killed: int, count: int, undisturbed: tuple[int, list[dict[str, Any]]], tmp_path: Path
) -> None:
    (seed, whole), work = undisturbed, tmp_path / "work"
    outcomes = run_processes(2, tmp_path / "killed", quantize, seed, work, killed)
    assert outcomes[killed] == ("killed", None)
    kept = len(list(work.glob("group-*.json")))
    total = len(RECIPE.resolve(fresh_model(seed)).groups)
    assert 0 < kept < total and (work / "stats.safetensors").exists()
    if count > 1:
        resumed = results(run_processes(count, tmp_path / "resumed", quantize, seed, work))
    else:
        resumed = [quantize(0, seed, work)]
    assert_same_states(resumed[0]["states"], whole[0]["states"])
    assert resumed[0]["report"] == whole[0]["report"]
    assert sum(len(result["groups"]) for result in resumed) == total - kept


# ---- what goes wrong ----------------------------------------------------------------------------


def failing(rank: int, seed: int, work: Path, bad_rank: int, where: str) -> None:
    model = fresh_model(seed)
    runner = Runner(model, seed)
    prompts = list(PROMPTS)

    def run(batch: list[str]) -> None:
        if where == "run" and rank == bad_rank and runner.calls == 1:
            raise ValueError("the pipeline broke")
        runner(batch)

    def save_group(*_: Any) -> None:
        raise PermissionError("the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        if rank == bad_rank and where == "group":
            patch.setattr(WorkFolder, "save_group", save_group)
        if rank == bad_rank and where == "prompts":
            prompts[1] = "another"
        if where == "silence":
            patch.setattr(sharding, "SILENCE_SECONDS", 1.0)
            patch.setattr(sharding, "_FAREWELL_SECONDS", 1.0)
            if rank == bad_rank:
                time.sleep(3)  # and never comes
                return
        quantize_model(model, RECIPE, run=run, prompts=prompts, work_folder=work)


@pytest.mark.parametrize(
    ("where", "bad_rank", "own", "others"),
    [
        ("run", 0, "ValueError: the pipeline broke", "failed: ValueError: the pipeline broke"),
        ("run", 1, "ValueError: the pipeline broke", "failed: ValueError: the pipeline broke"),
        ("group", 1, "PermissionError: the disk is full", "failed: PermissionError: the disk"),
        ("prompts", 0, "model, recipe and prompts must be", "model, recipe and prompts must be"),
        ("silence", 0, None, "has waited for the others for 1 s"),
        ("silence", 1, None, "has waited for the others for 1 s"),
    ],
)
def test_an_error_in_one_process_ends_all(
    where: str, bad_rank: int, own: str | None, others: str, tmp_path: Path
) -> None:
    arguments = (fresh_seed(), tmp_path / "work", bad_rank, where)
    outcomes = run_processes(2, tmp_path / "out", failing, *arguments)
    bad, other = outcomes[bad_rank], outcomes[1 - bad_rank]
    assert other[0] == "raised" and other[1].startswith("OtherProcessError: "), outcomes
    assert others in other[1]
    if own is None:
        assert bad == ("done", None)
    else:
        assert bad[0] == "raised" and own in bad[1], outcomes


def deal(rank: int, seed: int, work: Path) -> tuple[dict[str, Any], int]:
    """The recipe of a bit budget, and how often this process ran."""
    runner = Runner(model := fresh_model(seed), seed)
    recipe = replace(RECIPE, rounding="nearest")
    mixed = budgeted_recipe(model, recipe, BitBudget(3.4, 6.0), runner, PROMPTS, work_folder=work)
    return mixed.to_dict(), runner.calls


def test_processes_deal_out_one_budget_and_keep_it(tmp_path: Path) -> None:
    seed, work = fresh_seed(), tmp_path / "work"
    (first, calls), (second, _) = results(run_processes(2, tmp_path / "a", deal, seed, work))
    assert first == second and first["overrides"] and calls
    # Killed later, they go on with it.
    again = results(run_processes(2, tmp_path / "b", deal, seed, work))
    assert [recipe for recipe, _ in again] == [first, first]
    assert [calls for _, calls in again] == [0, 0]


def apart(rank: int, seed: int, work: Path) -> tuple[dict[str, LinearState], int]:
    """Each process quantizes a model of its own."""
    with sharding.alone():
        quantized = quantize_model(fresh_model(seed + rank), work_folder=work / str(rank))
    other = quantize_model(fresh_model(seed + rank))  # without a work folder
    assert_same_states(other.states, quantized.states)
    return quantized.states, len(list((work / str(rank)).glob("group-*.json")))


def test_processes_that_quantize_something_else_are_left_alone(tmp_path: Path) -> None:
    seed = fresh_seed()
    outcomes = results(run_processes(2, tmp_path / "out", apart, seed, tmp_path / "work"))
    for rank, (states, kept) in enumerate(outcomes):
        assert kept == len(RECIPE.resolve(fresh_model(seed)).groups)
        assert_same_states(states, quantize_model(fresh_model(seed + rank)).states)


def test_work_is_dealt_evenly_and_to_everyone() -> None:
    shards = sharding.Shards()
    assert shards.share([3, 1, 2]) == [0, 0, 0]
    shards.count = 3
    costs = torch.randint(1, 100, (40,)).tolist()
    owners = shards.share(costs)
    load = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(3)]
    assert max(load) - min(load) <= max(costs)
    assert owners == shards.share(costs)


# ---- the command line ---------------------------------------------------------------------------


@pytest.mark.slow
@cpu_and_two_gpus
def test_torchrun_quantizes_a_pipeline(device: str, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green circle\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "lrq_quant", "quantize", "model", "out", "--prompts", "prompts.txt"]
    options = ["--steps=1", f"--device={device}", "--dtype=float32"]
    done = subprocess.run(
        [*launch, *command, *options],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to out") == 1 and done.stderr.count("calibration:   0%") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "prompts.txt"]
    assert load_report(tmp_path / "out").calibrated
