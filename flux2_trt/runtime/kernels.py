"""Kernels: those that TensorRT-RTX made for a plan on this machine, kept for the next time that it is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from flux2_trt.bundle import is_open_to_all, stranger_of
from flux2_trt.errors import Flux2Error
from flux2_trt.manifest import ComponentRecord
from flux2_trt.outputs import write_file

FOLDER = "kernels"
"""Of the store."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelFile:
    """A file of kernels for one plan and one version of its compiler, which also knows the GPU and the driver that it
    is for, and refuses it on others."""

    path: Path

    @staticmethod
    def of(folder: Path, record: ComponentRecord) -> KernelFile:
        return KernelFile(folder / f"{record.plan.sha256[:16]}-{record.compiler}-{record.compiler_version}.kernels")

    def read(self) -> bytes:
        """Nothing where there is no file, or one that others could have written: kernels are executable content."""
        try:
            data = self.path.read_bytes()
            trusted = not is_open_to_all(self.path) and stranger_of(self.path) is None
        except FileNotFoundError:
            return b""
        except OSError as error:
            _log.warning("%s cannot be read (%s): its kernels are made again", self.path, error.strerror)
            return b""
        if not trusted:
            _log.warning("%s can be written by others: its kernels are made again", self.path)
        return data if trusted else b""

    def write(self, data: bytes) -> None:
        """A picture is not lost where the file cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, data, overwrite=True, mode=0o600)
        except (Flux2Error, OSError) as error:
            _log.warning("kernels are not kept, and made again the next time: %s", error)
