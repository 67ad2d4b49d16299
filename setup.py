"""What to compile and how; everything else about the package is in pyproject.toml.

    lrq_kernels/_planner.*.so   csrc/planner.cpp through pybind11, without torch and CUDA:
                                built everywhere
    lrq_kernels/liblrq_cuda.so  every csrc/**/*.cu by nvcc, the other csrc/**/*.cpp against torch's
                                stable ABI: no Python in it, so one file serves every torch >= 2.10

Not torch's CUDAExtension: under a CPU build of torch that refuses to compile CUDA at all, and it
ties the library to one torch and one Python. ninja does the work in build/ninja-*, so that the next
build compiles only what changed; beside each object of nvcc lies its .log: registers and spills.

    LRQ_BUILD_CUDA  auto (default): the CUDA library where nvcc and torch >= 2.10 are; 0: never;
                    1: an error where it cannot be
    LRQ_CUDA_ARCHS  default "80;89;90a;120" as far as nvcc knows them; "90a" alone is quick on
                    Hopper. The lowest plain one comes as PTX too, for GPUs that no other covers
    CUDA_HOME, CXX  which toolkit and host compiler; else what is on PATH
    MAX_JOBS        how many compilers at once
nvcc reads NVCC_APPEND_FLAGS by itself: -lineinfo there, on a clean build, gives a profiler the
source lines, in a library three times as large.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from shlex import quote

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
BUILD = f"build/ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
DEFAULT_ARCHS = "80;89;90a;120"
OLDEST_NVCC = (12, 5)  # cudaGetDriverEntryPointByVersion
# Nothing newer than torch 2.10 may be called: the library then loads under every later torch.
TARGET_TORCH, TARGET_TORCH_FLAG = (2, 10), "-DTORCH_TARGET_VERSION=0x020a000000000000"
CXX_FLAGS = "-O2 -std=c++17 -fPIC -fvisibility=hidden -Wall -Icsrc"
NVCC_FLAGS = (
    "-O3 -std=c++17 -Icsrc --expt-relaxed-constexpr"
    " -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v,--warn-on-spills"
)
# --no-as-needed: the stable ABI is looked up through libtorch.so, so the need of it must stay.
# Static cudart: nothing of CUDA has to be there to load the library on a CPU. -lstdc++ first: some
# builds of torch export parts of it, without the versions that other builds lack.
LINK_FLAGS = (
    "-lstdc++ -Wl,--no-as-needed -ltorch -ltorch_cpu -Wl,--as-needed"
    " -lcudart_static -ldl -lpthread -lrt"
    " -Wl,--exclude-libs,ALL -Wl,-z,defs"
)
NINJA_RULES = """
rule cxx
  command = $cxx -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = c++ $in
rule nvcc
  command = if $nvcc -MD -MF $out.d $flags -c $in -o $out > $out.log 2>&1; then $
      grep -i -e warning -e 'Performance Loss' $out.log || true; else cat $out.log; exit 1; fi
  depfile = $out.d
  deps = gcc
  description = nvcc $in
rule link
  command = $cxx -shared -o $out $in $flags
  description = link $out
"""


def csrc(*suffixes: str) -> list[str]:
    """Files below csrc, relative to the root."""
    return sorted(str(p.relative_to(ROOT)) for s in suffixes for p in ROOT.glob(f"csrc/**/*{s}"))


def package_dir(name: str) -> Path | None:
    """Where a package lies, without importing it: torch takes seconds to import."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def cuda_toolchain() -> tuple[str, Path, Path] | str:
    """(nvcc, toolkit folder, torch's folder), or why the CUDA library cannot be built."""
    # CUDA_HOME, when set, is the only place looked at.
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = f"{home}/bin" if home else f"{os.environ.get('PATH', os.defpath)}:/usr/local/cuda/bin"
    nvcc, torch = shutil.which("nvcc", path=path), package_dir("torch")
    if nvcc is None:
        return f"there is no nvcc in {path}"
    release = nvcc_release(nvcc)
    if release < OLDEST_NVCC:
        got, expected = (".".join(map(str, version)) for version in (release, OLDEST_NVCC))
        return f"{nvcc} is of CUDA {got}, expected {expected} or newer"
    if torch is None:
        return f"{sys.executable} sees no torch to compile against (pip: --no-build-isolation)"
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < TARGET_TORCH:
        return f"torch is {version}, expected >= {'.'.join(map(str, TARGET_TORCH))}"
    # nvcc on PATH may be a link or a script elsewhere: nvcc itself says where its toolkit is.
    said = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return nvcc, Path(top[1] if top else f"{nvcc}/../..").resolve(), torch


