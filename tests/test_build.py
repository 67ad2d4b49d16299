"""What the build leaves: kernels without spills, a library for any torch, honest refusals."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "lrq_kernels" / "liblrq_cuda.so"
CUDA_SOURCES = sorted(path.relative_to(ROOT) for path in ROOT.glob("csrc/**/*.cu"))
# From csrc/ops.cpp; rotate, rotate_quantize and its fused forms are registered by lrq_kernels.
CUDA_OPS = (
    *("prepack", "unprepack", "dequantize", "gemm", "gemm_config", "gemv", "gemm_a16"),
    "_rotate_rows",
)

needs_library = pytest.mark.skipif(
    not LIBRARY.exists(), reason=f"{LIBRARY.name} is not built here (no nvcc, or LRQ_BUILD_CUDA=0)"
)


@pytest.fixture(scope="module")
def setup_py() -> types.ModuleType:
    """setup.py as a module: its functions, without running a build."""
    spec = importlib.util.spec_from_file_location("lrq_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small_project(tmp_path: Path) -> Path:
    """The real setup.py over a planner of one line and no kernels: builds in under a second."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "planner.cpp").write_text('extern "C" int planner() { return 0; }\n')
    (tmp_path / "csrc" / "ops.cpp").write_text("#error compiled without being asked to\n")
    (tmp_path / "lrq_kernels").mkdir()
    return tmp_path


def build(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LRQ_")}
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=project,
        env=clean | environment,
        capture_output=True,
        text=True,
    )


def built_files(project: Path) -> list[str]:
    return sorted(path.name.split(".")[0] for path in project.glob("lrq_kernels/*.so"))


# ---- the compiled kernels ----------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=str)
def test_kernels_compile_without_spills_or_serialization(setup_py, source: Path):
    """Read from nvcc's log of this build, every architecture of it."""
    log = ROOT / setup_py.BUILD / f"{source}.o.log"
    if not log.exists():
        pytest.skip(f"the library was not built in {setup_py.BUILD}")
    text = log.read_text()
    spills = [line for line in text.splitlines() if re.search(r"\b[1-9]\d* bytes spill", line)]
    assert spills == []
    # wgmma that ptxas cannot keep in flight runs one at a time: correct, and far too slow.
    assert "Potential Performance Loss" not in text


def find_cuobjdump() -> str:
    triton = importlib.util.find_spec("triton")
    bundled = [str(Path(triton.origin).parent / "backends/nvidia/bin")] if triton else []
    cuobjdump = shutil.which("cuobjdump", path=os.pathsep.join([*bundled, os.environ["PATH"]]))
    if cuobjdump is None:
        pytest.skip("no cuobjdump, neither in triton nor on PATH")
    return cuobjdump


def disassemble(file: Path) -> dict[str, list[tuple[int, str]]]:
    """(address, instruction) of every kernel in a file."""
    done = subprocess.run([find_cuobjdump(), "-sass", file], capture_output=True, text=True)
    kernels: dict[str, list[tuple[int, str]]] = {}
    for line in done.stdout.splitlines():
        if named := re.search(r"Function : (\S+)", line):
            code = kernels.setdefault(named[1], [])
        elif instruction := re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", line):
            code.append((int(instruction[1], 16), instruction[2]))
    return kernels


