"""The command line, end to end on the bundled demo model, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from lrq_quant import QuantRecipe, pipeline_io
from lrq_quant.__main__ import main
from lrq_quant.demo import WEIGHTS_FOLDER
from lrq_quant.pipeline_io import REPORT_FILE, load_pipeline, load_report

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "shapes-w4a8"
    arguments = ["quantize", str(WEIGHTS_FOLDER), str(out), "--weights-only", "--device", "cpu"]
    assert main(arguments) == 0
    return out


def test_generate_is_repeatable_and_depends_on_the_seed(quantized: Path, tmp_path: Path) -> None:
    def draw(name: str, seed: int) -> bytes:
        file = tmp_path / name
        options = ["--steps", "2", "--seed", str(seed), "--device", "cpu"]
        assert (
            main(["generate", str(quantized), "--prompt", PROMPT, "--out", str(file), *options])
            == 0
        )
        with Image.open(file) as image:
            assert image.size == (32, 32)
            return image.tobytes()

    assert draw("a.png", 1) == draw("b.png", 1) != draw("c.png", 2)


def test_generate_writes_one_file_a_prompt(quantized: Path, tmp_path: Path) -> None:
    prompts = ["--prompt", PROMPT, "--prompt", "a green triangle above a red square"]
    folder = tmp_path / "pictures"
    options = ["--steps", "1", "--device", "cpu"]
    assert main(["generate", str(quantized), *prompts, "--out", str(folder), *options]) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["0000.png", "0001.png"]


class _Editor:
    """As the pipelines of FLUX.2 and Kontext: the first argument is a picture to edit."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __call__(self, image=None, prompt=None, *, generator, output_type):
        assert image is None and isinstance(prompt, str) and output_type == "pil"
        self.calls.append((prompt, generator.initial_seed()))
        return SimpleNamespace(images=[Image.new("RGB", (8, 8), "red")])


def _generate_with(monkeypatch: pytest.MonkeyPatch, pipeline: Any, *arguments: object) -> int:
    monkeypatch.setattr(pipeline_io, "load_pipeline", lambda *_, **__: pipeline)
    prompts = ["--prompt", "a", "--device", "cpu"]
    return main(["generate", str(WEIGHTS_FOLDER), *prompts, *map(str, arguments)])


