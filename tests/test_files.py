"""Atomic writing: the new file, or the previous one untouched, and never a temporary file."""

import errno
import json
import os
import stat

import pytest

from segvit import files
from segvit.contracts import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writes_what_it_is_given_and_makes_folders(tmp_path):
    files.write_bytes(tmp_path / "a" / "b.bin", b"\x00\xff")
    files.write_text(tmp_path / "t.txt", "caf\u00e9\r\n")
    files.write_json(tmp_path / "j.json", {"names": ["caf\u00e9"], "none": None})
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "t.txt").read_bytes() == "caf\u00e9\r\n".encode()
    assert json.loads((tmp_path / "j.json").read_text("utf-8")) == {"names": ["caf\u00e9"], "none": None}
    assert names(tmp_path) == ["a", "j.json", "t.txt"]


def test_replaces_and_keeps_the_usual_mode(tmp_path):
    path, plain = tmp_path / "x.txt", tmp_path / "plain.txt"
    plain.write_text("")
    files.write_text(path, "old")
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_name_of_full_length_can_be_written(tmp_path):
    files.write_text(tmp_path / ("n" * 255), "x")
    assert names(tmp_path) == ["n" * 255]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_leaves_the_previous_file(tmp_path, monkeypatch, code):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})

    def full(handle):
        raise OSError(code, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left on the disk while writing .*x\.json.*previous file is intact"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(UserError, match="no partial file is left"):
        files.write_json(tmp_path / "y.json", {})
    assert names(tmp_path) == ["x.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "broken"), RuntimeError("stop")])
def test_other_errors_pass_and_leave_nothing(tmp_path, error):
    path = tmp_path / "x.txt"
    files.write_text(path, "old")

    def interrupted():
        with files.open_atomic(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)) as caught:
        interrupted()
    assert caught.value is error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert names(tmp_path) == []