def nvcc_release(nvcc: str) -> tuple[int, ...]:
    """(13, 0), or (0,) where nvcc does not say."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    return tuple(map(int, found.groups())) if found else (0,)


def cuda_archs(nvcc: str, wanted: str | None) -> list[str]:
    """`wanted` ("80;90a"), all of which nvcc must know, or what it knows of the default."""
    said = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    known = set(re.findall(r"sm_(\d+)", said))
    archs = re.findall(r"[^;,\s]+", wanted or DEFAULT_ARCHS)
    good = [a for a in archs if re.fullmatch(r"\d+[af]?", a) and a.rstrip("af") in known]
    if wanted and (bad := [a for a in archs if a not in good]):
        raise SetupError(
            f"LRQ_CUDA_ARCHS={wanted!r}: {nvcc} does not know {', '.join(bad)}; expected a list"
            f" like '80;90a', of {', '.join(sorted(known, key=int))}, with suffix a, f or none"
        )
    return good


def gencode(archs: list[str]) -> str:
    """nvcc's flags: machine code for each, and PTX of the lowest that is not for one GPU only."""
    lowest = sorted((a for a in archs if a.isdigit()), key=int)[:1]
    pairs = [(a, f"sm_{a}") for a in archs] + [(a, f"compute_{a}") for a in lowest]
    return " ".join(f"-gencode arch=compute_{virtual},code={code}" for virtual, code in pairs)


def sm90_archs(archs: list[str]) -> list[str]:
    """Of `archs`, what the sources named *_sm90* are for: wgmma and TMA exist in sm_90a alone."""
    return [a for a in archs if a == "90a"]


