"""What the doctor remembers: by path while nothing changes, by content when it does, and never anything wrong."""

import json
import os

import pytest

from segvit.data.doctor import records
from segvit.data.doctor.records import Records, digest_of, stamp_of


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "doctor"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def add(memory, path, content=b"content", record=None, kind="masks"):
    path.write_bytes(content)
    digest = digest_of(path, content)
    memory.add(kind, path.name, stamp_of(path), digest, record or {"found": path.name})
    return digest


def test_records_come_back(root, folder):
    memory = Records(root)
    digest = add(memory, root / "a.png")
    memory.save()
    again = Records(root)
    assert again.of_file("masks", "a.png", root / "a.png") == again.of_content("masks", digest) == {"found": "a.png"}
    assert again.of_file("hashes", "a.png", root / "a.png") is again.of_content("hashes", digest) is None
    assert Records(root / ".." / "data").of_content("masks", digest)  # the same folder by another name
    assert Records(root.parent).of_content("masks", digest) is None
    assert [path.suffix for path in folder.iterdir()] == [".json"]


@pytest.mark.parametrize("change", ["touched", "same size", "longer", "gone"])
def test_a_changed_file_is_not_taken_for_the_old_one(root, change):
    memory = Records(root)
    path = root / "a.png"
    digest = add(memory, path)
    stamp = path.stat()
    if change == "touched":
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    elif change == "gone":
        path.unlink()
    else:
        path.write_bytes(b"CONTENT" if change == "same size" else b"more content")
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + (change == "same size")))
    assert memory.of_file("masks", "a.png", path) is None
    assert memory.of_content("masks", digest) is not None


def test_what_is_gone_is_forgotten(root):
    memory = Records(root)
    kept = [add(memory, root / name, name.encode()) for name in ("a.png", "b.png")]
    (root / "a.png").unlink()
    memory.save()
    again = Records(root)
    assert again.of_content("masks", kept[0]) is None
    assert again.of_content("masks", kept[1]) is not None


def test_the_key_is_the_content_and_how_it_is_read(tmp_path):
    assert (
        digest_of(tmp_path / "a.png", b"x")
        == digest_of(tmp_path / "b.tif", b"x")
        != digest_of(tmp_path / "a.png", b"y")
    )
    assert len({digest_of(tmp_path / name, b"x") for name in ("a.png", "a.npy", "a.npz")}) == 3


def test_damaged_or_foreign_files_are_started_anew(root, folder, monkeypatch):
    memory = Records(root)
    digest = add(memory, root / "a.png")
    memory.save()
    text = memory.path.read_text()
    assert "content" not in text  # only a digest of it
    for wrong in ("", "hello", text[:-5], text.replace("a.png", "b.png"), "\0" + text, text.replace("\n", "")):
        memory.path.write_text(wrong)
        assert Records(root).of_content("masks", digest) is None
    memory.path.write_bytes(b"\xff\xfe")
    assert Records(root).of_content("masks", digest) is None
    memory.path.write_text(text)
    assert Records(root).of_content("masks", digest)
    monkeypatch.setattr(records, "VERSION", "another")
    assert Records(root).of_content("masks", digest) is None


def test_nothing_is_written_without_need_or_leave(root, folder, tmp_path, monkeypatch):
    Records(root).save()
    refused = Records(root, keep=False)
    add(refused, root / "a.png")
    refused.save()
    assert not folder.exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEGVIT_CACHE", str(tmp_path / "file" / "below"))  # no folder can be made there
    memory = Records(root)
    add(memory, root / "a.png")
    memory.save()
    assert memory.of_file("masks", "a.png", root / "a.png")


def test_odd_names_survive(root):
    memory = Records(root)
    name = "caf\u00e9 \udcff.png"
    memory.add("masks", name, records.Stamp(1, 2), "digest", {"found": 1})
    (root / name).write_bytes(b"")
    memory.save()
    assert Records(root).files == {name: ((1, 2), "digest")}
    json.loads(memory.path.read_text().partition("\n")[2])