def main_loop(code: list[tuple[int, str]], products: int) -> list[str]:
    """The shortest loop around so many wgmma."""
    loops = []
    for address, instruction in code:
        target = re.search(r"BRA.*?0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) < address:
            body = [text for at, text in code if int(target[1], 16) <= at <= address]
            if sum("IGMMA" in text for text in body) == products:
                loops.append(body)
    return min(loops, key=len)


@needs_library
@pytest.mark.parametrize("bits", (4, 3, 2))
def test_main_loop_of_the_hopper_gemm(setup_py, bits: int):
    """What the pipeline lives by: wgmma in flight while codes are decoded, and nothing else."""
    planner = pytest.importorskip("lrq_kernels._planner")
    built = ROOT / setup_py.BUILD / f"csrc/gemm/gemm_sm90_w{bits}.cu.o"
    if "90a" not in planner.cuda_archs() or not built.exists():
        pytest.skip("no code for sm_90a was built here")
    kernels = disassemble(built)
    tiles = {(c.tile_m, c.tile_n) for c in planner.gemm_configs() if c.arch == 90}
    assert len(kernels) == len(tiles)
    # A lane decodes 64 weights a step, four a lookup; LOP3 is for selectors and signs.
    decode = {4: (32, 40), 3: (16, 20), 2: (16, 16)}[bits]
    for name, code in kernels.items():
        tile, consumers = map(int, re.search(r"ILi\dELi(\d+)ELi(\d)", name).groups())
        # Two operands take turns in a loop of two steps; a single one is refilled slice by slice.
        steps, waits = (2, 1) if consumers == 2 else (1, 4)
        body = main_loop(code, 4 * steps)

        def count(pattern: str, texts: list[str] = body) -> int:
            return sum(bool(re.search(pattern, text)) for text in texts)

        assert count(rf"IGMMA\.64x{tile}x32\.S8\.S8") == 4 * steps, name
        # One product stays in flight of two operands, two slices' products of a single one.
        assert count(f"WARPGROUP.DEPBAR.LE gsb0, 0x{consumers - 1}") == waits * steps, name
        assert count("MEMBAR|ERRBAR|LDL|STL") == 0, name
        assert count(r"LDS\.128") == {4: 2, 3: 1, 2: 1}[bits] * steps, name
        assert decode[0] * steps <= count("PRMT") <= decode[0] * steps + 4, name
        assert count("LOP3") <= decode[1] * steps + 4, name
        # Two A buffers: what one step multiplies, the step before does not.
        operands = [re.search(r"IGMMA\S+ R\d+, (R\d+)", text) for text in body]
        registers = [match[1] for match in operands if match]
        assert len(set(registers)) == 4 * steps, name


@needs_library
def test_every_promised_architecture_is_in_the_library():
    planner = pytest.importorskip("lrq_kernels._planner")
    cuobjdump = find_cuobjdump()
    listed = subprocess.run([cuobjdump, "--list-elf", LIBRARY], capture_output=True, text=True)
    assert planner.cuda_archs() != []
    # By number alone: older cuobjdump lists sm_90a as sm_90.
    promised = {arch.rstrip("af") for arch in planner.cuda_archs()}
    assert set(re.findall(r"sm_(\d+)[af]?\.", listed.stdout)) == promised


# ---- the library as a file ----------------------------------------------------------------------


@needs_library
def test_library_needs_the_stable_abi_and_the_c_runtime_only():
    """A symbol of Python, ATen, c10 or libcudart would tie the file to one version of each."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    listed = subprocess.run(
        [nm, "-D", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True
    )
    foreign = []
    for line in listed.stdout.splitlines():
        kind, symbol = line.split()[:2]
        of_c_runtime = re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", symbol)
        of_stable_abi = re.match(r"(aoti_torch_|torch_)", symbol)
        if kind not in "wv" and not of_c_runtime and not of_stable_abi:
            foreign.append(symbol)
    assert foreign == []


@needs_library
def test_library_shows_no_symbol_of_its_own():
    """Static cudart inside: another library's copy must not be bound to this one."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    listed = subprocess.run(
        [nm, "-D", "--defined-only", LIBRARY], capture_output=True, text=True, check=True
    )
    # Weak ones are templates of the C++ runtime, which any library may define; the linker's own
    # marks are in every library.
    symbols = [line.split()[-2:] for line in listed.stdout.splitlines()]
    marks = {"_edata", "_end", "__bss_start", "_init", "_fini"}
    assert [name for kind, name in symbols if kind not in "VWu" and name not in marks] == []


@needs_library
def test_library_registers_its_kernels_under_this_torch():
    """Also under a CPU build of torch: the kernels are registered, only a GPU is missing."""
    import lrq_kernels

    assert "loaded" in lrq_kernels.cuda_library_status()
    for op in CUDA_OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lrq::{op}", "CUDA"), op


# ---- the planner's types ------------------------------------------------------------------------


def test_planner_stub_names_what_the_module_has():
    """mypy believes the stub: a name of one side only would be an error found by nobody."""
    planner = pytest.importorskip("lrq_kernels._planner")
    stub = ast.parse((ROOT / "lrq_kernels" / "_planner.pyi").read_text())

    def stub_names(body: list[ast.stmt]) -> set[str]:
        assigned = {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
        return assigned | {n.name for n in body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}

    def public_names(module: object) -> set[str]:
        return {name for name in dir(module) if not name.startswith("_")}

    classes = [node for node in stub.body if isinstance(node, ast.ClassDef)]
    assert stub_names(stub.body) == public_names(planner)
    assert classes != []
    for node in classes:
        assert stub_names(node.body) == public_names(getattr(planner, node.name))


# ---- the choices of setup.py --------------------------------------------------------------------


def test_without_nvcc_the_rest_is_built_and_it_says_so(small_project: Path):
    stale = small_project / "lrq_kernels" / "liblrq_cuda.so"
    stale.write_text("of an earlier build")
    done = build(small_project, CUDA_HOME="/nonexistent")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "lrq_kernels/liblrq_cuda.so not built: there is no nvcc in /nonexistent/bin" in done.stdout
    )
    assert built_files(small_project) == ["_planner"]


