"""Make .venv, the environment that `make` and .ci/run work in. Standard library only.

    PYTHON .ci/environment.py create                       make .venv, unless it is there
    .venv/bin/python .ci/environment.py install test lint  what the package and these extras need

Where PYTHON has torch (with its CUDA, its triton), .venv is laid over PYTHON: it sees all of
PYTHON's packages and adds only what is missing; PYTHON's own folders are not written to. Where it
has none, .venv starts empty and gets the pinned torch. A package that is there in a version that
pyproject.toml accepts is left alone: nothing is asked of a network which may not be there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"


def torch_version() -> tuple[int, ...]:
    """(major, minor) of this interpreter's torch, or () without one."""
    try:
        return tuple(int(part) for part in importlib.metadata.version("torch").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return ()


def create() -> None:
    if (VENV / "bin" / "python").exists():
        return
    if sys.version_info < (3, 10):  # noqa: UP036 (this file is what finds out)
        sys.exit(f"lrq needs Python >= 3.10, {sys.executable} is {sys.version.split()[0]}")
    layered = torch_version() >= (2, 10)
    print(f"Making .venv {'over' if layered else 'with'} {sys.executable}", flush=True)
    # pip comes from the layer below if it has one: not every Python can install its own (Debian).
    below_has_pip = layered and importlib.util.find_spec("pip") is not None
    try:
        venv.create(VENV, symlinks=True, with_pip=not below_has_pip)
    except subprocess.CalledProcessError as error:
        shutil.rmtree(VENV, ignore_errors=True)
        sys.exit(f"{sys.executable} cannot make a virtual environment (python3-venv?): {error}")
    if layered:
        # Not --system-site-packages: when PYTHON is itself in a virtual environment, that shows the
        # base installation and not the environment that has the torch.
        seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = VENV / "lib" / version / "site-packages"
        (packages / "below.pth").write_text("\n".join(seen) + "\n")


def missing(extras: list[str]) -> list[str]:
    """The pins of what is required and not installed in an accepted version."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # pip is in every environment that gets here, and has carried a copy since Python 3.10
        from pip._vendor import tomli as tomllib
    from pip._vendor.packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    required = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in extras:
        required += project["project"]["optional-dependencies"][extra]
    pins = {}
    for line in project["tool"]["lrq"]["pins"]:
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate():
            pins[pin.name] = f"{pin.name}{pin.specifier}"

    wanted = []
    for line in required:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wanted.append(pins.get(requirement.name, f"{requirement.name}{requirement.specifier}"))
    return wanted


def install(extras: list[str]) -> None:
    wanted = missing(extras)
    if not wanted:
        return
    print(f"Installing into .venv: {' '.join(wanted)}", flush=True)
    # Naming the torch that is there keeps pip from replacing it with another, by several GB.
    keep = [f"torch=={importlib.metadata.version('torch')}"] if torch_version() else []
    # Of torch and transformers few modules are imported: Python compiles those when they are.
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    pip += ["--no-compile"]
    if subprocess.run([*pip, *wanted, *(pin for pin in keep if pin not in wanted)]).returncode:
        sys.exit(
            f"\npip could not install {', '.join(wanted)} (its reason is above). Without a network,"
            " install them from wheels (.venv/bin/python -m pip install --no-deps *.whl), or remove"
            " .venv and give a Python that has them (make PYTHON=...). Then run make again."
        )


if __name__ == "__main__":
    os.chdir(ROOT)
    if sys.argv[1:] == ["create"]:
        create()
    elif sys.argv[1:2] == ["install"]:
        install(sys.argv[2:])
    else:
        sys.exit(__doc__)
