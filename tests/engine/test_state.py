"""Checkpoints: exact, free of code, whole or not at all."""

import errno
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch

from segvit import files
from segvit.contracts import UserError
from segvit.engine.state import copy_state, random_state, read_state, restore_random, save_state


def state():
    return {
        "model": {"a": torch.randn(3, 4), "b": torch.arange(5), "half": torch.ones(2, dtype=torch.bfloat16)},
        "step": 7, "best": 0.25, "average": None, "names": ["x"], "nested": {"t": (1, 2)},
    }  # fmt: skip


def assert_equal(found, expected):
    assert found.keys() - {"format"} == expected.keys()
    for key in ("step", "best", "average", "names", "nested"):
        assert found[key] == expected[key]
    for key, value in expected["model"].items():
        assert found["model"][key].dtype == value.dtype
        assert torch.equal(found["model"][key], value)


def test_round_trip_and_copy(tmp_path, seeded):
    saved = state()
    save_state(tmp_path / "last" / "state.pt", saved)
    assert_equal(read_state(tmp_path / "last" / "state.pt"), saved)
    copy_state(tmp_path / "last" / "state.pt", tmp_path / "best" / "state.pt")
    assert (tmp_path / "best" / "state.pt").read_bytes() == (tmp_path / "last" / "state.pt").read_bytes()


def test_an_optimizer_with_its_moments_survives(tmp_path, seeded):
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    save_state(tmp_path / "s.pt", {"optimizer": optimizer.state_dict()})
    other = torch.optim.AdamW(layer.parameters())
    other.load_state_dict(read_state(tmp_path / "s.pt")["optimizer"])
    assert str(other.state_dict()) == str(optimizer.state_dict())


def test_random_numbers_go_on_where_they_were(tmp_path, seeded):
    save_state(tmp_path / "s.pt", {"random": random_state()})
    expected = torch.rand(5)
    torch.rand(99)
    restore_random(read_state(tmp_path / "s.pt")["random"])
    assert torch.equal(torch.rand(5), expected)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("plain", [True, False])
def test_code_is_refused_and_not_run(tmp_path, plain):
    path, sprung = tmp_path / "s.pt", tmp_path / "sprung"
    if plain:
        path.write_bytes(pickle.dumps(Trap(sprung)))
    else:
        torch.save({"format": 1, "trap": Trap(sprung)}, path)
    with pytest.raises(UserError, match=r"s\.pt: (refused|damaged)"):
        read_state(path)
    assert not sprung.exists()


def test_missing(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint to resume from; leave --resume out"):
        read_state(tmp_path / "s.pt")


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named_damaged(tmp_path, part):
    path = tmp_path / "s.pt"
    save_state(path, state())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(UserError, match=r"s\.pt: (damaged|refused)"):
        read_state(path)


def test_flipped_bytes_are_noticed(tmp_path):
    path = tmp_path / "s.pt"
    save_state(path, state())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    path.write_bytes(b"no archive at all" * 100)
    with pytest.raises(UserError):
        read_state(path)


def test_another_format_is_refused(tmp_path):
    torch.save({"format": 99}, tmp_path / "s.pt")
    with pytest.raises(UserError, match=r"another version of segvit \(format 99, here 1\)"):
        read_state(tmp_path / "s.pt")


def test_a_file_that_holds_no_dictionary_is_refused(tmp_path):
    torch.save(torch.ones(3), tmp_path / "s.pt")
    with pytest.raises(UserError, match=r"s\.pt"):
        read_state(tmp_path / "s.pt")


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path, saved = tmp_path / "s.pt", state()
    save_state(path, saved)

    class Full:
        """A file on a disk with room for 1000 bytes."""

        def __init__(self, file):
            self.file, self.left = file, 1000

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def flush(self):
            self.file.flush()

        def fileno(self):
            return self.file.fileno()

    plain = files.Path.open
    monkeypatch.setattr(
        files.Path, "open", lambda path, mode="r", *args: (Full if mode == "xb" else lambda f: f)(plain(path, mode))
    )
    with pytest.raises(UserError, match=r"no space left on the disk while writing .*s\.pt.*previous file is intact"):
        save_state(path, {"model": torch.randn(100_000)})
    monkeypatch.undo()
    assert_equal(read_state(path), saved)
    assert [file.name for file in tmp_path.iterdir()] == ["s.pt"]


LIMITED = """
import resource, signal, sys
import torch
from pathlib import Path
from segvit.engine.state import save_state
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
save_state(path, {"step": 1, "weights": torch.zeros(1000)})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_state(path, {"step": 2, "weights": torch.zeros(1_000_000)})
except OSError as error:
    print(type(error).__name__, error.errno)
"""


def test_the_systems_own_limit_keeps_the_previous_checkpoint(tmp_path):
    path = tmp_path / "s.pt"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIMITED, path], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["OSError", str(errno.EFBIG)]
    assert read_state(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["s.pt"]
