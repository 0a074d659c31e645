"""What was found in files, kept between runs in one JSON file a dataset in the user's cache folder.

A file whose size and time are those of last time is not opened. Otherwise its bytes are read, and a digest of them
finds the record of a file that was only moved, copied or touched. To forget everything, delete the folder `doctor`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import PIL

from segvit.contracts import UserError
from segvit.data.arrays import ARRAY_SUFFIXES
from segvit.files import cache_folder, write_text

VERSION = f"segvit doctor 1, Pillow {PIL.__version__}"  # of the records; another Pillow may read other modes

Record = dict[str, Any]  # what JSON can hold


class Stamp(NamedTuple):
    """What shows without opening a file that it is still the same."""

    size: int
    time: int  # of the last change, in nanoseconds


def stamp_of(path: Path) -> Stamp:
    """The present stamp of a file. Raises OSError where there is none."""
    status = path.stat()
    return Stamp(status.st_size, status.st_mtime_ns)


def digest_of(path: Path, data: bytes) -> str:
    """The key of a file's content. Array files are read by their names, so these are a part of it."""
    suffix = path.suffix.lower()
    return _digest(data) + (suffix if suffix in ARRAY_SUFFIXES else "")


class Records:
    """Records by kind and content, and the content that each file below `root` had."""

    def __init__(self, root: Path, *, keep: bool = True) -> None:
        """With `keep` false nothing is read from the disk or written there."""
        self.root, self.changed = root, False
        self.files: dict[str, tuple[Stamp, str]] = {}  # name -> stamp and digest
        self.found: dict[str, dict[str, Record]] = {}  # kind -> digest -> record
        self.path = cache_folder() / "doctor" / f"{_digest(os.fsencode(root.resolve()))}.json" if keep else None
        if self.path is not None:
            self._load(self.path)

    def of_file(self, kind: str, name: str, path: Path) -> Record | None:
        """The record of a file that has not changed since it was added; its content is not read."""
        known = self.files.get(name)
        try:
            if known is None or stamp_of(path) != known[0]:
                return None
        except OSError:
            return None
        return self.of_content(kind, known[1])

    def of_content(self, kind: str, digest: str) -> Record | None:
        """The record of any file that had this content."""
        return self.found.get(kind, {}).get(digest)

    def add(self, kind: str, name: str, stamp: Stamp, digest: str, record: Record) -> None:
        """Keep a record."""
        self.files[name] = (stamp, digest)
        self.found.setdefault(kind, {})[digest] = record
        self.changed = True

    def save(self) -> None:
        """Write what was added, if the folder lets itself be written to; records of files that are gone are dropped."""
        if self.path is None or not self.changed:
            return
        try:
            write_text(self.path, self._text())
        except (OSError, UserError):  # the next run reads everything again, which is all that is lost
            return
        self.changed = False

    def _text(self) -> str:
        files = {name: [*stamp, digest] for name, (stamp, digest) in self.files.items() if (self.root / name).exists()}
        used = {digest for _, _, digest in files.values()}
        found = {kind: {key: made[key] for key in made if key in used} for kind, made in self.found.items()}
        text = json.dumps({"files": files, "found": found}, separators=(",", ":"))
        return f"{_first_line(text)}\n{text}"

    def _load(self, path: Path) -> None:
        try:
            first, _, text = path.read_text(encoding="utf-8").partition("\n")
        except (OSError, UnicodeDecodeError):
            return
        if first != _first_line(text):  # of another version, or damaged
            return
        content: Mapping[str, Any] = json.loads(text)
        self.files = {name: (Stamp(size, time), digest) for name, (size, time, digest) in content["files"].items()}
        self.found = content["found"]


def _first_line(text: str) -> str:
    return f"{VERSION} {_digest(text.encode())}"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
