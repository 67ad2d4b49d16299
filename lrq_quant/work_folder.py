"""WorkFolder: what a killed run continues from, one file per finished input group.

    <folder>/group-<crc of name>.safetensors   an lrq checkpoint of the group's linears
    <folder>/group-<crc of name>.json          fingerprint, name, reports
    <folder>/stats.safetensors                 calibration statistics, fingerprint in the metadata
    <folder>/widths.json                       fingerprint, and what a bit budget gave each input

The JSON is written last and every write is a rename, so a file that is there is complete.  A
fingerprint that does not match means another model, recipe or calibration: the file is ignored and
replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrq_kernels import checkpoint
from lrq_kernels.checkpoint import LinearState

from .calibration import ActivationStats
from .report import LinearReport

# Of what is kept: 2 has the histogram and the channels of each report.
_VERSION = 2
_STATS = "stats.safetensors"
_WIDTHS = "widths.json"


class WorkFolder:
    """Made when it is not there.  Raises OSError when nothing can be written into it, and
    FileExistsError when it is a file or holds anything else that is not hidden."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"work folder {folder} is a file")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f"probe.{os.getpid()}.tmp"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise OSError(f"cannot write to the work folder {folder}: {error}") from error
        # A probe is of another process that shares the folder, .DS_Store or .nfs123 of the system.
        own = ("group-", "stats.", "widths.", "probe.", ".")
        foreign = [file.name for file in folder.iterdir() if not file.name.startswith(own)]
        if foreign:
            raise FileExistsError(f"work folder {folder} holds other files: {sorted(foreign)[:5]}")

    @staticmethod
    def fingerprint(facts: dict[str, Any], tensors: Sequence[Tensor]) -> str:
        """Hash of JSON values and of the bytes of tensors."""
        digest = hashlib.sha256(f"{_VERSION} {json.dumps(facts, sort_keys=True)}".encode())
        for tensor in tensors:
            data = tensor.detach().cpu().contiguous()
            digest.update(f"{data.dtype} {tuple(data.shape)}".encode())
            digest.update(data.view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save_group(
        self,
        name: str,
        key: str | None,
        states: dict[str, LinearState],
        reports: list[LinearReport],
    ) -> None:
        tensors, facts = self._group_files(name)
        checkpoint.save(tensors, states, {}, "")
        values = {"key": key, "name": name, "reports": [report.to_dict() for report in reports]}
        write_text(facts, json.dumps(values))

    def load_group(
        self, name: str, key: str | None
    ) -> tuple[dict[str, LinearState], list[LinearReport]] | None:
        """What save_group kept under this key, or None."""
        tensors, facts = self._group_files(name)
        if not facts.is_file() or not tensors.is_file():
            return None
        try:
            values = json.loads(facts.read_text())
            if values["key"] != key or values["name"] != name:
                return None
            reports = [LinearReport.from_dict(report) for report in values["reports"]]
            return checkpoint.load(tensors).states, reports
        except (ValueError, KeyError, TypeError):
            return None  # damaged: the group is quantized again

    def save_stats(self, key: str | None, stats: dict[str, ActivationStats]) -> None:
        tensors = {}
        for name, entry in stats.items():
            tensors.update({f"{name}/{part}": t for part, t in entry.tensors().items()})
        temporary = self.folder / f"stats.{os.getpid()}.tmp"
        save_file(tensors, str(temporary), metadata={"key": str(key)})
        os.replace(temporary, self.folder / _STATS)

    def load_stats(self, key: str | None) -> dict[str, ActivationStats] | None:
        """What save_stats kept under this key, or None."""
        file = self.folder / _STATS
        if not file.is_file():
            return None
        parts: dict[str, dict[str, Tensor]] = {}
        try:
            with safe_open(str(file), framework="pt") as handle:
                if (handle.metadata() or {}).get("key") != str(key):
                    return None
                for full in handle.keys():  # a file handle, not a dict
                    name, _, part = full.rpartition("/")
                    parts.setdefault(name, {})[part] = handle.get_tensor(full)
        except SafetensorError:
            return None
        return {name: ActivationStats.from_tensors(name, own) for name, own in parts.items()}

    def save_widths(self, key: str, widths: list[dict[str, int]]) -> None:
        write_text(self.folder / _WIDTHS, json.dumps({"key": key, "widths": widths}))

    def load_widths(self, key: str) -> list[dict[str, int]] | None:
        """What save_widths kept under this key, or None."""
        file = self.folder / _WIDTHS
        if not file.is_file():
            return None
        try:
            values = json.loads(file.read_text())
            return values["widths"] if values["key"] == key else None
        except (ValueError, KeyError, TypeError):
            return None  # damaged: measured again

    def remove(self) -> None:
        """Delete this package's files and the folder when nothing else is in it."""
        for pattern in ("group-*", "stats.*", "widths.*", "probe.*"):
            for file in self.folder.glob(pattern):
                file.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _group_files(self, name: str) -> tuple[Path, Path]:
        stem = f"group-{zlib.crc32(name.encode()):08x}"
        return self.folder / f"{stem}.safetensors", self.folder / f"{stem}.json"


def write_text(file: Path, text: str) -> None:
    """Write a whole UTF-8 file, or leave what was there."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
