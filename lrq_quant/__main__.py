"""The command line: python -m lrq_quant, or lrq.

lrq quantize MODEL OUT --scheme w4a8 --prompts prompts.txt
torchrun --nproc-per-node 8 -m lrq_quant quantize MODEL OUT --prompts prompts.txt
lrq generate OUT --prompt "..." --out picture.png
lrq inspect OUT
lrq card OUT --base HUB_ID
lrq demo --out demo
lrq profile flux-dev --mode graph
lrq info
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")
# Of a video that is drawn; pipelines do not say it, Wan's models are made for this.
FRAMES_A_SECOND = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Expected errors are one line on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except (ValueError, TypeError, OSError) as error:
        print(f"lrq {arguments.name}: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrq", description="Low-bit diffusion transformers.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    add = commands.add_parser("quantize", help="quantize a diffusers pipeline")
    add.add_argument("model", help="hub id or local folder of a supported diffusers pipeline")
    add.add_argument("out", type=Path, help="folder to write; must not exist or be empty")
    add.add_argument("--scheme", default="w4a8", help="w{2,3,4}a{4,8,16} of the blocks")
    source = add.add_mutually_exclusive_group()
    source.add_argument("--prompts", type=Path, help="text file, one calibration prompt a line")
    source.add_argument(
        "--weights-only", action="store_true", help="no calibration: weights and signs alone"
    )
    add.add_argument("--modulation", default="w4a16", help="scheme of adaLN linears, or 'keep'")
    add.add_argument("--exclude", nargs="*", default=[], help="patterns of linears that stay")
    add.add_argument("--mode", choices=("default", "paper"), default="default")
    add.add_argument(
        "--rounding",
        choices=("feedback", "nearest"),
        default="feedback",
        help="of calibrated weights: feedback runs the prompts again for second moments",
    )
    add.add_argument(
        "--gram-gib",
        type=_from(1),
        default=16,
        metavar="GIB",
        help="of second moments held at once; the prompts run again for each such part (FLUX: 60)",
    )
    add.add_argument(
        "--low-rank",
        type=int,
        default=0,
        metavar="R",
        help="rank of a 16-bit branch beside the linears of each input; 0 for none",
    )
    add.add_argument(
        "--shared-tables",
        type=int,
        default=0,
        metavar="T",
        help="levels in T tables that the rows of a linear share (16: 0.1 bits a weight less at "
        "1152 inputs for 0.1 dB of the weights); 0 for a table of each row's own",
    )
    add.add_argument(
        "--mean-bits",
        type=float,
        metavar="B",
        help="bits a weight of the blocks on average, all counted: 2, 3, 4 or 16 for each input, "
        "by what they do to the output",
    )
    add.add_argument(
        "--mean-act-bits",
        type=float,
        metavar="B",
        help="of activations on average: 4, 8 or 16 for each input, in the same way",
    )
    add.add_argument("--limit", type=_from(1), help="use at most this many prompts")
    add.add_argument(
        "--pictures",
        type=_from(0),
        default=2,
        metavar="N",
        help="prompts that are drawn before and after for the report, each twice; 0 for none",
    )
    _add_sampling(add)
    _add_device(add)
    add.set_defaults(command=_quantize)

    add = commands.add_parser("generate", help="draw pictures with a pipeline, quantized or not")
    add.add_argument("model", help="hub id or local folder")
    add.add_argument("--prompt", action="append", required=True, help="repeat for several pictures")
    add.add_argument(
        "--out",
        type=Path,
        required=True,
        help="a .png file, or a folder; a video is an animated PNG",
    )
    add.add_argument("--seed", type=int, default=0)
    _add_sampling(add)
    _add_device(add)
    add.set_defaults(command=_generate)

    add = commands.add_parser("inspect", help="what a quantized folder holds, layer by layer")
    add.add_argument("model", help="quantized pipeline or transformer: a folder or a hub id")
    form = add.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the report as JSON")
    form.add_argument("--html", type=Path, help="write the report, without pictures, to this file")
    add.set_defaults(command=_inspect)

    add = commands.add_parser("card", help="write README.md, the model card, of a quantized folder")
    add.add_argument("model", type=Path, help="quantized pipeline or transformer folder")
    add.add_argument("--base", required=True, help="hub id of the model it was quantized from")
    add.set_defaults(command=_card)

    add = commands.add_parser("demo", help="quantize the bundled model and compare pictures")
    add.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results")
    add.add_argument(
        "--prompts", type=_from(1), help="held-out captions; 32 on a CPU, 256 on a GPU"
    )
    add.add_argument("--schemes", nargs="+", default=["w4a8", "w4a4", "w3a4"])
    add.add_argument("--device", help="cuda or cpu; the GPU when there is one")
    add.set_defaults(command=_demo)

    add = commands.add_parser("profile", help="where the time of a forward goes, kernel by family")
    add.add_argument("model", help="a published shape such as flux-dev, or a local folder")
    add.add_argument("--size", type=int, default=1024, help="pixels along a side")
    add.add_argument("--batch", type=int, default=1)
    add.add_argument("--steps", type=int, default=5, help="forwards that are recorded")
    add.add_argument("--scheme", help="w{2,3,4}a{4,8,16} or bf16; by default w4a8 or the folder's")
    add.add_argument(
        "--mode", default="eager", help="eager (fused blocks), loaded, compiled or graph"
    )
    add.add_argument("--device", help="cuda or cpu; the GPU when there is one")
    add.add_argument("--json", type=Path, help="write the profile to this file")
    add.add_argument("--trace", type=Path, help="write a Chrome trace of one forward to this file")
    add.add_argument("--plot", type=Path, help="draw families as a stacked bar into this file")
    add.add_argument(
        "--limits",
        nargs=3,
        type=float,
        metavar=("GBPS", "TOPS_8", "TOPS_16"),
        help="copy, 8-bit and bf16 products of this GPU; measured by default",
    )
    add.set_defaults(command=_profile)

    add = commands.add_parser("info", help="GPU, compiled architectures, kernels that will run")
    add.set_defaults(command=_info)
    return parser


def _from(least: int) -> Callable[[str], int]:
    """Of an argument that counts something."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            message = f"must be a whole number from {least} on, got {text!r}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return count


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=_from(1), help="denoising steps; the pipeline's own by default"
    )
    parser.add_argument("--guidance", type=float, help="guidance scale; the pipeline's own")
    parser.add_argument("--height", type=_from(1))
    parser.add_argument("--width", type=_from(1))


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cuda or cpu; the GPU when there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of what stays dense")


