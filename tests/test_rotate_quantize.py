"""Triton rotate_quantize and rotate against the float64 oracle of reference.py.

Three levels: the kernels in Triton's interpreter (fp32 input only: bf16 arithmetic is wrong there),
every kernel compiled ahead of time for each architecture, and everything on a GPU.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lrq_kernels import ops, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_in_interpreter")

# kernels.md section 6: a code may differ by 1 where v / x_scale is this close to a half ...
TIE_DISTANCE = 1e-3
# ... in this share of the codes; SMALL_SAMPLE codes more, for samples too small to show a rate.
TIE_RATE = 20e-6
SMALL_SAMPLE = 2
SCALE_ERROR = 1e-6
# fp32 error of one rotated value, relative to the largest of its row.
ROTATION_ERROR = 1e-6

# Every K of shapes.md, and the smallest.
WIDTHS = (
    128,
    256,
    384,
    1024,
    1152,
    1536,
    2432,
    3072,
    3840,
    4096,
    4608,
    5120,
    6144,
    8960,
    9728,
    10240,
    12288,
    13824,
    15360,
)
TOKENS = (0, 1, 3, 64, 257)


@dataclass(frozen=True)
class Case:
    """The arguments of the ops that are not tensors."""

    rotation: str = "hadamard"
    block_size: int = 128
    act_bits: int = 8
    scale_mode: str = "absmax"
    scale_factor: float = 1.0

    @property
    def qmax(self) -> int:
        return 2 ** (self.act_bits - 1) - 1

    @property
    def rotate_arguments(self) -> tuple[str, int]:
        return self.rotation, self.block_size

    @property
    def arguments(self) -> tuple[str, int, int, str, float]:
        return (*self.rotate_arguments, self.act_bits, self.scale_mode, self.scale_factor)


Tensors = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def draw(
    tokens: int,
    in_features: int,
    dtype: torch.dtype,
    case: Case,
    *,
    permuted: bool = False,
    device: str = "cpu",
) -> Tensors:
    """x [M, K] with a few loud channels, channel_scale with signs, permutation, matrices."""
    x = torch.randn(tokens, in_features, device=device)
    x[:, :: max(1, in_features // 8)] *= 20.0
    signs = torch.randint(0, 2, (in_features,), device=device) * 2 - 1
    channel_scale = (torch.rand(in_features, device=device) + 0.5) * signs
    permutation = torch.randperm(in_features, device=device).int() if permuted else None
    matrices = None
    if case.rotation == "dual":
        matrices = torch.linalg.qr(torch.randn(2, 128, 128, device=device)).Q.contiguous()
    return x.to(dtype), channel_scale, permutation, matrices


def launch(op: str, *arguments: object) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The op on a GPU through the dispatcher, or its kernels in the interpreter."""
    if not INTERPRETED:
        return getattr(ops, op)(*arguments)
    from lrq_kernels import rotate_quantize as kernels

    return getattr(kernels, op)(*arguments)


def assert_codes_within_tie_budget(
    x_q: torch.Tensor, x_scale: torch.Tensor, tensors: Tensors, case: Case
) -> None:
    """x_scale to fp32 accuracy; codes equal float64's but for a few, by 1, at ties."""
    wide = (tensors[0].double(), *tensors[1:])
    expected_q, expected_scale = reference.rotate_quantize(*wide, *case.arguments)
    assert x_q.dtype == torch.int8 and x_q.is_contiguous() and x_q.shape == tensors[0].shape
    assert x_scale.dtype == torch.float32 and x_scale.shape == tensors[0].shape[:-1]
    if x_q.numel() == 0:
        return
    scale_error = (x_scale.double() - expected_scale).abs() / expected_scale.clamp(min=1e-300)
    worst = float(scale_error.max())
    assert worst <= SCALE_ERROR, f"x_scale is off by {worst:.2e} of itself"

    difference = (x_q.int() - expected_q.int()).abs()
    assert int(difference.max()) <= 1, f"codes differ by up to {int(difference.max())}"
    steps = reference.rotate(*wide, *case.rotate_arguments) / expected_scale[..., None]
    differing = steps[difference == 1]
    to_half = ((differing - differing.floor()) - 0.5).abs()
    assert not (to_half > TIE_DISTANCE).any(), f"{float(to_half.max()):.2e} from a half, not a tie"
    budget = math.ceil(TIE_RATE * x_q.numel()) + SMALL_SAMPLE
    assert len(differing) <= budget, f"{len(differing)} ties in {x_q.numel()} codes, over {budget}"


