"""Checkpoints that are either whole or the previous one, and that load without running code."""

from __future__ import annotations

import os
import tempfile
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .errors import UserError, os_reason

FORMAT = "fastrnn-lm"
VERSION = 2  # 2: a pass over the text has its last, shorter chunk too
FIELDS: dict[str, type] = {
    "config": dict,
    "characters": str,
    "digest": str,
    "model": dict,
    "optimizer": dict,
    "step": int,
    "position": int,
    "rng": dict,
    "losses": torch.Tensor,
    "seconds": torch.Tensor,
    "validations": list,
}


def check_writable(path: str) -> None:
    """Raises UserError where a file could not be written at path; makes its folder."""
    target = Path(path)
    try:
        if target.is_dir():
            raise UserError(f"cannot write {path or repr(path)}: it is a directory")
        if target.exists() and not target.is_file():  # a pipe would wait for its reader, a device be replaced
            raise UserError(f"cannot write {path}: it is no regular file")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Only a file really made tells: permission bits say nothing to root or on a read-only mount.
        with tempfile.TemporaryFile(dir=target.parent):
            pass
        if target.exists():
            with target.open("ab"):
                pass
    except OSError as error:
        raise UserError(f"cannot write {path}: {os_reason(error)}") from error
    except ValueError as error:  # a NUL in the path
        raise UserError(f"cannot write {path!r}: {error}") from error


def save(path: str, fields: dict[str, Any]) -> None:
    """Writes the checkpoint beside `path` and moves it there once it is on the disk.

    A crash, a full disk or Ctrl-C at any moment leaves the previous file as it was. Raises UserError where
    it cannot be written.
    """
    target = Path(os.path.realpath(path))  # through a link, which os.replace would overwrite
    # A name of its own for each process and target: no two runs may write into one file. Of the target's,
    # which may be as long as names can be, the beginning and a checksum.
    told = f"{target.name[:32]}.{zlib.crc32(os.fsencode(target.name)):08x}"
    temporary = target.with_name(f".{told}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **fields}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {os_reason(error)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """The rename itself must reach the disk too; some file systems refuse, and then it stays as it is."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load(path: str) -> dict[str, Any]:
    """The checkpoint's fields, tensors on the CPU. Raises UserError where it is foreign or damaged."""
    try:
        if Path(path).is_dir():
            raise UserError(f"{path} is a directory, expected a checkpoint")
        with Path(path).open("rb") as file:
            with zipfile.ZipFile(file) as archive:  # torch.load passes over the checksums
                if archive.testzip() is not None:
                    raise UserError(f"{path} is damaged: a checksum does not hold")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {os_reason(error)}") from error
    except UserError:
        raise
    except Exception as error:  # torch.load fails on foreign bytes in many ways
        raise UserError(f"{path} is not a checkpoint of fastrnn lm, or it is damaged") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of fastrnn lm")
    if content.get("version") != VERSION:
        raise UserError(f"{path} has checkpoint version {content.get('version')}, expected {VERSION}")
    for name, kind in FIELDS.items():
        if not isinstance(content.get(name), kind):
            raise UserError(f"{path} is damaged: its {name!r} is missing or not {kind.__name__}")
    return content