def _device(arguments: argparse.Namespace) -> str:
    import torch

    if arguments.device:
        _check_device(arguments.device)
        return arguments.device
    if torch.cuda.is_available():
        return "cuda"
    print("no CUDA GPU: running the reference kernels on the CPU", file=sys.stderr)
    return "cpu"


def _check_device(device: str) -> None:
    import torch

    kind, _, index = device.partition(":")
    is_cuda = kind == "cuda" and (index.isdecimal() or device == "cuda")
    if not is_cuda and device != "cpu":
        raise ValueError(f"--device must be cuda, cuda:N or cpu, got {device!r}")
    found = torch.cuda.device_count()
    if is_cuda and int(index or 0) >= found:
        raise ValueError(f"--device must be cpu or one of the {found} CUDA GPUs, got {device!r}")


def _check_model(model: str) -> None:
    """Raise FileNotFoundError for a path that is no folder."""
    from .pipeline_io import is_path

    if is_path(model) and not Path(model).is_dir():
        raise FileNotFoundError(f"model must be a hub id or a folder that exists, got {model!r}")


def _load_pipeline(arguments: argparse.Namespace, device: str) -> Any:
    import torch

    from .pipeline_io import load_pipeline

    model, dtype = arguments.model, getattr(torch, arguments.dtype)
    try:
        return load_pipeline(model, device=device, dtype=dtype)
    except (OSError, ValueError) as error:
        if Path(model).exists():
            raise
        # The hub speaks of its cache and of the network alone.
        raise OSError(f"there is no local folder {model!r}, and as a hub id: {error}") from error


