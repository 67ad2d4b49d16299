"""The CUDA kernel behind lrq::_rotate_rows: its index maps and plans on a CPU, its codes on a GPU.

The maps come from `_planner`; the stages between them are emulated lane by lane, so that a wrong
map or a wrong sign shows up as a wrong Hadamard matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import rotate_cases
import torch
from rotate_cases import assert_codes_of_rounded_norm, assert_codes_within_tie_budget, norm_oracle

from benchmarks.dit_shapes import IN_FEATURES
from lrq_kernels import activation_path, ops, reference

planner = pytest.importorskip("lrq_kernels._planner")

BLOCKS = (128, 256, 512, 1024)
# Multiprocessors, and the bytes of shared memory that a thread block may have.
GPUS = {"sm_80": (108, 163), "sm_89": (128, 99), "sm_90": (132, 227), "sm_120": (188, 99)}


# ---- index maps, CPU ----------------------------------------------------------------------------


def sylvester(size: int) -> np.ndarray:
    matrix = np.ones((1, 1), dtype=np.int64)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def matrix_product(columns: np.ndarray) -> np.ndarray:
    """A of token_rotation.cuh times [16, 8]: row 8h + g, column 8 * chunk + 2t + half."""
    row, k = np.arange(16)[:, None], np.arange(16)
    h, g, chunk, t, half = row // 8, row % 8, k // 8, k // 2 % 4, k % 2
    odd = h * half + (g & 1) * (t & 1) + (g // 2 % 2) * (t // 2) + (g // 4) * chunk
    return np.where(odd % 2, -1, 1) @ columns


def warp_transform(x: np.ndarray, block_size: int) -> np.ndarray:
    """What the lanes of one warp do with x [1024], in the kernel's order of stages."""
    lanes = np.arange(32)
    v = np.zeros((32, 2, 4, 2, 2), dtype=np.int64)  # lane, chunk, word, row, column
    for chunk in range(2):
        for word in range(4):
            columns = np.zeros((16, 8), dtype=np.int64)
            for lane in lanes:
                for upper in range(2):
                    k = planner.lane_chunk_to_k(lane, chunk + 2 * upper) + 2 * word
                    at = 8 * upper + 2 * (lane % 4)
                    columns[at : at + 2, lane // 4] = x[k : k + 2]
            product = matrix_product(columns)
            for lane in lanes:
                g, t = lane // 4, lane % 4
                v[lane, chunk, word] = product[[g, g + 8], 2 * t : 2 * t + 2]
    for bit in (1, 2):
        for word in (0, 3 - bit):
            a, b = v[:, :, word].copy(), v[:, :, word + bit].copy()
            v[:, :, word], v[:, :, word + bit] = a + b, a - b
    v = np.stack([v[:, 0] + v[:, 1], v[:, 0] - v[:, 1]], axis=1)
    v[:, 1, :, :, 1] *= -1  # odd units have their chunks the other way round
    if block_size > 128:
        v = np.stack([v[..., 0] + v[..., 1], v[..., 0] - v[..., 1]], axis=-1)
    for bit in (1, 2):
        if block_size > 256 * bit:
            sign = np.where(lanes & bit, -1, 1)[:, None, None, None, None]
            v = v * sign + v[lanes ^ bit]

    out = np.zeros(1024, dtype=np.int64)
    for lane in lanes:
        for column in range(2):
            for chunk in range(2):
                k = planner.lane_result_to_k(lane, column, chunk)
                out[k : k + 8] = v[lane, chunk, :, :, column].ravel()
    return out


@pytest.mark.parametrize("block_size", BLOCKS)
def test_a_warp_computes_the_natural_hadamard_transform_in_natural_order(
    block_size: int, seed: int
) -> None:
    x = np.random.default_rng(seed).integers(-(2**20), 2**20, 1024)
    expected = (x.reshape(-1, block_size) @ sylvester(block_size)).ravel()
    np.testing.assert_array_equal(warp_transform(x, block_size), expected)


def test_lanes_load_and_store_each_k_once_in_16_byte_pieces() -> None:
    loaded = [planner.lane_chunk_to_k(lane, i) for i in range(4) for lane in range(32)]
    assert sorted(loaded) == list(range(0, 1024, 8))  # 8 values of 16 bits
    stored = []
    for column in range(2):
        for lane in range(32):
            first = planner.lane_result_to_k(lane, column, 0)
            assert planner.lane_result_to_k(lane, column, 1) == first + 8
            stored.append(first)
        lanes = sorted(stored[-32:])  # eight lanes store 128 bytes side by side
        assert [k % 128 for k in lanes] == 4 * list(range(0, 128, 16))
    assert sorted(stored) == list(range(0, 1024, 16))  # 16 codes


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_a_team_has_each_k_of_its_tokens_once(tokens: int) -> None:
    """Four lanes a unit before the transform, eight columns of 16 after it; a unit that stands in
    column u of the product of its warp is that of the lanes 4u to 4u + 3."""
    warps = 3
    threads, k = range(32 * warps), 1024 // tokens * warps
    units = [planner.team_unit(tokens, thread) for thread in threads]
    expected = [(token, first) for token in range(tokens) for first in range(0, k, 128)]
    assert sorted(units) == sorted(4 * expected)
    results = [planner.team_result(tokens, t, column) for t in threads for column in range(2)]
    assert sorted(results) == [(token, n) for token in range(tokens) for n in range(0, k, 16)]
    for thread in threads:
        for column in range(2):
            token, first = planner.team_result(tokens, thread, column)
            unit = planner.lane_result_to_k(thread % 32, column, 0) // 128
            assert (token, first // 128 * 128) == units[thread // 32 * 32 + 4 * unit]


def test_lanes_that_read_shared_memory_together_read_all_of_its_banks() -> None:
    """Eight lanes at a time, 16 bytes each, from 32 banks of 4 bytes; the second chunk of two lies
    where bit 4 of the address of the first differs, the others 128 bytes on."""
    for chunk in range(4):
        places = [2 * planner.lane_chunk_to_k(lane, chunk) for lane in range(32)]
        for first in range(0, 32, 8):
            assert sorted(p % 128 for p in places[first : first + 8]) == list(range(0, 128, 16))
        firsts = [2 * planner.lane_chunk_to_k(lane, 0) for lane in range(32)]
        assert places == [(p ^ 16 * (chunk % 2)) + 128 * (chunk // 2) for p in firsts]


# ---- plans, CPU ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("registers", [64, 72, 80, 96])
@pytest.mark.parametrize("modulated", [False, True])
def test_every_plan_gives_each_token_to_one_team(modulated: bool, registers: int, gpu: str) -> None:
    sms, shared_kb = GPUS[gpu]
    limit = 1024 * shared_kb
    for features in sorted({128, 1024, 1152, 8192, *IN_FEATURES, planner.ROTATE_MAX_FEATURES}):
        for samples, tokens in ((1, 1), (1, 4608), (2, 300), (7, 131), (5000, 1)):
            plan = planner.plan_rotate_rows(
                features, samples, tokens, sms, registers, modulated, limit
            )
            warps = plan.team_threads // 32
            assert plan.team_threads % 32 == 0 and 1024 * (warps - 1) < features <= 1024 * warps
            # A quarter of the warps and of the registers is of one scheduler.
            assert -(-plan.teams * warps // 4) * 32 * registers <= 65536 // 4
            assert plan.teams * plan.team_threads <= 1024 and 1 <= plan.teams <= 15
            vectors = (2 if modulated else 1) * 2 * features
            assert plan.shared_bytes == plan.teams * plan.slots * 64 * 32 * warps + vectors
            # Without room for a modulation the kernel reads its vectors from memory.
            assert plan.fits(limit) or (modulated and features > 12288 and shared_kb < 163)
            assert 1 <= plan.slots <= 2
            block, team = np.arange(plan.blocks_per_sample)[:, None], np.arange(plan.teams)
            first = (block + plan.blocks_per_sample * team).ravel()
            step = plan.blocks_per_sample * plan.teams
            taken = (first[:, None] + step * np.arange(-(-tokens // step))).ravel()
            assert sorted(taken[taken < tokens]) == list(range(tokens))


def test_groups_of_tokens_fill_the_lanes_of_their_warps() -> None:
    """Idle are a twelfth of those that an SM has room for, at most, unless there are few tokens."""
    chosen = {}
    for features in range(128, planner.ROTATE_MAX_FEATURES + 1, 128):
        for tokens in (1, 500, 4096, 33_000):
            for form in ("plain", "modulated", "norm"):
                group = planner.choose_group_tokens(features, 1, tokens, 132, form)
                if group == 0:
                    continue
                warps = planner.group_warps(group, features)
                assert 1 <= warps <= 12 and 1024 * (warps - 1) < features * group <= 1024 * warps
                assert form == "plain" or (form == "modulated" and group == 8 and tokens > 1000)
                if tokens > 528 and form == "plain":
                    assert 36 // warps * group * features * 12 >= 11 * 36 * 1024
                chosen[features, tokens, form] = group
    assert {chosen[k, 500, "plain"] for k in IN_FEATURES if k <= 12288} == {1}
    many = {k: chosen.get((k, 4096, "plain")) for k in IN_FEATURES}
    assert [many[k] for k in (1152, 1536, 3072, 4608, 12288)] == [8, 4, 2, 2, 1]
    assert many[15360] is None and (3072, 4096, "modulated") not in chosen
    with pytest.raises(ValueError, match="form must be 'plain', 'modulated' or 'norm', got 'x'"):
        planner.choose_group_tokens(128, 1, 1, 132, "x")
    with pytest.raises(ValueError, match="group_tokens must be 1, 2, 4 or 8, got 0"):
        planner.group_warps(0, 128)
    with pytest.raises(ValueError, match="tokens must be 1, 2, 4 or 8, got 3"):
        planner.team_unit(3, 0)


def test_one_token_a_sample_has_the_stride_of_the_samples() -> None:
    """As csrc/ops.cpp sees it: [B, 1, K] are B tokens, here further apart than the kernel takes."""
    far = torch.empty(2, 512, 3072, dtype=torch.bfloat16)[:, :1]
    near = torch.empty(2, 40, 3072, dtype=torch.bfloat16)[:, :1]
    assert far.stride(0) > 2**20 and not activation_path._kernel_takes(far, None, None, 128)
    assert activation_path._kernel_takes(near, None, None, 128)
    assert activation_path._kernel_takes(far[:1], None, None, 128)
    assert not activation_path._kernel_takes(near, far, None, 128)


def test_what_the_kernel_takes() -> None:
    def takes(first=3072, second=0, block_size=128, row_stride=3072, addresses=0):
        return planner.supports_rotate_rows(first, second, block_size, row_stride, addresses)

    assert takes() and takes(3072, 12288, row_stride=12288)
    assert all(takes(block_size=size) for size in BLOCKS)
    for block_size in (0, 1, 32, 64, 96, 384, 2048):
        assert not takes(block_size=block_size)
    assert takes(256) and not takes(192) and not takes(200, 56) and not takes(0, 256)
    assert not takes(640, block_size=256) and takes(640, 384, 256)
    assert takes(16384) and not takes(16512) and not takes(3072, 13440)
    assert not takes(addresses=8) and takes(addresses=4096 | 6144)
    assert not takes(row_stride=1 << 21)
    for features in IN_FEATURES:
        assert takes(features, row_stride=features)


def bf16_scale(features: int, device: str = "cuda") -> torch.Tensor:
    """Smoothing with signs."""
    signs = torch.randint(0, 2, (features,), device=device) * 2 - 1
    return ((torch.rand(features, device=device) + 0.5) * signs).bfloat16()


def test_the_kernel_has_no_shorter_list_than_its_op() -> None:
    """reference: norm 'none' with one source is lrq::rotate_quantize."""
    x, channel_scale = torch.randn(5, 384), bf16_scale(384, "cpu")
    for options in ((128, 8, "absmax", 1.0), (128, 4, "rms", 0.35)):
        got = ops._rotate_rows(x, None, None, None, "none", 0.0, channel_scale, *options)
        expected = ops.rotate_quantize(x, channel_scale, None, None, "hadamard", *options)
        assert all(map(torch.equal, got, expected))


# ---- codes, GPU ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case(rotate_cases.Case):
    norm: str = "none"
    eps: float = 1e-6

    @property
    def quantized(self) -> tuple[int, int, str, float]:
        return self.arguments[1:]


MODES = (
    Case(),
    Case(act_bits=4, scale_factor=0.9),  # saturates
    Case(scale_mode="rms", scale_factor=0.0315),
    Case(act_bits=4, scale_mode="rms", scale_factor=0.3545),
)


@dataclass(frozen=True)
class Inputs:
    x: torch.Tensor
    second: torch.Tensor | None
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    channel_scale: torch.Tensor | None

    def run(self, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        return ops._rotate_rows(
            self.x, self.second, self.scale, self.shift, case.norm, case.eps, self.channel_scale,
            *case.quantized,
        )  # fmt: skip

    def rotated(self, case: Case) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is rotated, [x | second] or its norm, rounded as it should be; and the channel scale
        that is not in it."""
        x = self.x if self.second is None else torch.cat([self.x, self.second], -1)
        if case.norm == "none":
            return x, self.channel_scale
        given = [len(v) for v in (self.scale, self.shift) if v is not None]
        by_sample = x.reshape(max([1, *given]), -1, x.shape[-1])
        vectors = (None, None, self.scale, self.shift)
        joins = reference.joins_modulation(x, self.scale, self.shift, self.channel_scale)
        joined, left = (self.channel_scale, None) if joins else (None, self.channel_scale)
        return norm_oracle(by_sample, vectors, case.norm, case.eps, joined).view(x.shape), left


def draw(
    shape: tuple[int, ...],
    case: Case,
    *,
    second: int = 0,
    samples: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    smooth: bool = True,
) -> Inputs:
    """x with a few loud channels and, for a norm, a mean; signs in channel_scale."""

    def rows(features: int) -> torch.Tensor:
        x = torch.randn(*shape[:-1], features, device="cuda")
        x[..., :: max(1, features // 8)] *= 20.0
        return (x + (0.5 if case.norm != "none" else 0.0)).to(dtype)

    features = shape[-1] + second
    scale = shift = None
    if samples:
        scale = torch.randn(samples, features, device="cuda").to(dtype)
        shift = torch.randn(samples, features, device="cuda")
    return Inputs(
        rows(shape[-1]),
        rows(second) if second else None,
        scale,
        shift,
        bf16_scale(features) if smooth else None,
    )


def check(inputs: Inputs, case: Case) -> None:
    """Codes and x_scale of what is rotated, by the rules of rotate_cases."""
    judge = assert_codes_within_tie_budget if case.norm == "none" else assert_codes_of_rounded_norm
    judge(*inputs.run(case), (*inputs.rotated(case), None, None), case)


@pytest.mark.gpu
@pytest.mark.parametrize("features", sorted({128, 256, 384, 1024, 2048, 8192, *IN_FEATURES}))
def test_every_width_and_block(features: int) -> None:
    """What changes with K: warps of a team, teams or tokens of a thread block, idle lanes."""
    check(draw((1061, features), Case()), Case())
    for block_size in BLOCKS:
        if features % block_size == 0:
            check(draw((131, features), case := Case(block_size=block_size)), case)
            case = replace(case, norm="layer")
            check(draw((131, features), case, samples=1), case)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 131, 4608])
@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
def test_every_number_of_tokens(norm: str, tokens: int) -> None:
    """Fewer tokens than multiprocessors, than teams, and many for each team."""
    for features in (1152, 3072, 12288):
        case = Case(norm=norm)
        check(draw((tokens, features), case), case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
def test_every_mode(norm: str, dtype: torch.dtype) -> None:
    for mode in MODES:
        case = replace(mode, norm=norm)
        for smooth in (True, False):
            check(draw((257, 3072), case, dtype=dtype, smooth=smooth), case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [128, 384, 1152, 1536, 1920, 3072, 8960])
def test_groups_of_tokens(features: int, dtype: torch.dtype) -> None:
    """A last one that is not whole, idle units, the border of two sources, samples."""
    for mode in MODES:
        for tokens in (1063, 1064):
            check(draw((tokens, features), mode, dtype=dtype, smooth=tokens % 2 == 0), mode)
        inputs = draw((1063, features - 128), mode, second=128, dtype=dtype)
        if features > 128:
            check(inputs, mode)
        base = torch.randn(3, 400, features + 64, device="cuda").to(dtype)
        inputs = draw((1, features), mode, dtype=dtype)
        check(replace(inputs, x=base[:, 5:, 64:]), mode)
    for norm in ("layer", "rms"):
        for mode in MODES:
            case = replace(mode, norm=norm)
            inputs = draw((1206, features), case, dtype=dtype, samples=3, smooth=norm == "rms")
            check(replace(inputs, shift=inputs.shift.to(dtype)), case)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("samples, tokens", [(1, 300), (2, 150), (3, 100), (300, 1), (7, 4)])
def test_vectors_of_every_sample(samples: int, tokens: int, norm: str) -> None:
    """Of x's dtype and aligned, which teams keep, and any other."""
    case = Case(norm=norm)
    inputs = draw((samples * tokens, 1152), case, samples=samples)
    check(inputs, case)
    check(replace(inputs, shift=None), case)
    check(replace(inputs, scale=None, shift=inputs.shift[:1]), case)
    check(replace(inputs, shift=inputs.shift.bfloat16()), case)
    check(replace(inputs, scale=None, shift=inputs.shift.bfloat16()), case)
    wide = torch.randn(samples, 3 * 1152 + 1, device="cuda")  # chunks of one projection
    check(replace(inputs, scale=wide[:, 1 : 1 + 1152], shift=wide[:, 1153:2305]), case)
    check(replace(inputs, x=inputs.x.view(samples, tokens, 1152)), case)


@pytest.mark.gpu
@pytest.mark.parametrize("samples, tokens", [(1, 1), (3, 5), (2, 1500), (1000, 3)])
@pytest.mark.parametrize("features", [128, 1024, 1152, 3072, 4608, planner.ROTATE_MAX_FEATURES])
def test_thread_blocks_that_keep_the_modulation(features: int, samples: int, tokens: int) -> None:
    """One token of a team and many, more samples than thread blocks fit at once."""
    tokens = min(tokens, max(3, 3_000_000 // (samples * features)))
    for norm in ("layer", "rms"):
        case = Case(norm=norm, block_size=128 if features % 1024 else 1024)
        inputs = draw((samples * tokens, features), case, samples=samples, smooth=norm == "rms")
        inputs = replace(inputs, shift=inputs.shift.bfloat16())
        check(inputs, case)
        apart = torch.randn(samples, 6 * features, device="cuda").bfloat16()  # one projection
        shift, scale = apart[:, features : 2 * features], apart[:, :features]
        check(replace(inputs, shift=shift, scale=scale), case)


@pytest.mark.gpu
@pytest.mark.parametrize("first, second", [(3072, 12288), (128, 128), (1152, 4608), (640, 384)])
def test_two_sources(first: int, second: int) -> None:
    """Of different row strides; the border in a warp, and in a rotation."""
    for block_size in (128, 256):
        if (first + second) % block_size:
            continue
        case = Case(block_size=block_size)
        inputs = draw((133, first), case, second=second)
        check(inputs, case)
        wide = torch.randn(133, second + 64, device="cuda").bfloat16()
        check(replace(inputs, second=wide[:, 64:]), case)
    case = Case(norm="rms")
    check(draw((133, first), case, second=second, samples=1), case)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_row_strides_and_batches(norm: str) -> None:
    """Wide rows, every other row, a batch whose samples are apart, one token a sample, one row."""
    case = Case(norm=norm)
    base = torch.randn(3, 40, 4096, device="cuda").bfloat16()
    views = [base[0, :, :3072], base[0, ::2, 64:3136], base[..., :3072], base[:, 5:, 8:3080]]
    views += [base[:, :1, :3072], base[0, :1, :3072], base[0, :1, :3072].expand(5, -1)]
    views += [base.transpose(0, 1)[..., :3072]]
    for x in views:
        inputs = draw((1, 3072), case, samples=1 if norm != "none" else 0)
        check(replace(inputs, x=x), case)
    if norm != "none":
        inputs = draw((1, 3072), case, samples=3)
        check(replace(inputs, x=base[:, 5:, :3072]), case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
def test_special_rows(norm: str, dtype: torch.dtype) -> None:
    """Zeros, NaN and inf, next to ordinary rows that must not notice."""
    for mode in MODES:
        case = replace(mode, norm=norm)
        inputs = draw((600, 1152), case, dtype=dtype)
        x = inputs.x
        x[1] = 0.0
        x[3, 200] = float("nan")
        x[4, 7] = float("-inf")
        x[5, 1151] = float("inf")
        x[599, 640] = float("nan")
        x_q, x_scale = inputs.run(case)
        assert float(x_scale[1]) == 0.0 and not x_q[1].any()
        bad = torch.tensor([3, 4, 5, 599], device="cuda")
        assert not x_scale[bad].isfinite().any() and not x_q[bad].any()
        good = torch.tensor([i for i in range(600) if i not in (1, 3, 4, 5, 599)], device="cuda")
        alone = replace(inputs, x=x[good]).run(case)
        assert torch.equal(x_q[good], alone[0]) and torch.equal(x_scale[good], alone[1])
        check(replace(inputs, x=x[good]), case)


@pytest.mark.gpu
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e6, 1e30])
def test_scale_of_values_does_not_matter(magnitude: float) -> None:
    case = Case()
    inputs = draw((64, 1152), case)
    check(replace(inputs, x=(inputs.x.float() * magnitude).bfloat16()), case)


@pytest.mark.gpu
@pytest.mark.parametrize("features, tokens", [(3072, 131), (1152, 1100)])
def test_a_mean_ten_times_the_deviation(features: int, tokens: int) -> None:
    """avg x^2 - (avg x)^2 would lose its digits. Such a mean takes three of fp32's: 2 y in 1000
    round to fp16 the other way, in the reference too, and 5 % of the tokens have one of them in the
    block of their largest value."""
    case = Case(norm="layer")
    inputs = draw((tokens, features), case, samples=1, dtype=torch.float16)
    inputs = replace(inputs, x=inputs.x / 4 + 4, shift=inputs.shift.half())
    tensors = (*inputs.rotated(case), None, None)
    assert_codes_of_rounded_norm(*inputs.run(case), tensors, case, moved_scales=0.2)


@pytest.mark.gpu
def test_outputs_are_repeatable_and_as_the_triton_kernel_has_them() -> None:
    from lrq_kernels import rotate_quantize as triton_kernels  # the op would choose CUDA

    for mode in MODES:
        inputs = draw((1024, 3072), mode)
        first = inputs.run(mode)
        assert all(map(torch.equal, first, inputs.run(mode)))
        plain = (inputs.x, inputs.channel_scale, None, None, "hadamard", *mode.quantized)
        x_q, x_scale = triton_kernels.rotate_quantize(*plain)
        torch.testing.assert_close(first[1], x_scale, rtol=rotate_cases.SCALE_ERROR, atol=0.0)
        differing = int((first[0] != x_q).sum())
        assert differing <= 2 * rotate_cases.TIE_RATE * x_q.numel()


@pytest.mark.gpu
def test_what_the_kernel_does_not_take_is_an_error() -> None:
    case = Case()
    inputs = draw((5, 1152), case)
    wide = torch.zeros(5, 1160, device="cuda", dtype=torch.bfloat16)
    for x in (wide[:, 4:1156], torch.zeros(5, 1156, device="cuda").bfloat16()[:, :1152]):
        with pytest.raises(ValueError, match="the problem must be one that .*supports_rotate_rows"):
            replace(inputs, x=x).run(case)
    shifted = torch.ones(1153, device="cuda").bfloat16()[1:]
    with pytest.raises(ValueError, match="the problem must be one that .*supports_rotate_rows"):
        replace(inputs, channel_scale=shifted).run(case)
    for bad in (Case(block_size=64), Case(block_size=32)):
        with pytest.raises(ValueError, match="the problem must be one that .*supports_rotate_rows"):
            inputs.run(bad)
    with pytest.raises(ValueError, match="channel_scale must be torch.bfloat16"):
        replace(inputs, channel_scale=torch.ones(1152, device="cuda")).run(case)
    with pytest.raises(ValueError, match="dtype of x on CUDA must be one of"):
        replace(inputs, x=inputs.x.float()).run(case)
    uneven = torch.zeros(2, 6, 1152, device="cuda").bfloat16()[:, :4]
    scale = torch.zeros(4, 1152, device="cuda")
    with pytest.raises(ValueError, match="x must be evenly spaced"):
        replace(inputs, x=uneven, scale=scale).run(Case(norm="layer"))
