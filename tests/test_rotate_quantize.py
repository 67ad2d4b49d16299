"""Triton rotate_quantize and rotate against the float64 oracle of reference.py.

Three levels: the kernels in Triton's interpreter (fp32 input only: bf16 arithmetic is wrong there),
every kernel compiled ahead of time for each architecture, and everything on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import (
    assert_no_spills,
    assert_nothing_moves,
    dense_kernel,
    dual_kernel,
    lane_shuffles,
    row_kernel,
)
from rotate_cases import (
    Case,
    check_quantize,
    check_rotate,
    check_special_rows,
    draw,
    in_interpreter,
    not_interpreted,
)

from lrq_kernels import ops

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

# ---- interpreter, CPU ---------------------------------------------------------------------------


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
@pytest.mark.parametrize(
    "num_warps, values, in_features, block_size",
    [
        (1, 60, 1920, 128),  # a chunk of every size: 32, 16, 8, 4
        (1, 60, 1664, 128),  # padded inside the chunk of 8, which leaves that of 4 empty
        (1, 48, 1536, 512),  # the largest block that a chunk of 16 holds
        (1, 40, 1280, 256),  # and that a chunk of 8 holds
        (2, 32, 2048, 1024),  # more than one warp
        (2, 20, 1184, 32),
        (2, 12, 768, 64),
        (1, 12, 333, 1),  # a mask inside a thread's columns
    ],
)
def test_interpreted_layouts(
    monkeypatch: pytest.MonkeyPatch, num_warps: int, values: int, in_features: int, block_size: int
) -> None:
    from lrq_kernels import rotate_quantize as kernels

    launch_as = kernels.RowLaunch(num_warps, values)
    monkeypatch.setattr(kernels, "row_launch", lambda *_: launch_as)
    case = Case("none") if block_size == 1 else Case(block_size=block_size)
    for permuted in (False, True):
        tensors = draw(2, in_features, torch.float32, case, permuted=permuted)
        check_quantize(tensors, case)
        check_rotate(tensors, case)


@in_interpreter
def test_interpreted_strides_and_empty_input() -> None:
    case = Case()
    _, channel_scale, permutation, _ = draw(1, 128, torch.float32, case, permuted=True)
    for x in (torch.randn(2, 300)[:, 5:133], torch.randn(2, 2, 128), torch.randn(0, 128)):
        check_quantize((x, channel_scale, permutation, None), case)
        check_rotate((x, channel_scale, permutation, None), case)


@in_interpreter
@pytest.mark.parametrize("programs", [0, 2])
@pytest.mark.parametrize("permuted", [False, True])
def test_interpreted_dual(monkeypatch: pytest.MonkeyPatch, programs: int, permuted: bool) -> None:
    """In one launch: several tokens a program, programs that take several such, rows left over; and
    product by product, in several parts of M."""
    from lrq_kernels import rotate_quantize as kernels

    monkeypatch.setattr(kernels, "_PART_ELEMENTS", 3 * 384)  # 3 + 2 tokens
    monkeypatch.setattr(kernels, "_dual_programs", lambda _: programs)
    monkeypatch.setattr(kernels, "_DUAL_ROWS", 8)  # 2 tokens: five are 2 + 2 + 1, two rows idle
    for case in (Case("dual"), Case("dual", 128, 4, "rms", 0.35)):
        tensors = draw(5, 384, torch.float32, case, permuted=permuted)
        check_quantize(tensors, case)
        check_rotate(tensors, case)
        # Numbers of any size, tokens of the same program apart by far.
        tensors[0].mul_(torch.tensor([1e-15, 1e15, 1.0, 1e-5, 0.0])[:, None])
        check_quantize(tensors, case)


# ---- launch parameters and ahead-of-time compilation, CPU ---------------------------------------


@not_interpreted
@pytest.mark.parametrize("block_size", [1, 32, 64, 128, 256, 512, 1024])
def test_launch_covers_the_token(block_size: int) -> None:
    from lrq_kernels.rotate_quantize import _MAX_VALUES, row_launch

    for in_features in (*WIDTHS, 1, 64, 192, 1000, 1025, 4104, 21504):
        launch = row_launch(in_features, block_size)
        assert 32 * launch.num_warps * launch.values >= in_features
        assert launch.num_warps in (1, 2, 4, 8, 16)
        assert 0 < launch.values <= _MAX_VALUES, "more would spill"
        # A block must fit the lanes of one warp in every chunk.
        assert launch.values % max(4, block_size // 32) == 0


@not_interpreted
@pytest.mark.parametrize("in_features", [1152, 1536, 3072, 4608, 5120, 6144, 12288])
def test_token_of_a_real_width_has_no_padding(in_features: int) -> None:
    from lrq_kernels.rotate_quantize import row_launch

    launch = row_launch(in_features, 128)
    assert 32 * launch.num_warps * launch.values == in_features


@not_interpreted
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_compiles_ahead_of_time(arch: int) -> None:
    """No GPU needed: a kernel that an architecture cannot take, or that spills, fails here."""
    rms = Case(block_size=1024, scale_mode="rms", scale_factor=0.03)
    variants = [
        row_kernel(15360, rms, "fp16", arch, permuted=True),  # widest
        dense_kernel(1152, "bf16", arch, first=False),
    ]
    for compiled in variants:
        assert_no_spills(compiled)


@not_interpreted
def test_every_variant_compiles_for_hopper() -> None:
    variants = [
        row_kernel(12288, Case(), "bf16", 90),  # most values a thread
        row_kernel(15360, Case(), "bf16", 90, split=3072),
        row_kernel(192, Case(block_size=64, act_bits=4), "fp32", 90),
        row_kernel(4608, Case(rotation="none"), "bf16", 90),
        row_kernel(1152, Case(), "bf16", 90, quantize=False),
        row_kernel(1001, Case(rotation="none"), "bf16", 90),
        dense_kernel(1152, "bf16", 90, first=True),
        dual_kernel(3072, Case("dual"), "bf16", 90),
        dual_kernel(1152, Case("dual", 128, 4, "rms", 0.35), "fp32", 90),
        dual_kernel(15360, Case("dual"), "bf16", 90, quantize=False),
    ]
    for compiled in variants:
        assert_no_spills(compiled)


@not_interpreted
@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("block_size", [64, 128, 1024])
def test_values_stay_where_they_were_loaded(block_size: int, quantize: bool) -> None:
    """No layout conversion through shared memory: they made earlier forms two to three times
    slower, and Triton gets some conversions of int8 wrong (see token_tiles.py)."""
    compiled = row_kernel(3072, Case(block_size=block_size), "bf16", 90, quantize=quantize)
    assert_nothing_moves(compiled, 1, lane_shuffles(96, block_size), int(quantize))


@not_interpreted
@pytest.mark.parametrize("in_features", [1000, 1001, 75])
def test_values_stay_in_rows_of_any_width(in_features: int) -> None:
    """Codes of such rows were wrong on an H100 when a conversion stood before their store."""
    case = Case("none")
    assert_nothing_moves(row_kernel(in_features, case, "bf16", 90, aligned=False), 1, 0)


@not_interpreted
@pytest.mark.parametrize(
    "in_features, num_warps, values, split",
    [(1152, 1, 36, 0), (9728, 4, 76, 0), (15360, 8, 64, 3072)],
)
def test_values_stay_in_chunks_of_every_size(
    in_features: int, num_warps: int, values: int, split: int
) -> None:
    compiled = row_kernel(in_features, Case(), "bf16", 90, split=split)
    assert_nothing_moves(compiled, num_warps, lane_shuffles(values, 128))


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
@pytest.mark.parametrize("in_features", [128, 384, 1152, 4608, 15360, 16384])
def test_dual_in_one_launch(in_features: int) -> None:
    """Tokens fill a program's rows or leave some; more of them than run at once."""
    for tokens in (5, 1500):
        case = Case("dual")
        tensors = draw(tokens, in_features, torch.bfloat16, case, permuted=True, device="cuda")
        check_quantize(tensors, case)
        check_rotate(tensors, case)


@pytest.mark.gpu
@pytest.mark.parametrize("in_features", [384, 3072, 24576])
def test_dual_by_products(monkeypatch: pytest.MonkeyPatch, in_features: int) -> None:
    """As where one launch cannot be; more tokens than one fp32 intermediate holds."""
    from lrq_kernels import rotate_quantize as kernels

    monkeypatch.setattr(kernels, "_dual_programs", lambda _: 0)
    tokens = kernels._PART_ELEMENTS // in_features + 77
    for case in (Case("dual"), Case("dual", 128, 4, "rms", 0.35)):
        tensors = draw(tokens, in_features, torch.bfloat16, case, permuted=True, device="cuda")
        check_quantize(tensors, case)
        check_rotate(tensors, case)


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
