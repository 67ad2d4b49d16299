"""Rotate + quantize against the cast-only kernel of the same shape, and against its peers.

    python -m benchmarks.bench_rotate_quantize                    shapes of kernels.md, every form
    python -m benchmarks.bench_rotate_quantize --all              every K, M = 512 .. 32760
    python -m benchmarks.bench_rotate_quantize --shapes 4608x3072 --forms plain-128 row-quantize
    python -m benchmarks.bench_rotate_quantize --from-json rows.json --plot rows.png     no GPU

A row: form, impl, m, k, us (do_bench), graph_us (CUDA graph over rotating buffers), cast_us and
cast_graph_us (the same of the cast-only kernel), ratio = us / cast_us, tb_s (bytes that must move
/ graph_us). A figure that could not be had is null, and the reason is printed.

impl  triton    lrq_kernels.rotate_quantize
      cuda      lrq::_rotate_rows of csrc, where it is built and takes the form
      compile   torch.compile of the same chain of torch operators, its Hadamard product in bf16
      compile-rows, compile-rows-fp8   of the same chain without smoothing and rotation: norm or
                activation or concatenation, then what users of row-wise GEMMs pay
      fht       fast-hadamard-transform, where it is installed: rotates only, 16-bit output
form  cast          bf16 -> int8, nothing else: the yardstick, a plain copy at memory speed
      row-quantize  absmax of a row -> int8, or fp8 as the row-wise GEMM of torchao takes it
      the others    FORMS below
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.dit_shapes import IN_FEATURES
from benchmarks.timing import bench_us, graph_us, in_parallel, num_buffers

Row = dict[str, Any]
Shape = tuple[int, int]  # M, K

TOKENS = (512, 4096, 4608, 8192, 32760)
# K of a concatenation -> K of its first source: attention beside MLP in FLUX.1 and FLUX.2.
SPLITS = {15360: 3072, 24576: 6144}
EPS = 1e-6
# Of FLUX.1-dev and PixArt-Sigma, those of the table in kernels.md.
SHAPES = ((4608, 3072), (4608, 12288), (4608, 15360), (4096, 1152), (4096, 4608), (512, 3072))


@dataclass(frozen=True)
class Form:
    """Arguments of lrq::rotate_quantize, or of lrq::rotate when not `quantize`.

    source: what comes before: "plain", "norm" (LayerNorm and modulation), "gelu" or "concat".
    """

    rotation: str = "hadamard"
    block_size: int = 128
    act_bits: int = 8
    scale_mode: str = "absmax"
    scale_factor: float = 1.0
    permuted: bool = False
    quantize: bool = True
    source: str = "plain"

    def fits(self, in_features: int) -> bool:
        if self.source == "concat" and in_features not in SPLITS:
            return False
        return self.rotation == "none" or in_features % self.block_size == 0

    def runs_in_cuda(self) -> bool:
        """Whether lrq::_rotate_rows takes it."""
        usual = self.rotation == "hadamard" and not self.permuted and self.quantize
        return usual and self.source != "gelu"

    @property
    def rotate_arguments(self) -> tuple[str, int]:
        return self.rotation, self.block_size

    @property
    def quantize_arguments(self) -> tuple[str, int, int, str, float]:
        return (*self.rotate_arguments, self.act_bits, self.scale_mode, self.scale_factor)


FORMS = {
    "plain-128": Form(),
    "plain-256": Form(block_size=256),
    "plain-512": Form(block_size=512),
    "plain-1024": Form(block_size=1024),
    "permuted-128": Form(permuted=True),
    "none": Form("none"),
    "rms-128": Form(scale_mode="rms", scale_factor=4 / 127),
    "int4-128": Form(act_bits=4, scale_factor=0.9),
    "int4-rms-128": Form(act_bits=4, scale_mode="rms", scale_factor=0.3545),
    "rotate-128": Form(quantize=False),
    "dual": Form("dual", permuted=True),
    "norm-modulate-128": Form(source="norm"),
    "gelu-128": Form(source="gelu"),
    "concat-128": Form(source="concat"),
}
# What is timed besides lrq's kernels: form -> implementations.
PEERS = {
    "plain-128": ("compile",),
    "none": ("compile",),
    "rotate-128": ("fht",),
    "norm-modulate-128": ("compile", "compile-rows", "compile-rows-fp8"),
    "gelu-128": ("compile", "compile-rows", "compile-rows-fp8"),
    "concat-128": ("compile", "compile-rows", "compile-rows-fp8"),
    "row-quantize": ("compile", "compile-fp8"),
}
NAMES = (*FORMS, "row-quantize")


# ---- what is timed ------------------------------------------------------------------------------


@triton.jit
def _cast_kernel(
    x_ptr,  # [count] bf16
    out_ptr,  # [count] int8
    count,
    BLOCK: tl.constexpr,
):
    """out = rint(20 x), its low byte: what any kernel must move, and no more."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < count).to(tl.float32)
    code = tl.fma(x, 20.0, 12582912.0).to(tl.int32, bitcast=True)
    tl.store(out_ptr + offset, code.to(tl.int8), mask=offset < count)