def assert_rotated_within_rounding(y: torch.Tensor, tensors: Tensors, case: Case) -> None:
    """y is the float64 rotation, rounded once to its dtype (and fp32 error before that)."""
    wide = (tensors[0].double(), *tensors[1:])
    expected = reference.rotate(*wide, *case.rotate_arguments)
    assert y.dtype == tensors[0].dtype and y.shape == tensors[0].shape and y.is_contiguous()
    half_unit = expected.abs() * torch.finfo(y.dtype).eps / 2
    row = expected.abs().amax(-1, keepdim=True) if expected.numel() else expected
    excess = (y.double() - expected).abs() - half_unit - ROTATION_ERROR * row
    assert not (excess > 0).any(), f"beyond one rounding by {float(excess.max()):.2e}"


def check_quantize(tensors: Tensors, case: Case) -> None:
    x_q, x_scale = launch("rotate_quantize", *tensors, *case.arguments)
    assert_codes_within_tie_budget(x_q, x_scale, tensors, case)


def check_rotate(tensors: Tensors, case: Case) -> None:
    y = launch("rotate", *tensors, *case.rotate_arguments)
    assert isinstance(y, torch.Tensor)
    assert_rotated_within_rounding(y, tensors, case)


def check_special_rows(device: str, dtype: torch.dtype, case: Case) -> None:
    """A zero row, and rows with NaN or inf, next to ordinary ones that must not notice."""
    tensors = draw(6, 384, dtype, case, device=device)
    x = tensors[0]
    x[1] = 0.0
    x[3, 200] = float("nan")
    x[4, 7] = float("-inf")
    x_q, x_scale = launch("rotate_quantize", *tensors, *case.arguments)
    assert float(x_scale[1]) == 0.0 and not x_q[1].any()
    assert not x_scale[3:5].isfinite().any() and not x_q[3:5].any()
    finite = torch.tensor([0, 2, 5], device=device)
    rows = (x[finite], *tensors[1:])
    assert_codes_within_tie_budget(x_q[finite], x_scale[finite], rows, case)


# ---- interpreter, CPU ---------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_kernels_in_interpreter() -> None:
    """The tests marked in_interpreter, in a process where Triton interprets its kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "interpreted", __file__]
    cwd = Path(__file__).parents[1]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout + result.stderr


INTERPRETED_CASES = [
    (128, Case()),  # an eighth of a tile
    (384, Case()),
    (1152, Case(block_size=128)),  # padded to a power of two
    (192, Case(block_size=64, act_bits=4, scale_mode="rms", scale_factor=0.35)),
    (96, Case(block_size=32, scale_factor=0.9)),  # clipped: codes saturate
    (768, Case(block_size=256)),  # a block of more than one tile row
    (512, Case(block_size=512, act_bits=4)),
    (2048, Case(block_size=1024)),
    (80, Case(rotation="none")),  # not a multiple of a block
    (75, Case(rotation="none")),  # nor of the columns of a thread
    (72, Case(rotation="none", scale_mode="rms", scale_factor=4 / 127)),
    (384, Case(rotation="dual")),
]


@in_interpreter
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("in_features, case", INTERPRETED_CASES)
def test_interpreted_codes_and_rotation(in_features: int, case: Case, permuted: bool) -> None:
    tensors = draw(2, in_features, torch.float32, case, permuted=permuted)
    check_quantize(tensors, case)
    check_rotate(tensors, case)


@in_interpreter
@pytest.mark.parametrize("rotation", ["none", "hadamard", "dual"])
def test_interpreted_special_rows(rotation: str) -> None:
    check_special_rows("cpu", torch.float32, Case(rotation=rotation))


@in_interpreter
def test_interpreted_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of more values than threads, and tokens of several chunks: rare at real widths."""
    from lrq_kernels import rotate_quantize as kernels

    for launch_as in (kernels.RowLaunch(32, 2, 1), kernels.RowLaunch(64, 1, 1)):
        monkeypatch.setattr(kernels, "row_launch", lambda _, launch_as=launch_as: launch_as)
        for case in (Case(), Case(block_size=1024), Case("none", act_bits=4)):
            check_quantize(draw(2, 2048, torch.float32, case, permuted=True), case)
            check_rotate(draw(2, 2048, torch.float32, case), case)


@in_interpreter
def test_interpreted_strides_and_empty_input() -> None:
    case = Case()
    _, channel_scale, permutation, _ = draw(1, 128, torch.float32, case, permuted=True)
    for x in (torch.randn(2, 300)[:, 5:133], torch.randn(2, 2, 128), torch.randn(0, 128)):
        check_quantize((x, channel_scale, permutation, None), case)
        check_rotate((x, channel_scale, permutation, None), case)


