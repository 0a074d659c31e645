"""Writing files so that a reader never meets half of one: temporary file in the same folder, fsync, rename.

A crash, a full disk or Ctrl-C leaves either the previous file or the new one, and no temporary file.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from segvit.contracts import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)  # a full disk and a used-up quota are the same trouble to the user


@contextmanager
def open_atomic(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well, and vanishes when it does not.

    Missing parent folders are made. For what is too big to hold in memory twice; otherwise see `write_bytes`.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Opened plainly rather than by tempfile.mkstemp, whose 0600 mode would stay on the file and lock out a group.
        # A short name of its own: the target's name may already be as long as the file system allows.
        temporary = path.parent / f".{os.getpid()}-{secrets.token_hex(6)}.tmp"
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            left = "the previous file is intact" if path.exists() else "no partial file is left"
            raise UserError(
                f"no space left on the disk while writing {path}; free some space and run the command again, {left}"
            ) from error
        raise


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with open_atomic(path) as file:
        file.write(data)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 with the line ends it has, atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically; NaN and infinity are errors, since other JSON readers refuse them."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def cache_folder() -> Path:
    """The user's cache folder: $SEGVIT_CACHE, else segvit in $XDG_CACHE_HOME, else ~/.cache/segvit."""
    if own := os.environ.get("SEGVIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "segvit"