class NinjaBuildExt(build_ext):
    """Compiles the two libraries with ninja; setuptools puts them where they belong."""

    left_out: list[str] = []

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("liblrq_cuda"):  # loaded by torch, not imported: no CPython tag
            return fullname.replace(".", "/") + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        planner, library = self.extensions
        choice = os.environ.get("LRQ_BUILD_CUDA", "auto")
        if choice not in ("auto", "0", "1"):
            raise SetupError(f"LRQ_BUILD_CUDA must be auto, 0 or 1, got {choice!r}")

        cxx = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
        headers = sysconfig.get_path("include")
        if cxx is None or not Path(headers, "Python.h").exists():
            reason = f"a C++ compiler or {headers}/Python.h is missing"
            self.leave_out([library, planner], reason, fail=choice == "1")
            return
        self.ninja = [f"cxx = {cxx}", NINJA_RULES]

        archs: list[str] = []
        defines = ""
        toolchain = cuda_toolchain() if choice != "0" else "LRQ_BUILD_CUDA=0"
        if isinstance(toolchain, str):
            self.leave_out([library], toolchain, fail=choice == "1")
        else:
            nvcc, toolkit, torch = toolchain
            archs = cuda_archs(nvcc, os.environ.get("LRQ_CUDA_ARCHS"))
            self.ninja += [f"nvcc = {nvcc}"]
            if not sm90_archs(archs):
                defines = " -DLRQ_WITHOUT_SM90A"  # the planner must not choose what is not there
            cu_flags = f"{NVCC_FLAGS} -ccbin {quote(cxx)}{defines} "
            cpp_flags = f"{CXX_FLAGS} {TARGET_TORCH_FLAG} -isystem {quote(f'{torch}/include')}"
            cpp_flags += defines
            cpp_flags += f" -idirafter {quote(f'{toolkit}/include')}"
            folders = [f"{torch}/lib", f"{toolkit}/lib64", f"{toolkit}/lib"]
            link_flags = " ".join([f"-L{quote(folder)}" for folder in folders] + [LINK_FLAGS])
            rules = {
                ".cu": ("nvcc", cu_flags + gencode(archs)),
                "_sm90.cu": ("nvcc", cu_flags + gencode(sm90_archs(archs) or archs)),
                ".cpp": ("cxx", cpp_flags),
            }
            self.add_library(library, rules, link_flags)

        # pybind11 of its own, else torch's copy, where nothing can be installed.
        pybind11 = package_dir("pybind11") or package_dir("torch")
        if pybind11 is None:
            raise SetupError("building lrq needs pybind11, which is not installed")
        flags = f"{CXX_FLAGS} -isystem {quote(f'{pybind11}/include')} -isystem {quote(headers)}"
        flags += f" -DLRQ_CUDA_ARCHS='\"{';'.join(archs)}\"'{defines}"
        self.add_library(planner, {".cpp": ("cxx", flags)}, "")
        self.run_ninja()
        for extension in self.extensions:
            destination = Path(self.get_ext_fullpath(extension.name))
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / BUILD / self.get_ext_filename(extension.name), destination)

    def leave_out(self, extensions: list[Extension], reason: str, *, fail: bool) -> None:
        """Say why, and leave no older build behind that would be loaded instead."""
        self.left_out = [self.get_ext_filename(extension.name) for extension in extensions]
        if fail:
            raise SetupError(f"LRQ_BUILD_CUDA=1, but {self.left_out} cannot be built: {reason}")
        print(
            f"lrq: {', '.join(self.left_out)} not built: {reason}. lrq runs on the CPU path.",
            flush=True,
        )
        for extension, filename in zip(extensions, self.left_out, strict=True):
            self.extensions.remove(extension)
            Path(self.build_lib, filename).unlink(missing_ok=True)

    def copy_extensions_to_source(self) -> None:  # setuptools calls it for editable and --inplace
        super().copy_extensions_to_source()
        for filename in self.left_out:
            (ROOT / filename).unlink(missing_ok=True)

    def add_library(
        self, extension: Extension, rules: dict[str, tuple[str, str]], link_flags: str
    ) -> None:
        """`rules`: suffix of a source, "_sm90.cu" for gemm_sm90*.cu -> rule and flags."""
        objects = []
        for source in extension.sources:
            kind = "_sm90" if "_sm90" in Path(source).stem else ""
            rule, flags = rules[kind + Path(source).suffix]
            objects.append(f"{BUILD}/{source}.o")
            self.ninja += [f"build {objects[-1]}: {rule} {source}", f"  flags = {flags}"]
        library = f"{BUILD}/{self.get_ext_filename(extension.name)}"
        self.ninja += [f"build {library}: link {' '.join(objects)}", f"  flags = {link_flags}"]

    def run_ninja(self) -> None:
        # On PATH, beside this Python, or in the prefix or --target folder that the package is in.
        package = package_dir("ninja")
        path = [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)]
        path += [str(parent / "bin") for parent in package.parents] if package else []
        ninja = shutil.which("ninja", path=os.pathsep.join(path))
        if ninja is None:
            raise SetupError("building lrq needs ninja, which is not installed: pip install ninja")
        script = ROOT / BUILD / "build.ninja"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text("\n".join([f"builddir = {BUILD}", *self.ninja]) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        if subprocess.run([ninja, "-f", str(script), *jobs], cwd=ROOT).returncode:
            raise CompileError("compiling csrc failed; LRQ_BUILD_CUDA=0 builds lrq without CUDA")


if __name__ == "__main__":
    setup(
        cmdclass={"build_ext": NinjaBuildExt},
        ext_modules=[
            Extension("lrq_kernels._planner", ["csrc/planner.cpp"], depends=csrc(".h")),
            Extension(
                "lrq_kernels.liblrq_cuda",
                [path for path in csrc(".cu", ".cpp") if path != "csrc/planner.cpp"],
                depends=csrc(".h", ".cuh"),
            ),
        ],
    )