@in_interpreter
def test_interpreted_dual_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from lrq_kernels import rotate_quantize as kernels

    monkeypatch.setattr(kernels, "_DUAL_ELEMENTS", 2 * 128)  # 2 + 2 + 1 tokens
    case = Case(rotation="dual")
    tensors = draw(5, 128, torch.float32, case, permuted=True)
    check_quantize(tensors, case)
    check_rotate(tensors, case)


# ---- launch parameters and ahead-of-time compilation, CPU ---------------------------------------

not_interpreted = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")


@not_interpreted
def test_launch_covers_the_token() -> None:
    from lrq_kernels.rotate_quantize import row_launch

    for in_features in (*WIDTHS, 1, 64, 192, 1000, 1025, 4104, 21504):
        launch = row_launch(in_features)
        assert 32 * launch.elements * launch.chunks >= in_features
        assert launch.elements & (launch.elements - 1) == 0, "a tile's size is a power of two"
        assert launch.elements % 32 == 0, "32 neighbours of a tile sit in one warp"
        assert launch.num_warps in (1, 2, 4, 8, 16)


def compile_kernel(kernel, arguments: dict[str, object], num_warps: int, arch: int):
    """Cubin of a kernel; arguments: name -> Triton type ("*bf16", "i32"), or a constant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = ("*", "i32", "fp32")
    signature, constants, aligned = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, str) and value.startswith(types):
            signature[name] = value
            if value.startswith("*") or name == "x_row_stride":
                aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(index,)] = value
    return triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps},
    )


def row_kernel(in_features: int, case: Case, dtype: str, arch: int, *, quantize: bool = True):
    from lrq_kernels import rotate_quantize as kernels

    block_size = case.block_size if case.rotation == "hadamard" else 1
    launch = kernels.row_launch(in_features)
    arguments = {
        "x_ptr": f"*{dtype}",
        "x_row_stride": "i32",
        "channel_scale_ptr": "*fp32",
        "permutation_ptr": "*i32" if case.scale_mode == "rms" else None,
        "out_ptr": "*i8" if quantize else f"*{dtype}",
        "x_scale_ptr": "*fp32" if quantize else None,
        "step_factor": "fp32",
        "K": in_features,
        "N": launch.elements,
        "CHUNKS": launch.chunks,
        "BLOCK": block_size,
        "QMAX": case.qmax,
        "RMS": case.scale_mode == "rms",
        "CLAMP": case.scale_mode == "rms",
    }
    return compile_kernel(kernels._row_kernel, arguments, launch.num_warps, arch)


def dense_kernel(in_features: int, dtype: str, arch: int, *, first: bool):
    from lrq_kernels import rotate_quantize as kernels

    arguments = {
        "x_ptr": f"*{dtype}" if first else "*fp32",
        "x_row_stride": "i32",
        "channel_scale_ptr": "*fp32" if first else None,
        "permutation_ptr": None if first else "*i32",
        "matrix_ptr": "*fp32",
        "out_ptr": "*fp32" if first else f"*{dtype}",
        "num_rows": "i32",
        "K": in_features,
        "ROWS": kernels._DENSE_ROWS,
    }
    return compile_kernel(kernels._block_dense_kernel, arguments, kernels._DENSE_WARPS, arch)


def assert_no_spills(compiled) -> None:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [str(tool), "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert found is not None, usage
    # On sm_100 ptxas parks one value on the stack to stay at 64 registers.
    assert int(found.group(2)) <= 8 and found.group(3) == "0", f"spills: {found.group(0)}"


@not_interpreted
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_compiles_ahead_of_time(arch: int) -> None:
    """No GPU needed: a kernel that an architecture cannot take, or that spills, fails here."""
    rms = Case(block_size=1024, scale_mode="rms", scale_factor=0.03)
    variants = [
        row_kernel(3072, Case(), "bf16", arch),
        row_kernel(15360, rms, "fp16", arch),  # widest
        row_kernel(192, Case(block_size=64, act_bits=4), "fp32", arch),
        row_kernel(4608, Case(rotation="none"), "bf16", arch),
        row_kernel(1152, Case(), "bf16", arch, quantize=False),
        row_kernel(1001, Case(rotation="none"), "bf16", arch),
        dense_kernel(1152, "bf16", arch, first=True),
        dense_kernel(1152, "bf16", arch, first=False),
    ]
    for compiled in variants:
        assert_no_spills(compiled)


@not_interpreted
@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("block_size", [64, 128, 1024])
def test_values_stay_where_they_were_loaded(block_size: int, quantize: bool) -> None:
    """No layout conversion through shared memory: they made earlier forms two to three times
    slower, and Triton gets some conversions of int8 wrong (see "a token in registers")."""
    compiled = row_kernel(3072, Case(block_size=block_size), "bf16", 90, quantize=quantize)
    assert "convert_layout" not in compiled.asm["ttgir"]
    assert compiled.metadata.shared <= 4 * 32, "only the reduction over warps"


# ---- GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("in_features", WIDTHS)
def test_every_width(in_features: int) -> None:
    """Padding and the number of warps change with K."""
    case = Case()
    tensors = draw(257, in_features, torch.bfloat16, case, device="cuda")
    check_quantize(tensors, case)
    check_rotate(tensors, case)


@pytest.mark.gpu
@pytest.mark.parametrize("in_features", [64, 192, 1152, 3072, 8960, 15360, 1000, 1001, 1004, 4104])
def test_widths_without_rotation(in_features: int) -> None:
    """K need not be a multiple of anything; 64 is the input embedder of FLUX."""
    for permuted in (False, True):
        case = Case(rotation="none")
        tensors = draw(65, in_features, torch.bfloat16, case, permuted=permuted, device="cuda")
        check_quantize(tensors, case)
        check_rotate(tensors, case)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024])
def test_every_block_size(block_size: int) -> None:
    """One block, a part of a tile, padded, widest of shapes.md."""
    case = Case(block_size=block_size)
    for in_features in (block_size, 3 * block_size, 3072, 15360):
        for permuted in (False, True):
            tensors = draw(33, in_features, torch.bfloat16, case, permuted=permuted, device="cuda")
            check_quantize(tensors, case)
            check_rotate(tensors, case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rotation", ["none", "hadamard", "dual"])
def test_every_mode(rotation: str, dtype: torch.dtype) -> None:
    """Scale modes and code ranges, with and without permutation."""
    modes = [(8, "absmax", 1.0), (4, "absmax", 0.9), (8, "rms", 0.0315), (4, "rms", 0.3545)]
    for act_bits, scale_mode, scale_factor in modes:
        case = Case(rotation, 128, act_bits, scale_mode, scale_factor)
        for permuted in (False, True):
            tensors = draw(100, 1152, dtype, case, permuted=permuted, device="cuda")
            check_quantize(tensors, case)
            check_rotate(tensors, case)


@pytest.mark.gpu
@pytest.mark.parametrize("rotation", ["none", "hadamard", "dual"])
def test_every_number_of_tokens(rotation: str) -> None:
    case = Case(rotation)
    for tokens in TOKENS:
        tensors = draw(tokens, 3072, torch.bfloat16, case, permuted=True, device="cuda")
        check_quantize(tensors, case)
        check_rotate(tensors, case)


@pytest.mark.gpu
def test_tie_rate_at_size() -> None:
    """A sample large enough that 20 per million means something."""
    for case in (Case(), Case(block_size=1024), Case("dual")):
        tensors = draw(1024, 3072, torch.bfloat16, case, permuted=True, device="cuda")
        check_quantize(tensors, case)


@pytest.mark.gpu
def test_dual_in_chunks() -> None:
    """More tokens than one fp32 intermediate holds."""
    from lrq_kernels.rotate_quantize import _DUAL_ELEMENTS

    case = Case("dual")
    tokens = _DUAL_ELEMENTS // 15360 + 77
    check_quantize(draw(tokens, 15360, torch.bfloat16, case, permuted=True, device="cuda"), case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rotation", ["none", "hadamard", "dual"])
def test_special_rows(rotation: str, dtype: torch.dtype) -> None:
    for mode in (Case(rotation), Case(rotation, act_bits=4, scale_mode="rms", scale_factor=0.35)):
        check_special_rows("cuda", dtype, mode)


@pytest.mark.gpu
def test_row_strides_and_leading_dimensions() -> None:
    """Views: wide rows, every other row, an odd start that forbids wide loads, a batch, one row."""
    case = Case()
    base = torch.randn(2, 40, 4000, device="cuda").bfloat16()
    views = [base[0, :, :3072], base[0, ::2, 64:3136], base[0, :, 3:3075], base[:, :, :3072]]
    views += [base[0, 0, :3072], base[0, 0, :3072].expand(5, -1)]
    _, channel_scale, permutation, _ = draw(1, 3072, torch.bfloat16, case, device="cuda")
    for x in views:
        check_quantize((x, channel_scale, permutation, None), case)
        check_rotate((x, None, permutation, None), case)


@pytest.mark.gpu
def test_outputs_are_repeatable() -> None:
    for rotation in ("hadamard", "dual"):
        case = Case(rotation)
        tensors = draw(300, 3072, torch.bfloat16, case, permuted=True, device="cuda")
        first = ops.rotate_quantize(*tensors, *case.arguments)
        for _ in range(3):
            again = ops.rotate_quantize(*tensors, *case.arguments)
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