def cast_only(x: Tensor) -> Tensor:
    """bf16 -> int8 of the same shape, the yardstick."""
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    grid = (triton.cdiv(x.numel(), 4096),)
    _cast_kernel[grid](x, out, x.numel(), BLOCK=4096, num_warps=4)
    return out


@dataclass(frozen=True)
class Parameters:
    """Of one K: bf16 [K], int32 [K], fp32 [2, 128, 128], +-1 bf16 [128, 128], bf16
    [1, K] twice."""

    channel_scale: Tensor
    permutation: Tensor
    matrices: Tensor
    hadamard: Tensor
    scale: Tensor
    shift: Tensor

    @staticmethod
    def draw(in_features: int, device: str = "cuda") -> Parameters:
        from lrq_kernels.rotation import block_hadamard

        signs = torch.randint(0, 2, (in_features,), device=device) * 2 - 1
        # As in a model: chunks of what one linear makes.
        modulation = torch.randn(1, 6 * in_features, device=device).bfloat16()
        return Parameters(
            ((torch.rand(in_features, device=device) + 0.5) * signs).bfloat16(),
            torch.randperm(in_features, device=device).int(),
            torch.linalg.qr(torch.randn(2, 128, 128)).Q.contiguous().to(device),
            block_hadamard(torch.eye(128), 128).sign().to(device, torch.bfloat16),
            *modulation.chunk(6, dim=1)[:2],
        )


def chain(x: Tensor, channel_scale: Tensor, hadamard: Tensor | None) -> tuple[Tensor, Tensor]:
    """plain-128 (or "none" without a matrix) as a user of torch writes it, for torch.compile.

    The product runs in bf16: in fp32 it would take several times as long.
    """
    v = x.float() * channel_scale
    norm = 1.0
    if hadamard is not None:
        width = hadamard.shape[0]
        product = v.to(hadamard.dtype).view(-1, width) @ hadamard
        v, norm = product.view(x.shape).float(), width**-0.5
    x_scale = v.abs().amax(dim=-1) * (norm / 127)
    x_q = (v * (norm / x_scale)[:, None]).round().clamp(-127, 127).to(torch.int8)
    return x_q, x_scale


def row_quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Row quantization without rotation or smoothing: what users of row-wise fp8 pay."""
    top = 127.0 if dtype is torch.int8 else torch.finfo(dtype).max
    x_scale = x.abs().amax(dim=-1).float() / top
    scaled = (x.float() / x_scale[:, None]).clamp(-top, top)
    return (scaled.round() if dtype is torch.int8 else scaled).to(dtype), x_scale


def two_sources(x: Tensor) -> tuple[Tensor, Tensor]:
    """The memory of x [M, K] as two contiguous tensors of M tokens."""
    m, k = x.shape
    first, second = x.view(-1).split([m * SPLITS[k], m * (k - SPLITS[k])])
    return first.view(m, -1), second.view(m, -1)


def before(x: Tensor, source: str, p: Parameters) -> Tensor:
    """What precedes quantization, as a user of torch writes it: in x's dtype."""
    if source == "norm":
        return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + p.scale) + p.shift
    if source == "gelu":
        return F.gelu(x, approximate="tanh")
    return torch.cat(two_sources(x), dim=-1) if source == "concat" else x