def test_generate_draws_prompt_after_prompt_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = _Editor()
    arguments = ("--prompt", "b", "--seed", 7, "--out", tmp_path / "out")
    assert _generate_with(monkeypatch, pipeline, *arguments) == 0
    assert pipeline.calls == [("a", 7), ("b", 8)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0000.png", "0001.png"]


def test_generate_writes_a_video_as_an_animated_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    file = tmp_path / "clip.png"
    video = SimpleNamespace(frames=[frames])  # as the pipelines of Wan: no images
    assert _generate_with(monkeypatch, lambda **_: video, "--out", file) == 0
    with Image.open(file) as image:
        assert image.n_frames == 3 and image.info["duration"] == 62
        image.seek(2)
        assert image.convert("RGB").getpixel((0, 0)) == (0, 0, 255)


class AudioOutput:
    audios: list = []


def test_generate_says_what_is_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert _generate_with(monkeypatch, lambda **_: AudioOutput(), "--out", tmp_path / "a.png") == 1
    assert "must give images or frames, got AudioOutput" in capsys.readouterr().err


@pytest.mark.parametrize(
    "out, message",
    [
        ("taken", "--out must be a file that can be written, got"),
        ("taken/a.png", "--out must be a file that can be written, got"),
        ("folder.png", "--out must be a file, got the folder"),
        ("fox.jpg", "--out must be a .png file or a folder, got"),
        ("clip.mp4", "--out must be a .png file or a folder, got"),
    ],
)
def test_generate_checks_out_before_it_loads(
    out: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(pipeline_io, "load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    arguments = ["--prompt", "a", "--device", "cpu", "--out", str(tmp_path / out)]
    assert main(["generate", str(WEIGHTS_FOLDER), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.png", "taken"]


def test_inspect_prints_every_layer(quantized: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(quantized)]) == 0
    text = capsys.readouterr().out
    assert "transformer_blocks.2.ff.net.2" in text and "w4a8" in text and "hadamard" in text
    assert main(["inspect", str(quantized), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 4 < report["weight_bits"] < 5 and 0.9 < report["coverage"] < 1
    assert {linear["scheme"]["weight_bits"] for linear in report["linears"]} == {4}


def test_inspect_without_a_report(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """What save_pretrained writes: bits are those of the report, SQNR is not known."""
    load_pipeline(quantized, fuse=False).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "transformer" / REPORT_FILE).exists()
    kept, found = load_report(quantized), load_report(tmp_path / "saved")
    for attribute in ("parameters", "weight_bits", "model_class"):
        assert getattr(found, attribute) == getattr(kept, attribute)
    assert found.coverage == pytest.approx(kept.coverage, abs=0.05)
    by_name = {linear.name: linear for linear in kept.linears}
    for linear in found.linears:
        other = by_name[linear.name]
        assert (linear.stored_bits, linear.scheme) == (other.stored_bits, other.scheme)
        assert (linear.shared_input, linear.weights) == (other.shared_input, other.weights)
        assert linear.rotation_kind == other.rotation_kind.replace("permuted-part", "permuted")
    assert len(found.linears) == len(by_name)
    assert main(["inspect", str(tmp_path / "saved")]) == 0
    assert "no report was kept" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "saved"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["linears"][0]["weight_sqnr_db"] is None
    assert main(["inspect", str(tmp_path / "saved"), "--html", str(tmp_path / "x.html")]) == 1
    assert "keeps none" in capsys.readouterr().err and not (tmp_path / "x.html").exists()
    assert main(["card", str(tmp_path / "saved"), "--base", "a/b"]) == 0


def test_inspect_of_a_hub_id(
    quantized: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked: list[Any] = []

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(quantized)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert main(["inspect", "someone/shapes"]) == 0
    assert "hadamard" in capsys.readouterr().out
    (repo, patterns) = asked.pop()
    assert repo == "someone/shapes" and "transformer*/*.safetensors" in patterns
    assert main(["inspect", "./someone/shapes"]) == 1 and not asked


def test_what_cannot_be_written_whole_is_not_written(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(file: Path, text: str, **_: object) -> None:
        file.write_bytes(text.encode()[: len(text) // 2])
        raise OSError("no space left on device")

    profile = tmp_path / "profile.json"
    profile.write_text("{}")
    monkeypatch.setattr(Path, "write_text", write_half)
    assert main(["card", str(quantized), "--base", "someone/shapes"]) == 1
    assert not (quantized / "README.md").exists()
    options = ["--size", "64", "--steps", "1", "--scheme", "bf16", "--device", "cpu"]
    assert main(["profile", "tiny-pixart", *options, "--json", str(profile)]) == 1
    assert profile.read_text() == "{}"


def test_what_quantize_asks_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def record(pipeline: Any, recipe: QuantRecipe, *rest: Any, **options: Any) -> None:
        asked.update(recipe=recipe, **options)
        raise ValueError("recorded")

    monkeypatch.setattr(pipeline_io, "quantize_pipeline", record)
    command = ["quantize", str(WEIGHTS_FOLDER), str(tmp_path / "out"), "--weights-only"]
    options = ["--gram-gib", "3", "--low-rank", "8", "--exclude", "transformer_blocks.0"]
    assert main([*command, *options, "--rounding", "nearest", "--steps", "5"]) == 1
    recipe = asked["recipe"]
    assert recipe.calibration.gram_bytes == 3 << 30 and recipe.low_rank == 8
    assert recipe.exclude == ("transformer_blocks.0",) and recipe.rounding == "nearest"
    assert asked["call_options"] == {"num_inference_steps": 5}


def test_info_says_what_runs_here(capsys: pytest.CaptureFixture) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text and "CUDA kernels:" in text and "GPU" in text


@pytest.mark.parametrize("is_local", [True, False])
def test_a_quantized_pipeline_is_not_quantized_again(
    is_local: bool,
    quantized: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    load = pipeline_io.load_pipeline

    def load_from_hub(model: str, **options: Any) -> Any:
        assert not is_local
        return load(quantized, **options)

    monkeypatch.setattr(pipeline_io, "load_pipeline", load_from_hub)
    model = str(quantized) if is_local else "someone/shapes"
    arguments = [model, str(tmp_path / "out"), "--weights-only", "--device", "cpu"]
    assert main(["quantize", *arguments]) == 1
    printed = capsys.readouterr()
    assert f"{model}: its transformer must be dense" in printed.err
    assert not printed.out and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["quantize", str(WEIGHTS_FOLDER), "{tmp}/out"], "--prompts FILE is needed"),
        (["quantize", str(WEIGHTS_FOLDER), "{tmp}/taken", "--weights-only"], "exists already"),
        (["quantize", "{tmp}/taken", "{tmp}/out", "--weights-only"], "no model_index.json"),
        (
            ["quantize", str(WEIGHTS_FOLDER), "{tmp}/out", "--weights-only", "--scheme", "w5a8"],
            "weight_bits must be one of (2, 3, 4), got 5",
        ),
        (
            ["quantize", str(WEIGHTS_FOLDER), "{tmp}/out", "--weights-only", "--exclude", "typo.*"],
            "'typo.*' matches no linear",
        ),
        (
            ["demo", "--out", "{tmp}/demo", "--device", "cpu", "--schemes", "w4a8", "w9a9"],
            "weight_bits must be one of (2, 3, 4), got 9",
        ),
        (["inspect", "{tmp}/taken"], "no lrq checkpoint"),
        (["inspect", str(WEIGHTS_FOLDER)], "format must be 'lrq'"),
        (
            ["generate", "{tmp}/taken", "--prompt", "a", "--prompt", "b", "--out", "x.png"],
            "--out must be a folder",
        ),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"lrq {arguments[0]}: error: ") and message in error
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
    assert (taken / "notes.txt").read_text() == "mine"


COMMANDS = {
    "quantize": ["{tmp}/out", "--weights-only"],
    "generate": ["--prompt=a", "--out={tmp}/a.png"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("model", ["./tiny", "/models/tiny", "models/tiny/v2", "~/tiny"])
def test_a_path_that_is_no_folder_is_not_looked_up(
    model: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(pipeline_io, "load_pipeline", lambda *_, **__: pytest.fail("looked up"))
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in COMMANDS[command]]
    assert main([command, model, *arguments, "--device", "cpu"]) == 1
    assert f"must be a hub id or a folder that exists, got {model!r}" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_failed_look_up_says_that_there_is_no_folder_either(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def look_up(*_: object, **__: object) -> None:
        raise OSError("not in the cache")

    monkeypatch.setattr(pipeline_io, "load_pipeline", look_up)
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in COMMANDS[command]]
    assert main([command, "modls/tiny", *arguments, "--device", "cpu"]) == 1
    message = "there is no local folder 'modls/tiny', and as a hub id: not in the cache"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["foo", "cuda:x", "cpu:0", "cuda:", "cuda:99"])
@pytest.mark.parametrize("command", ["quantize", "generate", "demo", "profile"])
def test_an_unknown_device_is_named(
    command: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = {
        "quantize": [str(WEIGHTS_FOLDER), str(tmp_path / "out"), "--weights-only"],
        "generate": [str(WEIGHTS_FOLDER), "--prompt", "a", "--out", str(tmp_path / "a.png")],
        "demo": ["--out", str(tmp_path / "demo")],
        "profile": ["tiny-flux"],
    }[command]
    assert main([command, *arguments, "--device", device]) == 1
    error = capsys.readouterr().err
    assert "--device must be" in error and f"got {device!r}" in error
    assert not any(tmp_path.iterdir())


def test_a_gpu_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["demo", "--out", str(tmp_path / "demo"), "--device", "cuda"]) == 1
    message = "--device must be cpu or one of the 0 CUDA GPUs, got 'cuda'"
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["quantize", "MODEL", "OUT", "--weights-only", "--prompts", "missing.txt"],
            "argument --prompts: not allowed with argument --weights-only",
        ),
        (
            ["quantize", "MODEL", "OUT", "--prompts", "p.txt", "--limit", "-1"],
            "argument --limit: must be a whole number from 1 on, got '-1'",
        ),
        (
            ["quantize", "MODEL", "OUT", "--prompts", "p.txt", "--limit", "0"],
            "argument --limit: must be a whole number from 1 on, got '0'",
        ),
        (
            ["generate", "MODEL", "--prompt", "a", "--out", "a.png", "--steps", "0"],
            "argument --steps: must be a whole number from 1 on, got '0'",
        ),
        (
            ["quantize", "MODEL", "OUT", "--prompts", "p.txt", "--pictures", "-1"],
            "argument --pictures: must be a whole number from 0 on, got '-1'",
        ),
        (["demo", "--prompts", "0"], "argument --prompts: must be a whole number from 1 on, got"),
        (
            ["inspect", "MODEL", "--json", "--html", "a.html"],
            "argument --html: not allowed with argument --json",
        ),
    ],
)
def test_arguments_that_say_nothing_are_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_status:
        main(arguments)
    assert exit_status.value.code == 2 and message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_prompts_that_are_not_utf_8_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("un caf\xe9\n".encode("latin-1"))
    out = str(tmp_path / "out")
    assert main(["quantize", str(WEIGHTS_FOLDER), out, "--prompts", str(file)]) == 1
    assert f"--prompts must be UTF-8 text, got {file}: " in capsys.readouterr().err
