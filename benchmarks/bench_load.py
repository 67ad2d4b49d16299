"""A quantized transformer at its published shape: time and memory to load it, and ways to run it.

    python -m benchmarks.bench_load --model flux-dev --scheme w4a8

Weights are random. The checkpoint is made once, in a process of its own; every row after it is a
fresh process, so that peaks are those of the row alone:

    load-gpu     from_pretrained straight to the GPU
    load-cpu     from_pretrained into host memory, then .to("cuda")
    eager        one forward, all on the GPU
    model        accelerate's hook of enable_model_cpu_offload: the model moves when it is used
    group        enable_group_offload by leaf, with streams
    compile      torch.compile(fullgraph=True); first_s is the time of the first forward

gpu_gb: most that was allocated; host_gb: most that was resident, less what was after the imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lrq_quant.model_memory import tensor_bytes
from lrq_quant.model_shapes import make_model, model_config, named_inputs

ROWS = ("load-gpu", "load-cpu", "eager", "model", "group", "compile")
GB = 1e9
WARMUP, REPEATS = 3, 10


def make_checkpoint(name: str, scheme: str, folder: Path, device: str) -> dict[str, Any]:
    """Quantize random weights of `name` from the weights alone and write a transformer folder."""
    from lrq_quant import QuantRecipe, quantize_model
    from lrq_quant.pipeline_io import save_transformer

    model = make_model(name, device)
    start = time.perf_counter()
    result = quantize_model(model, QuantRecipe.from_name(scheme))
    seconds = time.perf_counter() - start
    save_transformer(model, result, folder)
    return {"row": "make", "quantize_s": seconds, "weight_bits": result.report.weight_bits}


def load(model_class: Any, folder: Path, device: str, row: str) -> tuple[Any, dict[str, Any]]:
    """The model where the row wants it, and what loading it took."""
    import lrq_quant  # noqa: F401 - registers the backend

    direct = row in ("load-gpu", "eager", "compile")
    device_map = {"device_map": {"": device}} if direct else {}
    before = resident_gb()
    start = time.perf_counter()
    model = model_class.from_pretrained(folder, torch_dtype=torch.bfloat16, **device_map)
    if row == "load-cpu":
        model = model.to(device)
    if device != "cpu":
        torch.cuda.synchronize()
    facts = {
        "load_s": time.perf_counter() - start,
        "host_gb": resident_gb() - before,
        "file_gb": sum(f.stat().st_size for f in folder.glob("*.safetensors")) / GB,
        "weights_gb": tensor_bytes(model) / GB,
    }
    return model.eval().requires_grad_(False), facts


def prepare(model: Any, device: str, row: str) -> Any:
    """The model as the row runs it."""
    if row == "model":
        from accelerate import cpu_offload_with_hook

        model, _ = cpu_offload_with_hook(model, torch.device(device))
    elif row == "group":
        model.enable_group_offload(
            onload_device=torch.device(device),
            offload_type="leaf_level",
            use_stream=device != "cpu",
        )
    elif row == "compile":
        return torch.compile(model, fullgraph=True)
    return model


def measure(
    row: str, model_class: Any, folder: Path, device: str, inputs: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """One row of the table, in this process."""
    model, facts = load(model_class, folder, device, row)
    facts = {"row": row, **facts, "load_gpu_gb": gpu_gb(device)}
    if row.startswith("load"):
        return facts
    runs, arguments = prepare(model, device, row), inputs()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with torch.no_grad():  # as pipelines do
        output = runs(**arguments, return_dict=False)[0]
    if not bool(torch.isfinite(output).all()):
        raise RuntimeError(f"bench_load: {row} gave NaN or inf")
    facts["first_s"] = time.perf_counter() - start
    if device != "cpu":
        facts["ms"] = median_ms(runs, arguments)
    return facts | {"gpu_gb": gpu_gb(device)}


@torch.no_grad()
def median_ms(model: Any, arguments: dict[str, Any]) -> float:
    """Of one forward, everything that hooks move included."""
    times = []
    for step in range(WARMUP + REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(**arguments, return_dict=False)
        torch.cuda.synchronize()
        if step >= WARMUP:
            times.append((time.perf_counter() - start) * 1e3)
    return sorted(times)[len(times) // 2]


def gpu_gb(device: str) -> float:
    return 0.0 if device == "cpu" else torch.cuda.max_memory_allocated() / GB


def resident_gb() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("flux-dev", "pixart-sigma"), default="flux-dev")
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is to be made")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--one", choices=("make", *ROWS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_in_this_process(arguments)), flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "transformer"
        made = [] if (folder / "config.json").is_file() else ["make"]
        rows = [_in_a_process(arguments, folder, row) for row in (*made, *arguments.rows)]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def _in_this_process(arguments: argparse.Namespace) -> dict[str, Any]:
    name, folder = arguments.model, arguments.folder
    if arguments.one == "make":
        return make_checkpoint(name, arguments.scheme, folder, "cuda")
    model_class, _ = model_config(name)
    return measure(arguments.one, model_class, folder, "cuda", lambda: named_inputs(name))


def _in_a_process(arguments: argparse.Namespace, folder: Path, row: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bench_load", "--one", row]
    command += ["--model", arguments.model, "--scheme", arguments.scheme, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(json.dumps({"row": row, "failed": done.returncode}), flush=True)
        return {"row": row, "failed": done.returncode}
    line = done.stdout.strip().splitlines()[-1]
    print(line, flush=True)
    return json.loads(line)


if __name__ == "__main__":
    main()