def _triton_call(form: Form, p: Parameters) -> Callable[[Tensor], Any]:
    from lrq_kernels import rotate_quantize as kernels

    permutation = p.permutation if form.permuted else None
    matrices = p.matrices if form.rotation == "dual" else None
    tensors = (p.channel_scale, permutation, matrices)
    if not form.quantize:
        return lambda x: kernels.rotate(x, *tensors, *form.rotate_arguments)
    rest = (*tensors, *form.quantize_arguments)
    if form.source == "norm":
        front = (None, None, p.scale, p.shift, "layer", EPS)
        return lambda x: kernels.norm_modulate_rotate_quantize(x, *front, *rest, False)
    if form.source == "gelu":
        return lambda x: kernels.activation_rotate_quantize(x, None, "gelu_tanh", *rest, False)
    if form.source == "concat":
        return lambda x: kernels.concat_rotate_quantize(*two_sources(x), *rest)
    return lambda x: kernels.rotate_quantize(x, *rest)


def _cuda_call(form: Form, p: Parameters) -> Callable[[Tensor], Any]:
    from lrq_kernels.activation_path import _rotate_rows

    rest = (p.channel_scale, *form.quantize_arguments[1:])
    if form.source == "norm":
        return lambda x: _rotate_rows(x, None, p.scale, p.shift, "layer", EPS, *rest)
    no_norm = (None, None, "none", 0.0)
    if form.source == "concat":
        return lambda x: _rotate_rows(*two_sources(x), *no_norm, *rest)
    return lambda x: _rotate_rows(x, None, *no_norm, *rest)


def cuda_is_built() -> bool:
    name = "lrq::_rotate_rows"
    has_kernel = torch._C._dispatch_has_kernel
    return has_kernel(name) and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


def _compiled_call(name: str, impl: str, p: Parameters) -> Callable[[Tensor], Any]:
    source = FORMS[name].source if name in FORMS else "plain"
    if name == "row-quantize" or impl.startswith("compile-rows"):
        dtype = torch.float8_e4m3fn if impl.endswith("fp8") else torch.int8

        def rows(x: Tensor) -> tuple[Tensor, Tensor]:
            return row_quantize(before(x, source, p), dtype)

        return torch.compile(rows, dynamic=False)

    def same_chain(x: Tensor) -> tuple[Tensor, Tensor]:
        hadamard = None if name == "none" else p.hadamard
        return chain(before(x, source, p), p.channel_scale, hadamard)

    return torch.compile(same_chain, dynamic=False)


def make_function(name: str, impl: str, p: Parameters) -> Callable[[Tensor], Any]:
    """The implementation of a form, of x bf16 [M, K]; outputs are new tensors."""
    if name == "cast":
        return cast_only
    if impl == "triton":
        return _triton_call(FORMS[name], p)
    if impl == "cuda":
        return _cuda_call(FORMS[name], p)
    if impl == "fht":
        from fast_hadamard_transform import hadamard_transform

        return lambda x: hadamard_transform(x.view(-1, 128), 128**-0.5)
    return _compiled_call(name, impl, p)


def implementations(names: Iterable[str], in_features: int) -> list[tuple[str, str]]:
    """(form, impl) of everything to time at this K."""
    pairs = []
    for name in names:
        if name in FORMS and not FORMS[name].fits(in_features):
            continue
        if name in FORMS:
            pairs.append((name, "triton"))
            if FORMS[name].runs_in_cuda() and cuda_is_built():
                pairs.append((name, "cuda"))
        for impl in PEERS.get(name, ()):
            if impl != "fht" or importlib.util.find_spec("fast_hadamard_transform"):
                pairs.append((name, impl))
    return pairs