def _call_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline call; what was not given is left to the pipeline."""
    options = {
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance,
        "height": arguments.height,
        "width": arguments.width,
    }
    return {name: value for name, value in options.items() if value is not None}


# ---- quantize -----------------------------------------------------------------------------------


def _quantize(arguments: argparse.Namespace) -> int:
    from lrq_kernels import QuantScheme

    from . import CalibrationOptions, QuantRecipe
    from .mixed_precision import BitBudget
    from .pipeline import check_dense
    from .pipeline_io import (
        REPORT_PAGE,
        TRANSFORMER,
        check_writable,
        is_quantized,
        load_report,
        quantize_pipeline,
        recipe_for,
        transformer_names,
    )
    from .sharding import launched, processes

    prompts = _read_prompts(arguments)
    budget = None
    if arguments.mean_bits is not None or arguments.mean_act_bits is not None:
        if prompts is None:
            raise ValueError("--mean-bits and --mean-act-bits need --prompts, got --weights-only")
        budget = BitBudget(arguments.mean_bits, arguments.mean_act_bits)
    modulation = None
    if arguments.modulation != "keep":
        modulation = QuantScheme.from_name(arguments.modulation, rotation="none")
    recipe = QuantRecipe.from_name(
        arguments.scheme,
        modulation=modulation,
        exclude=tuple(arguments.exclude),
        mode=arguments.mode,
        rounding=arguments.rounding,
        low_rank=arguments.low_rank,
        shared_tables=arguments.shared_tables,
        calibration=CalibrationOptions(gram_bytes=arguments.gram_gib << 30),
    )
    _check_model(arguments.model)
    # Of a hub id only what is loaded tells.
    if is_quantized(Path(arguments.model) / TRANSFORMER):
        raise ValueError(
            f"{arguments.model}: its {TRANSFORMER} must be dense, it is already quantized"
        )
    check_writable(arguments.out)
    with launched(_device(arguments)) as device, processes() as shards:
        pipeline = _load_pipeline(arguments, device)
        for name in transformer_names(pipeline):
            check_dense(getattr(pipeline, name), f"{arguments.model}: its {name}")
        recipe = recipe_for(pipeline, recipe, _call_options(arguments))
        if shards.rank == 0:
            print(recipe.resolve(pipeline.transformer).summary())
        with ProgressBar() as bar:
            quantize_pipeline(
                pipeline,
                recipe,
                prompts,
                arguments.out,
                call_options=_call_options(arguments),
                progress=bar.update,
                pictures=arguments.pictures,
                budget=budget,
            )
    if shards.rank > 0:
        return 0
    for name in transformer_names(pipeline):
        print(load_report(arguments.out / name).summary())
        print(f"report: {arguments.out / name / REPORT_PAGE}")
    print(f"written to {arguments.out}")
    return 0


def _read_prompts(arguments: argparse.Namespace) -> list[str] | None:
    """Calibration prompts, or None for weights alone."""
    if arguments.weights_only:
        return None
    if arguments.prompts is None:
        raise ValueError("--prompts FILE is needed for calibration, or --weights-only without it")
    try:
        text = arguments.prompts.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompts must be UTF-8 text, got {arguments.prompts}: {error}"
        ) from error
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line][: arguments.limit]
    if not prompts:
        raise ValueError(f"{arguments.prompts} holds no prompts")
    return prompts


class ProgressBar:
    """One tqdm bar a stage, with the time left."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        return self

    def update(self, stage: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if stage != self._stage:
            self.__exit__()
            self._stage, self._bar = stage, tqdm(total=total, desc=stage, file=sys.stderr)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


# ---- generate -----------------------------------------------------------------------------------


def _generate(arguments: argparse.Namespace) -> int:
    import torch

    files = _output_files(arguments.out, len(arguments.prompt))
    _check_model(arguments.model)
    device = _device(arguments)
    for file in files:
        _check_file("--out", file)
    pipeline = _load_pipeline(arguments, device)
    seconds = 0.0
    # One by one: memory does not grow with the prompts, and what is drawn is on disk at once.
    for i, (prompt, file) in enumerate(zip(arguments.prompt, files, strict=True)):
        generator = torch.Generator().manual_seed(arguments.seed + i)
        start = time.perf_counter()
        # By name, since the first argument of some pipelines is a picture to edit.
        drawn = pipeline(
            prompt=prompt, generator=generator, output_type="pil", **_call_options(arguments)
        )
        seconds += time.perf_counter() - start
        _save_png(drawn, file)
        print(file)
    print(f"{seconds / len(files):.2f} s a picture on {device}", file=sys.stderr)
    return 0


def _output_files(out: Path, count: int) -> list[Path]:
    if out.suffix == ".png":
        if count > 1:
            raise ValueError(f"--out must be a folder for {count} prompts, got the file {out}")
        return [out]
    # The suffix of a file, .jpg or .mp4, not what a version such as v1.0 ends with.
    if count == 1 and out.suffix[1:2].isalpha() and not out.is_dir():
        raise ValueError(f"--out must be a .png file or a folder, got {out}")
    return [out / f"{index:04d}.png" for index in range(count)]


def _check_file(option: str, file: Path) -> None:
    """Raise OSError, naming the option, unless `file` can be written, whether it exists or not."""
    from .pipeline_io import check_writable

    if file.is_dir():
        raise IsADirectoryError(f"{option} must be a file, got the folder {file}")
    try:
        check_writable(_temporary(file))
    except OSError as error:
        raise OSError(
            f"{option} must be a file that can be written, got {file}: {error}"
        ) from error


def _temporary(file: Path) -> Path:
    return file.with_name(f".{file.name}.{os.getpid()}.tmp")


def _save_png(drawn: Any, file: Path) -> None:
    """The one picture of a pipeline's result, or its video as an animated PNG."""
    images, videos = getattr(drawn, "images", None), getattr(drawn, "frames", None)
    if images is not None:
        first, others = images[0], []
    elif videos is not None:
        first, *others = videos[0]
    else:
        raise ValueError(f"the pipeline must give images or frames, got {type(drawn).__name__}")
    temporary = _temporary(file)
    first.save(
        temporary,
        format="PNG",
        save_all=True,
        append_images=others,
        duration=1000 // FRAMES_A_SECOND,
    )
    temporary.replace(file)


# ---- inspect, demo, info ------------------------------------------------------------------------


def _inspect(arguments: argparse.Namespace) -> int:
    from .html_report import html_page
    from .pipeline_io import load_report, local_folder
    from .work_folder import write_text

    report = load_report(local_folder(arguments.model))
    if arguments.html and any(math.isnan(linear.weight_sqnr_db) for linear in report.linears):
        raise FileNotFoundError(
            f"--html draws what a report holds, and {arguments.model} keeps none: lrq quantize "
            "writes one, save_pretrained does not"
        )
    if arguments.html:
        write_text(arguments.html, html_page(report))
        print(arguments.html)
        return 0
    print(json.dumps(report.to_dict(), indent=1) if arguments.json else report.table())
    return 0


def _card(arguments: argparse.Namespace) -> int:
    from .model_card import model_card
    from .work_folder import write_text

    file = arguments.model / "README.md"
    if file.exists():
        raise FileExistsError(f"{file} exists already")
    write_text(file, model_card(arguments.model, arguments.base))
    print(file)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from . import QuantRecipe
    from .demo.compare import run_demo, table

    for scheme in arguments.schemes:
        QuantRecipe.from_name(scheme)  # raises for what is no scheme
    device = _device(arguments)
    prompts = arguments.prompts or (256 if device.startswith("cuda") else 32)
    start = time.perf_counter()
    report = run_demo(arguments.out, device, prompts=prompts, schemes=arguments.schemes)
    print(table(report))
    print(f"{arguments.out / 'grid.png'} and report.json, {time.perf_counter() - start:.0f} s")
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    from .machine_limits import Limits
    from .profiled_model import ProfileOptions, profile_model
    from .profiling import plot
    from .work_folder import write_text

    options = ProfileOptions(
        model=arguments.model,
        size=arguments.size,
        batch=arguments.batch,
        steps=arguments.steps,
        scheme=arguments.scheme,
        mode=arguments.mode,
        device=_device(arguments),
        trace=arguments.trace,
        limits=None if arguments.limits is None else Limits(*arguments.limits),
    )
    for name in ("json", "trace", "plot"):
        if (file := getattr(arguments, name)) is not None:
            _check_file(f"--{name}", file)
    result = profile_model(options)
    print(result.table())
    if arguments.json:
        write_text(arguments.json, json.dumps(result.to_dict(), indent=1) + "\n")
    if arguments.plot:
        plot([result], arguments.plot)
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from .info import info_lines

    print("\n".join(info_lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