def test_switched_off_it_compiles_nothing_for_cuda(small_project: Path):
    done = build(small_project, LRQ_BUILD_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "liblrq_cuda.so not built: LRQ_BUILD_CUDA=0" in done.stdout
    assert built_files(small_project) == ["_planner"]


def test_the_library_is_there_where_it_can_be_built(setup_py):
    """Else a failing search for nvcc would pass as a machine that has none."""
    if os.environ.get("LRQ_BUILD_CUDA") == "0":
        pytest.skip("LRQ_BUILD_CUDA=0")
    if isinstance(toolchain := setup_py.cuda_toolchain(), str):
        pytest.skip(toolchain)
    assert LIBRARY.exists(), f"{toolchain[0]} is here and {LIBRARY.name} is not: run make build"


def test_asked_for_and_impossible_is_an_error(small_project: Path):
    done = build(small_project, LRQ_BUILD_CUDA="1", CUDA_HOME="/nonexistent")
    assert done.returncode != 0
    assert "LRQ_BUILD_CUDA=1, but" in done.stderr and "no nvcc in /nonexistent/bin" in done.stderr
    assert built_files(small_project) == []


def test_an_unknown_choice_is_an_error(small_project: Path):
    done = build(small_project, LRQ_BUILD_CUDA="yes")
    assert done.returncode != 0
    assert "LRQ_BUILD_CUDA must be auto, 0 or 1, got 'yes'" in done.stderr


def test_without_a_compiler_the_package_still_installs(small_project: Path):
    done = build(small_project, CXX="/nonexistent/g++", PATH="/nonexistent")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a C++ compiler or" in done.stdout and "is missing" in done.stdout
    assert built_files(small_project) == []


def test_only_what_changed_is_compiled_again(small_project: Path):
    environment = {"LRQ_BUILD_CUDA": "0"}
    assert "c++ csrc/planner.cpp" in build(small_project, **environment).stdout
    assert "c++ csrc/planner.cpp" not in build(small_project, **environment).stdout
    (small_project / "csrc" / "part.h").write_text("#pragma once\n")
    (small_project / "csrc" / "planner.cpp").write_text(
        '#include "part.h"\nint planner() {return 0;}'
    )
    assert "c++ csrc/planner.cpp" in build(small_project, **environment).stdout
    (small_project / "csrc" / "part.h").write_text("#pragma once\nstatic int changed;\n")
    assert "c++ csrc/planner.cpp" in build(small_project, **environment).stdout


@pytest.fixture
def old_nvcc(tmp_path: Path) -> str:
    """An nvcc of before sm_100 and sm_120."""
    script = tmp_path / "nvcc"
    script.write_text(
        "#!/bin/sh\n"
        "[ $1 = --version ] && echo 'Cuda compilation tools, release 12.4, V12.4.131' && exit\n"
        "printf 'sm_80\\nsm_86\\nsm_89\\nsm_90\\n'\n"
    )
    script.chmod(0o755)
    return str(script)


def test_default_architectures_are_those_that_nvcc_knows(setup_py, old_nvcc):
    assert setup_py.cuda_archs(old_nvcc, None) == ["80", "89", "90a"]


def test_an_nvcc_too_old_for_the_sources_is_named(setup_py, old_nvcc, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(old_nvcc)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_py.nvcc_release(old_nvcc) == (12, 4)
    assert "nvcc is of CUDA 12.4, expected 12.5 or newer" in setup_py.cuda_toolchain()


def test_named_architectures_are_taken_in_any_spelling_of_a_list(setup_py, old_nvcc):
    assert setup_py.cuda_archs(old_nvcc, "90a") == ["90a"]
    assert setup_py.cuda_archs(old_nvcc, "80; 90a, 86") == ["80", "90a", "86"]


@pytest.mark.parametrize("bad", ["120", "sm_90", "90x", "9.0"])
def test_a_named_architecture_that_nvcc_lacks_is_an_error(setup_py, old_nvcc, bad):
    with pytest.raises(
        setup_py.SetupError, match=f"does not know {re.escape(bad)}; expected a list"
    ):
        setup_py.cuda_archs(old_nvcc, f"80;{bad}")


def test_ptx_comes_from_the_lowest_architecture_that_others_can_run(setup_py):
    flags = setup_py.gencode(["120", "90a", "80"])
    assert flags.endswith("-gencode arch=compute_80,code=compute_80")
    assert flags.count("-gencode") == 4
    # PTX of 90a runs on no other GPU.
    assert setup_py.gencode(["90a"]) == "-gencode arch=compute_90a,code=sm_90a"


def test_hopper_sources_are_compiled_for_sm_90a_alone(setup_py):
    assert setup_py.sm90_archs(["80", "90a", "120"]) == ["90a"]
    assert setup_py.sm90_archs(["80", "90"]) == []


def test_stable_abi_flag_says_the_torch_that_pyproject_asks_for(setup_py):
    """TORCH_TARGET_VERSION packs major and minor into its two highest bytes."""
    flag = int(setup_py.TARGET_TORCH_FLAG.split("=")[1], 16)
    assert (flag >> 56, flag >> 48 & 0xFF) == setup_py.TARGET_TORCH
    oldest = re.search(r'"torch>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert tuple(map(int, oldest.groups())) == setup_py.TARGET_TORCH
