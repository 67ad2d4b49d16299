"""`lrq profile`: kernels to families, events to a table, and the command on tiny models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import BF16, shared_folder, tiny_pixart

from lrq_quant import fuse_blocks, model_source, profiling
from lrq_quant.__main__ import main
from lrq_quant.kernel_families import (
    ATTENTION,
    COPY,
    ELEMENTWISE,
    EXCHANGE,
    FAMILIES,
    GEMM,
    LAUNCH_GAPS,
    OTHER,
    OTHER_GEMM,
    OUR_A16,
    OUR_A16_AND_OTHER,
    OUR_GEMM,
    OUR_QK,
    OUR_QUANTIZATION,
    QUANTIZATION,
    counted_work,
    family_of_kernel,
    our_work,
)
from lrq_quant.machine_limits import Limits
from lrq_quant.model_shapes import named_inputs
from lrq_quant.op_work import Work, count_work
from lrq_quant.pipeline_io import load_transformer
from lrq_quant.profiled_model import ProfileOptions, profile_model
from lrq_quant.profiling import Event

# From profiles on an H100 with torch 2.11; the longest were cut there; G: gemm, and so on.
RECORDED = """\
G void lrq::gemm_sm90_kernel<4, 256, 2, 4>(CUtensorMap_st, CUtensorMap_st, CUtensorMap_st,
G void lrq::(anonymous namespace)::gemv_kernel<lrq::(anonymous namespace)::Gemv<4, 1, 2> >
G nvjet_sm90_qqtst_128x128_128x6_1x2_h_bz_ovscale_bias_TNT
G nvjet_sm90_tst_64x8_64x16_4x1_v_bz_splitK_bias_TNT
Q void lrq::rotate_rows_kernel<__nv_bfloat16, (lrq::RotateForm)1, true>(lrq::RotateRowsArg
Q void lrq::rotate_groups_kernel<__nv_bfloat16, (lrq::RotateForm)0, true, 8>(lrq::RotateRowsArgs)
Q triton_red_fused_abs_amax_cat_gelu_permute_view_3
Q triton_poi_fused__scaled_mm__to_copy_cat_clamp_div_gelu_permute_t_unsqueeze_view_5
Q triton_red_fused__scaled_mm__to_copy_abs_add_amax_cat_clamp_div_mul_native_layer_norm_sp
E qk_norm_rope_kernel
E triton_red_fused__fused_rms_norm__scaled_dot_product_cudnn_attention__to_copy_add_mul_ne
E triton_poi_fused_gemm_a16_silu_view_0
E triton_poi_fused__fused_rms_norm_cat_split_view_6
E void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::nativ
E void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl(at::Ten
E void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, floa
A cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_cga1
C void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<at::native::(anon
C void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::Ten
C Memset (Device)
X c10d::symmetric_memory::barrier_kernel(unsigned int**, int, int, int, unsigned long)
X write_tokens_kernel
"""
# Of other packages on Hopper, as profiles that others published and their sources have them:
# cuBLAS and cuDNN, CUTLASS, torch, inductor, torchao, bitsandbytes, SDNQ.
OF_PEERS = """\
G nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN
G nvjet_sm90_tst_192x192_64x3_2x1_v_bz_coopB_NTN
G sm90_xmma_gemm_i8i32_i8i32_i32_tn_n_tilesize256x128x128_warpgroupsize2x1x1_execute_segment_k_off
G void cutlass::Kernel2<cutlass_80_tensorop_i16832gemm_s8_256x128_64x3_tn_align16>(cutlass_80_
G cutlass_80_wmma_tensorop_i161616gemm_s8_forwardCompat_128x128_32x2_nn_align4
G cutlass3x_sm90_tensorop_s64x128x32gemm_e4m3_e4m3_f32_bf16_bf16_64x128x128_2x1x1_0_tnt_align16
G void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>
G void gemvx::kernel<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, false
G sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64
G void implicit_convolve_sgemm<__half, __half, 1024, 5, 5, 3, 3, 3, 1, false, false, true>
C void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true
C void cudnn::engines_precompiled::nhwcToNchwKernel<float, __nv_bfloat16, float
G triton_tem_fused__int_mm__to_copy_add_clamp_div_elu_mul_round
G triton_tem_fused__scaled_mm_t_3
G triton_tem_fused_addmm_gelu_view_5
G triton_tem_fused_convolution_1
Q triton_red_fused__to_copy_abs_amax_clamp_clamp_min_div_round_1
Q triton_red_fused__scaled_mm__to_copy_abs_amax_clamp_mul_reciprocal_0
Q triton_per_fused__to_copy_abs_amax_clamp_div_mul_silu_split_unsqueeze_view_4
Q triton_unk_fused__to_copy_abs_amax_clamp_div_0
E triton_poi_fused__int_mm__to_copy_add_mul_view_9
E triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_2
E triton_poi_fused_addmm_gelu_view_1
E triton_for_fused_add_0
G _kernel_matmul_fp8_row_tma_persistent
Q _kernel_quantize_fp8_row
G void gemm_4bit_sm80_m16n8k16<__nv_bfloat16, 128, 128, 64>(__nv_bfloat16 const*, unsigned char
G void gemm_4bit_simt<__nv_bfloat16, 1>(__nv_bfloat16 const*, unsigned char const*
Q void kQuantizeBlockwise<__nv_bfloat16, 64, 2, 0, 2>(float*, __nv_bfloat16*
A sdnq_attn_kernel
A void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::Collecti
A void cutlass::device_kernel<flash::FlashAttnFwdCombine<
A void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4, false, false
C void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda(at::Ten
C void at::native::vectorized_elementwise_kernel<4, at::native::float8_copy_kernel_cuda(at::Tensor
C Memcpy HtoD (Pageable -> Device)
E void at::native::vectorized_elementwise_kernel<8, at::native::(anonymous namespace)::launch_clamp
E void at::native::(anonymous namespace)::softmax_warp_forward<float, __nv_bfloat16, float, 8
"""
# As the sources of torch, inductor, bitsandbytes and of lrq have them.
FROM_SOURCES = """\
C Memcpy DtoD (Device -> Device)
G void lrq::gemm_sm80_kernel<4, 3>(lrq::GemmArgs)
G void lrq::gemm_a16_sm90_kernel<4, __nv_bfloat16, 128>(CUtensorMap_st, lrq::A16Args)
G sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute
G void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel
G void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16
G triton_tem_fused_mm_t_7
G void kgemm_4bit_inference_naive<__nv_bfloat16, 128, 16>(int, int, int, __nv_bfloat16*
G sdnq_triton_mm_kernel
G sdnq_scaled_mm_kernel
G scaled_matmul_kernel_with_block_pointers
Q _fp8_blockwise_act_quant_kernel
Q _fp8_blockwise_weight_dequant_kernel
G aten::linear
G lrq::gemm
Q lrq::dequantize_kernel(lrq::DequantizeArgs)
Q row_kernel
Q norm_kernel
Q activation_kernel
Q block_dense_kernel
Q dual_kernel
Q void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*, float*
Q lrq::norm_modulate_rotate_quantize
A void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 32,
A fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel
A triton_tem_fused_flex_attention_2
A aten::scaled_dot_product_attention
E void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps
E lrq::qk_norm_rope
E lrq::qk_norm_rope_parts
X ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)
X _c10d_functional::all_to_all_single
E aten::add_
O aten::view
O some_kernel_of_another_library
"""
_FAMILY = {"G": GEMM, "A": ATTENTION, "Q": QUANTIZATION, "E": ELEMENTWISE}
_FAMILY |= {"C": COPY, "X": EXCHANGE, "O": OTHER}
_LINES = (RECORDED + OF_PEERS + FROM_SOURCES).splitlines()
KERNELS = {line[2:]: _FAMILY[line[0]] for line in _LINES}


@pytest.mark.parametrize("name", KERNELS)
def test_family_of_a_kernel(name: str):
    assert family_of_kernel(name) == KERNELS[name]


def test_kernels_whose_work_is_counted_are_ours_alone():
    kinds = {our_work(name) for name in KERNELS}
    assert kinds == {None, OUR_GEMM, OUR_A16, OUR_QUANTIZATION, OUR_QK}
    assert our_work("void lrq::gemm_a16_sm90_kernel<4, __half, 64>(CUtensorMap_st)") == OUR_A16
    for name in (
        "nvjet_sm90_tst_64x8",
        "layer_norm_kernel",
        "triton_poi_fused_gemm_a16_silu_view_0",
    ):
        assert our_work(name) is None


def test_kernels_of_others_count_by_family():
    assert counted_work("void lrq::gemm_sm90_kernel<4, 256, 2, 4>(CUtensorMap_st)") == OUR_GEMM
    assert counted_work("lrq::dequantize_kernel(lrq::DequantizeArgs)") is None
    assert counted_work("lrq::gemm") is None  # an operator on a CPU
    assert counted_work("nvjet_sm90_tst_64x8_64x16_4x1_v_bz_bias_TNT") == OTHER_GEMM
    assert counted_work("cudnn_generated_fort_native_sdpa_sm90_flash_fprop") == ATTENTION
    assert counted_work("vectorized_layer_norm_kernel") is None


# ---- from events to a table ---------------------------------------------------------------------

GEMM_NAME = "void lrq::gemm_sm90_kernel<4, 256, 2, 4>(CUtensorMap_st)"
EVENTS = [
    Event(GEMM_NAME, 100.0, 40.0),
    Event("Memset (Device)", 130.0, 30.0),  # 10 of them beside the gemm
    Event(GEMM_NAME, 200.0, 60.0),
    Event("row_kernel", 210.0, 20.0),  # within it
]


def test_busy_time_is_a_union():
    assert profiling.busy_us(EVENTS) == 60 + 60
    assert profiling.busy_us([]) == 0


def test_families_are_per_forward_and_end_with_the_gaps():
    kernels = profiling.kernels_of(EVENTS, forwards=2)
    assert (kernels[0].name, kernels[0].ms, kernels[0].launches) == (GEMM_NAME, 0.05, 1)
    rows = profiling.families_of(kernels, wall_ms=0.1, gaps_ms=0.02)
    assert [row.name for row in rows] == [GEMM, QUANTIZATION, COPY, LAUNCH_GAPS]
    assert rows[0].share == pytest.approx(0.5) and rows[-1].ms == 0.02


def test_what_is_reached_of_the_limits():
    kernels = profiling.kernels_of(EVENTS, forwards=2)
    work = {OUR_GEMM: Work(1, int(50e9), int(50e6)), OUR_QUANTIZATION: Work(1, 0, int(20e6))}
    gemm, rotate = profiling.reached_of(kernels, work, Limits(4000.0, 2000.0, None))
    assert (gemm.tops, gemm.tops_share) == (pytest.approx(1000.0), pytest.approx(0.5))
    assert (gemm.tbps, gemm.tbps_share) == (pytest.approx(1.0), pytest.approx(0.25))
    assert rotate.tops is None and rotate.tbps == pytest.approx(2.0)
    (gemm, rotate) = profiling.reached_of(kernels, {}, profiling.UNKNOWN)
    assert gemm.tops is None and rotate.tbps is None


def test_a16_products_by_torch_are_held_to_the_time_of_torchs_kernels():
    """What gemm_a16 multiplies by torch is no work of gemv, whose share would pass the limit."""
    decode = "void lrq::dequantize_kernel<4, __nv_bfloat16>(lrq::DequantizeArgs)"
    events = [Event("nvjet_tst", 0, 900), Event("void lrq::gemv_kernel<1>()", 900, 100)]
    work = {OUR_A16: Work(3, int(400e6), int(2e6)), OTHER_GEMM: Work(1, int(100e6), int(1e6))}
    limits = Limits(10.0, 2.0, 1.0)
    apart = profiling.reached_of(profiling.kernels_of(events, 1), work, limits)
    assert [reached.kind for reached in apart] == [OTHER_GEMM, OUR_A16]
    kernels = profiling.kernels_of([*events, Event(decode, 1000, 50)], 1)
    (reached,) = profiling.reached_of(kernels, work, limits)
    assert (reached.kind, reached.ms, reached.launches) == (OUR_A16_AND_OTHER, 1.0, 2)
    assert reached.tops_share == pytest.approx(0.5) and reached.tbps_share == pytest.approx(0.3)
    unknown = {kind: Work(w.calls, w.operations) for kind, w in work.items()}
    (reached,) = profiling.reached_of(kernels, unknown, limits)
    assert reached.tops == pytest.approx(0.5) and reached.tbps is None


def test_gpu_events_of_a_trace():
    def event(category: str, **changes: object) -> dict:
        return {"ph": "X", "cat": category, "name": "n", "ts": 1, "dur": 2, **changes}

    trace = [
        event("gpu_memcpy", ts="3.5"),
        event("kernel"),
        event("gpu_user_annotation"),
        event("cuda_runtime"),
        {"ph": "M", "name": "process_name"},
    ]
    assert profiling.gpu_events(trace) == [Event("n", 1.0, 2.0), Event("n", 3.5, 2.0)]


def test_a_kernel_that_waits_for_the_one_before_counts_from_its_end():
    def event(name: str, start: float, duration: float, stream: int = 7) -> dict:
        where = {"device": 0, "stream": stream}
        return {
            "ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": duration, "args": where
        }  # fmt: skip

    trace = [event("a", 0, 100), event("b", 60, 70), event("c", 90, 20), event("d", 128, 12)]
    got = profiling.gpu_events([*trace, event("beside", 10, 100, stream=8)])
    assert {e.name: e.duration for e in got} == {"a": 100, "b": 30, "c": 0, "d": 10, "beside": 100}
    in_order = profiling.gpu_events(trace)
    assert sum(e.duration for e in in_order) == profiling.busy_us(in_order) == 140


def test_counted_work():
    model = load_transformer(shared_folder("pixart"))
    inputs = named_inputs("tiny-pixart", size=64, device="cpu")
    eager = count_work(model, inputs)
    # One token: of two blocks qkv, out, q, out and the feed-forward, of 300 for the caption's k, v.
    of_a_block = 128 * (3 + 1 + 1 + 1 + 4 + 4) * 128 + 300 * 2 * 128 * 128
    assert eager[OUR_GEMM].operations == 2 * 2 * of_a_block
    assert eager[OUR_GEMM].calls == 2 * 7 and eager[OUR_A16].operations == 2 * 6 * 128 * 128
    codes = 128 * (1 + 1 + 1 + 1 + 1 + 4) + 300 * 128
    scales = 4 * (6 + 300)
    assert eager[OUR_QUANTIZATION].bytes > 2 * (3 * codes + scales)
    # Two products of 128 channels for each key: of itself and of the caption.
    assert eager[ATTENTION].operations == 2 * 2 * 2 * 128 * (1 + 300)
    assert eager[ATTENTION].calls == 4 and eager[OTHER_GEMM].operations > 0
    fused = count_work(fuse_blocks(model), inputs)
    assert fused[OUR_GEMM].operations == eager[OUR_GEMM].operations
    assert fused[OUR_GEMM].bytes > eager[OUR_GEMM].bytes  # residuals and gates


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(profiling, "WARMUP_S", 0.0)


SMALL = ["--size", "64", "--steps", "1", "--device", "cpu"]


@pytest.mark.parametrize("mode", ["loaded", "eager"])
def test_profile_of_a_published_shape(mode: str, tmp_path: Path, capsys):
    files = {name: tmp_path / name for name in ("out.json", "trace.json")}
    outputs = ["--json", str(files["out.json"]), "--trace", str(files["trace.json"])]
    assert main(["profile", "tiny-flux", "--mode", mode, *SMALL, *outputs]) == 0
    text = capsys.readouterr().out
    assert "CPU times" in text and "attention" in text and "packed weights" in text
    got = json.loads(files["out.json"].read_text())
    assert {family["name"] for family in got["families"]} <= {*FAMILIES, LAUNCH_GAPS}
    shares = [family["share"] for family in got["families"]]
    assert sum(shares) == pytest.approx(1.0, abs=1e-6) and min(shares) >= 0
    assert got["facts"]["scheme"] == "w4a8" and got["facts"]["mode"] == mode
    assert ("fused_blocks" in got["facts"]) == (mode == "eager")
    assert any(k["name"] == "lrq::gemm" and k["family"] == GEMM for k in got["kernels"])
    assert json.loads(files["trace.json"].read_text())["traceEvents"]


def test_profile_of_folders(tmp_path: Path, capsys):
    quantized = shared_folder("pixart")
    assert main(["profile", str(quantized), *SMALL]) == 0
    assert "scheme w4a8" in capsys.readouterr().out
    tiny_pixart().to(BF16).save_pretrained(tmp_path / "dense")
    for scheme, held in (([], "bf16"), (["--scheme", "w3a8"], "w3a8")):
        assert main(["profile", str(tmp_path / "dense"), *SMALL, *scheme]) == 0
        out = capsys.readouterr().out
        assert f"scheme {held}" in out and ("packed weights" in out) == (held != "bf16")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing-here"], "must be a folder or one of"),
        (["tiny-flux", "--mode", "fast"], "mode must be one of"),
        (["tiny-flux", "--mode", "graph"], "mode graph needs a CUDA device, got cpu"),
        (["tiny-flux", "--mode", "fused"], "mode must be one of"),
        (["tiny-flux", "--scheme", "w5a8"], "weight_bits must be one of"),
        (["tiny-flux", "--size", "65"], "size must be a multiple of 16 pixels, got 65"),
        (["tiny-flux", "--steps", "0"], "steps must be positive, got 0"),
        (["{tmp}"], "no config.json"),
        (["{tmp}/quantized", "--scheme", "w3a8"], "is quantized to w4a8; --scheme w3a8 is another"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, tmp_path: Path, capsys):
    if arguments[0] == "{tmp}/quantized":
        (tmp_path / "quantized").symlink_to(shared_folder("pixart"))
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert main(["profile", *SMALL, *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lrq profile: error: ") and message in error


@pytest.mark.parametrize("model", ["tiny-flux", "dense", "quantized"])
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size", "65"], "size must be a multiple of"),
        (["--batch", "0"], "batch must be positive, got 0"),
        (["--steps", "0"], "steps must be positive, got 0"),
        (["--json", "taken/p.json"], "--json must be a file that can be written, got taken/p.json"),
        (["--trace", "taken/t.json"], "--trace must be a file that can be written, got taken/t"),
        (["--plot", "."], "--plot must be a file, got the folder ."),
    ],
)
def test_arguments_are_checked_before_a_model_is_made(
    model: str, arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    if model == "dense":
        tiny_pixart().to(BF16).save_pretrained("dense")
    if model == "quantized":
        Path("quantized").symlink_to(shared_folder("pixart"))
    for name in ("make_model", "load_transformer"):
        monkeypatch.setattr(model_source, name, lambda *_, **__: pytest.fail("made"))
    assert main(["profile", model, *SMALL, *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "size must be a multiple of 16 pixels, got 65"),  # the default patch_size is 2
        ({"_class_name": "Nothing"}, "no inputs are known for Nothing"),
    ],
)
def test_what_config_json_does_not_say(changes: dict, message: str, tmp_path: Path):
    tiny_pixart().to(BF16).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("patch_size") == 8
    file.write_text(json.dumps({**config, **changes}))
    options = ProfileOptions(str(tmp_path), size=65, device="cpu")
    with pytest.raises(ValueError, match=message):
        profile_model(options)


def test_folders_of_outputs_are_made(tmp_path: Path):
    file = tmp_path / "new" / "profile.json"
    assert main(["profile", "tiny-pixart", *SMALL, "--json", str(file)]) == 0
    assert json.loads(file.read_text())["families"]


def test_plot(tmp_path: Path, monkeypatch, capsys):
    profile = profile_model(ProfileOptions("tiny-pixart", size=64, steps=1, device="cpu"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        profiling.plot([profile], tmp_path / "bar.png")
        assert "matplotlib is not installed" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    profiling.plot([profile, profile], tmp_path / "bar.png")
    assert (tmp_path / "bar.png").stat().st_size > 8_000


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "loaded", "compiled", "graph"])
def test_profile_on_a_gpu(mode: str, tmp_path: Path):
    """Kernels are seen in every mode, inside a graph too, and every one of ours is known."""
    options = ProfileOptions(
        "tiny-flux", size=256, mode=mode, limits=Limits(3e3, 1e3, 5e2), trace=tmp_path / "t.json"
    )
    profile = profile_model(options)
    assert 0 < profile.busy_ms <= profile.wall_ms
    kinds = {reached.kind: reached for reached in profile.reached}
    assert kinds[OUR_GEMM].tops is not None and 0 < kinds[OUR_GEMM].tops < 2000
    assert OUR_QUANTIZATION in kinds and kinds[OUR_GEMM].launches >= 20
    names = [k.name for k in profile.kernels if "lrq" in k.name and "triton" not in k.name]
    assert names and all(family_of_kernel(name) != OTHER for name in names)
    assert profile.memory_gb["activations, peak"] > 0
    torch.cuda.synchronize()