# ---- measuring ----------------------------------------------------------------------------------


def _compile_job(job: tuple[str, str, int, int]) -> None:
    """Run one implementation once, in a process of its own: fills the caches on disk."""
    name, impl, m, k = job
    try:
        import torch._inductor.config as inductor

        inductor.compile_threads = 1
        x = torch.zeros(m, k, device="cuda", dtype=torch.bfloat16)
        make_function(name, impl, Parameters.draw(k))(x)
        torch.cuda.synchronize()
    except Exception:  # measured again, and reported, in the main process
        return


def compile_all(shapes: Iterable[Shape], names: Iterable[str]) -> None:
    jobs = {}
    for m, k in shapes:
        for name, impl in implementations(names, k):
            # Triton kernels do not depend on M, what torch.compile makes does.
            jobs.setdefault((name, impl, k, m if impl.startswith("compile") else 0), m)
    in_parallel(_compile_job, [(name, impl, m, k) for (name, impl, k, _), m in jobs.items()])


def bytes_moved(name: str, m: int, k: int) -> int:
    return m * k * (4 if name in FORMS and not FORMS[name].quantize else 3)


def _measure_row(name: str, impl: str, xs: list[Tensor], p: Parameters) -> Row:
    m, k = xs[0].shape
    row: Row = {"form": name, "impl": impl, "m": m, "k": k, "us": None, "graph_us": None}
    try:
        function = make_function(name, impl, p)
        calls = [functools.partial(function, x) for x in xs]
        calls[0]()  # compiles
        row["us"] = bench_us(calls[0])
        row["graph_us"] = graph_us(calls, row["us"])
    except Exception as error:  # one implementation must not cost the figures of the others
        print(f"{name} {impl} {m} x {k}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    return row


def time_shape(m: int, k: int, names: Iterable[str]) -> list[Row]:
    """Rows of one shape; "cast" first."""
    # Without this torch.compile falls back to eager when it has seen too many shapes.
    torch.compiler.reset()
    p = Parameters.draw(k)
    buffers = num_buffers(bytes_moved("cast", m, k))
    xs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(buffers)]
    cast = _measure_row("cast", "triton", xs, p)
    rows = [_measure_row(name, impl, xs, p) for name, impl in implementations(names, k)]
    # Again: clocks that were still low at first would flatter everything measured after it.
    again = _measure_row("cast", "triton", xs, p)
    for key in ("us", "graph_us"):
        figures = [row[key] for row in (cast, again) if row[key] is not None]
        cast[key] = min(figures, default=None)
    rows.insert(0, cast)
    for row in rows:
        row["cast_us"], row["cast_graph_us"] = cast["us"], cast["graph_us"]
        row["ratio"] = row["us"] / cast["us"] if row["us"] and cast["us"] else None
        graph = row["graph_us"]
        row["tb_s"] = bytes_moved(row["form"], m, k) / graph * 1e-6 if graph else None
    return rows


# ---- reports ------------------------------------------------------------------------------------

COLUMNS = 6
RATIO_TICKS = (1, 1.1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16)


def _shapes_of(rows: list[Row]) -> list[Shape]:
    return list(dict.fromkeys((row["m"], row["k"]) for row in rows))


def _by_implementation(rows: list[Row]) -> dict[tuple[str, str], dict[Shape, Row]]:
    """Rows by (form, impl), in the order of FORMS also where the first shape lacks some."""
    order = ("cast", *NAMES)
    table: dict[tuple[str, str], dict[Shape, Row]] = {}
    for row in sorted(rows, key=lambda row: order.index(row["form"])):
        table.setdefault((row["form"], row["impl"]), {})[row["m"], row["k"]] = row
    return table


def _figure(us: float | None) -> str:
    if us is None:
        return "-"
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def _cell(row: Row | None) -> str:
    if row is None or row["us"] is None:
        return "-"
    ratio = f"{row['ratio']:.2f}" if row["ratio"] else "-"
    return f"{_figure(row['us'])}/{_figure(row['graph_us'])} {ratio}"


def _line(first: str, cells: Iterable[str]) -> str:
    return f"{first:26}" + "".join(f"{cell:>17}" for cell in cells)


def table(rows: list[Row]) -> str:
    """do_bench/graph microseconds and ratio to cast: a line for each implementation."""
    lines = []
    shapes = _shapes_of(rows)
    for start in range(0, len(shapes), COLUMNS):
        part = shapes[start : start + COLUMNS]
        lines.append(_line("us/graph us, us/cast", (f"{m} x {k}" for m, k in part)))
        for (form, impl), by_shape in _by_implementation(rows).items():
            cells = [_cell(by_shape.get(shape)) for shape in part]
            if set(cells) != {"-"}:
                lines.append(_line(f"{form} {impl}", cells))
    return "\n".join(lines)


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Ratio to cast-only of every implementation over the shapes; a word where matplotlib lacks."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print(f"no plot: matplotlib is not installed; --from-json draws {path} elsewhere")
        return
    shapes = _shapes_of(rows)
    figure, axes = pyplot.subplots(figsize=(max(9.0, 0.45 * len(shapes)), 5.0))
    for index, ((form, impl), by_shape) in enumerate(_by_implementation(rows).items()):
        ratios = [by_shape.get(shape, {}).get("ratio") for shape in shapes]
        if not any(ratios):
            continue
        axes.plot(
            [float("nan") if ratio is None else ratio for ratio in ratios],
            marker={"triton": "o", "cuda": "s"}.get(impl, "x"),
            linestyle="-" if impl in ("triton", "cuda") else ":",
            color=pyplot.get_cmap("tab20")(index % 20),
            label=f"{form} ({impl})",
        )
    axes.set_yscale("log", base=2)
    axes.set_yticks(RATIO_TICKS, [f"{tick:g}" for tick in RATIO_TICKS])
    axes.set_ylim(0.95, max(1.5, *(row["ratio"] or 1.0 for row in rows)) * 1.05)
    axes.set_xticks(range(len(shapes)), [f"{m} x {k}" for m, k in shapes], rotation=60, ha="right")
    axes.set_ylabel("time / cast-only (do_bench)")
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def parse_shape(text: str) -> Shape:
    m, _, k = text.partition("x")
    if not (m.isdigit() and k.isdigit() and int(m) and int(k)):
        raise argparse.ArgumentTypeError(f"expected MxK, got {text!r}")
    return int(m), int(k)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forms", nargs="+", choices=NAMES, default=NAMES, metavar="FORM")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shapes", nargs="+", type=parse_shape, default=SHAPES, metavar="MxK")
    which.add_argument("--all", action="store_true", help="every K of dit_shapes, every M")
    which.add_argument("--from-json", type=Path, help="report rows measured before")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--plot", type=Path, help="draw the ratios to cast-only into this file")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    if arguments.from_json:
        rows, title = json.loads(arguments.from_json.read_text()), str(arguments.from_json)
    else:
        if not torch.cuda.is_available():
            raise SystemExit("bench_rotate_quantize: needs a CUDA device (or --from-json)")
        shapes = arguments.shapes
        if arguments.all:
            shapes = [(m, k) for k in IN_FEATURES for m in TOKENS]
        title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton "
        title += triton.__version__
        if not importlib.util.find_spec("fast_hadamard_transform"):
            print("fht skipped: fast_hadamard_transform is not installed")
        start = time.perf_counter()
        compile_all(shapes, arguments.forms)
        print(f"compiled, {time.perf_counter() - start:.0f} s", flush=True)
        rows = []
        for m, k in shapes:
            rows += time_shape(m, k, arguments.forms)
            torch.cuda.empty_cache()
            if arguments.json:  # after each shape: a run that is stopped keeps what it has
                arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"{m} x {k}: {time.perf_counter() - start:.0f} s", flush=True)
    if arguments.plot:
        plot(rows, arguments.plot, title)
    print(title)
    print(table(rows))


if __name__ == "__main__":
    main()
