"""Galleries: what is written and read, exact and approximate search, contact sheets, one line for mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from segvit import cli
from segvit.contracts import UserError
from segvit.model_folder import save_model
from segvit.tasks import gallery as galleries
from segvit.tasks.contact_sheet import CELL, FRAME, GAP, RIGHT, WRONG, save_sheet
from segvit.tasks.gallery import Found, Gallery, Neighbour, read_gallery, search_files, write_gallery
from segvit.zoo import create_model

TINY: dict[str, Any] = {"backbone": "test_resnet", "kernel": 5}
NAMES = ("crow", "duck", "finch")


def write_model(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    save_model(create_model("frpt", num_classes=2, **TINY), folder)
    return str(folder)


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("birds")
    rng = np.random.default_rng(0)
    for name in NAMES:
        (root / name).mkdir()
        color = rng.integers(0, 200, 3)
        for i in range(4):
            pixels = color + rng.integers(0, 50, (64, 64, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture(scope="module")
def known(birds: Path, model: str, tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    path = tmp_path_factory.mktemp("gallery") / "birds.npz"
    assert write_gallery(str(birds), model, path, device="cpu") == []
    return read_gallery(path)


def directions(count: int, dim: int = 24) -> Any:
    """Vectors of length 1 in clusters, as embeddings are."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, dim))[rng.integers(40, size=count)] + 0.8 * rng.normal(size=(count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_a_gallery_keeps_names_classes_and_unit_embeddings(known: Gallery, birds: Path) -> None:
    assert known.names == [f"{name}/{i}.png" for name in NAMES for i in range(4)]
    assert known.classes() == [name for name in NAMES for _ in range(4)]
    assert known.root == birds
    assert known.model == "frpt"
    vectors = known.embeddings()
    assert vectors.shape == (12, 96)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


def test_search_finds_the_nearest_but_not_the_query_itself(known: Gallery, birds: Path, model: str) -> None:
    vectors = known.embeddings()
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    found = search_files(str(birds), known, model, top=11, device="cpu")
    assert [one.path for one in found] == [birds / name for name in known.names]
    for place, one in enumerate(found):
        assert one.label == known.classes()[place]
        assert sorted([n.place for n in one.neighbours] + [place]) == list(range(12))
        np.testing.assert_allclose([n.score for n in one.neighbours], np.sort(cosines[place])[::-1][:11], atol=1e-5)


def test_a_stranger_finds_all_and_has_no_class(known: Gallery, birds: Path, model: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.png"
    copy.write_bytes((birds / "duck" / "1.png").read_bytes())
    one = search_files(str(copy), known, model, top=12, device="cpu")[0]
    assert one.label is None
    assert one.neighbours[0].place == known.names.index("duck/1.png")  # another file, though the same picture
    assert one.neighbours[0].score == pytest.approx(1, abs=1e-5)
    assert galleries.rows([one], known)[0]["found"][0]["right"] is None
    for name in ("1.png", "other.png"):
        link = tmp_path / name
        link.symlink_to(birds / "duck" / "1.png")
        linked = search_files(str(link), known, model, top=11, device="cpu")[0]
        assert linked.label == "duck"
        assert known.names.index("duck/1.png") not in [n.place for n in linked.neighbours]


def test_an_approximate_index_finds_most_of_the_nearest(tmp_path: Path) -> None:
    vectors = directions(6000)
    queries, none = vectors[:200], [None] * 200
    exact = galleries.nearest(galleries.exact_index(vectors), queries, none, top=10)
    order = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    assert [{n.place for n in row} for row in exact] == [set(row) for row in order.tolist()]
    near = galleries.nearest(galleries.approximate_index(vectors), queries, none, top=10)
    shared = [len({n.place for n in a} & {n.place for n in b}) for a, b in zip(exact, near, strict=True)]
    assert 0.9 < np.mean(shared) / 10 < 1  # 0.99 when written, of 5 lists in 77
    assert all(row[0].place == place for place, row in enumerate(near))  # its own list is always looked into


def test_an_index_file_is_made_once_and_belongs_to_its_gallery(tmp_path: Path, monkeypatch: Any) -> None:
    def gallery(name: str, vectors: Any) -> Gallery:
        names = [f"{i}.png" for i in range(len(vectors))]
        np.savez(tmp_path / name, embeddings=vectors, names=np.array(names))
        return Gallery(tmp_path / name, names, tmp_path, "frpt", "weights", name)

    vectors = directions(300)
    first, path = gallery("a.npz", vectors), tmp_path / "a.index"
    fresh = galleries.nearest(galleries.kept_index(first, path), vectors[:20], [None] * 20, top=3)
    monkeypatch.setattr(galleries, "approximate_index", None)
    again = galleries.nearest(galleries.kept_index(first, path), vectors[:20], [None] * 20, top=3)
    assert fresh == again
    with pytest.raises(UserError, match=r"a\.index is the index of another gallery than \S+b\.npz"):
        galleries.kept_index(gallery("b.npz", vectors[:200]), path)
    path.write_bytes(b"no index")
    with pytest.raises(UserError, match=r"a\.index cannot be read as an index"):
        galleries.kept_index(first, path)


def test_the_sheet_frames_right_and_wrong(known: Gallery, birds: Path, tmp_path: Path) -> None:
    found = [Found(birds / "crow/0.png", "crow", [Neighbour(1, 0.9), Neighbour(5, 0.8)])] * 2
    save_sheet(tmp_path / "sheet.png", found, known)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    step = CELL + 2 * FRAME + GAP
    corners = [tuple(sheet[GAP + 1, GAP + place * step + 1]) for place in range(3)]
    assert corners[1:] == [RIGHT, WRONG]
    assert corners[0] not in (RIGHT, WRONG)
    middle = tuple(sheet[GAP + FRAME + CELL // 2, GAP + step + FRAME + CELL // 2].astype(int))
    pixel = np.asarray(Image.open(birds / "crow/1.png")).astype(int)[32, 32]
    assert np.abs(pixel - middle).max() < 60
    assert sheet.shape[1] == GAP + 3 * step
    with pytest.raises(UserError, match=r"call it \S+sheet\.png"):
        save_sheet(tmp_path / "sheet.jpg", found, known)
    with pytest.raises(UserError, match=r"crow/1\.png has gone since the gallery was made; .* --images"):
        save_sheet(tmp_path / "sheet.png", found, known._replace(root=tmp_path))


def test_the_command_line(birds: Path, model: str, tmp_path: Path, capsys: Any) -> None:
    path, sheet, listed = (str(tmp_path / name) for name in ("birds.npz", "sheet.png", "found.json"))
    places = ["--device", "cpu", "--workers", "0"]
    cli.main(["retrieve", "embed", str(birds), "--model", model, "--out", path, *places])
    assert capsys.readouterr().out == f"12 images in {path}\n"
    query = str(birds / "finch" / "2.png")
    search = ["retrieve", "search", query, "--gallery", path, "--model", model, "--top", "3", *places]
    cli.main([*search, "--sheet", sheet, "--out", listed])
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(Path(listed).read_text())
    assert lines[0] == rows[0]["query"] == query
    assert [line.split()[1] for line in lines[1:]] == [one["image"] for one in rows[0]["found"]]
    assert [one["right"] for one in rows[0]["found"]] == [one["class"] == "finch" for one in rows[0]["found"]]
    assert len(lines) == 4
    assert Path(sheet).read_bytes().startswith(b"\x89PNG")
    cli.main([*search, "--index", str(tmp_path / "birds.index"), "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again == rows  # so few images are in one list
    moved = tmp_path / "moved"
    birds.rename(moved)
    try:
        cli.main([*search[:2], str(moved / "finch" / "2.png"), *search[3:], "--images", str(moved), "--json"])
    finally:
        moved.rename(birds)
    assert all(one["image"].startswith(str(moved)) for one in json.loads(capsys.readouterr().out)[0]["found"])


def test_unreadable_images_are_left_out_and_named(birds: Path, model: str, tmp_path: Path, capsys: Any) -> None:
    photos = tmp_path / "photos"
    (photos / "crow").mkdir(parents=True)
    (photos / "crow" / "a.png").write_bytes((birds / "crow" / "0.png").read_bytes())
    (photos / "crow" / "b.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["retrieve", "embed", str(photos), "--model", model, "--out", str(tmp_path / "g.npz"), "--device", "cpu",
             "--workers", "0"]
        )  # fmt: skip
    assert stop.value.code == 2
    assert "1 images were left out" in (said := capsys.readouterr().err)
    assert "b.png" in said
    known = read_gallery(tmp_path / "g.npz")
    assert known.names == ["crow/a.png"]
    with pytest.raises(UserError, match=r"b\.png: cannot be read as an image"):
        search_files(str(photos / "crow" / "b.png"), known._replace(root=photos), model, top=1, device="cpu")


def rewritten(known: Gallery, path: Path, **changes: Any) -> Path:
    """The gallery's file with other arrays."""
    with np.load(known.path) as file:
        np.savez(path, **({key: file[key] for key in file} | changes))
    return path


def test_mistakes(known: Gallery, birds: Path, model: str, tmp_path: Path, monkeypatch: Any) -> None:
    other = write_model(tmp_path / "other", 1)
    with pytest.raises(UserError, match=r"birds\.npz was made by another model \(a frpt with other weights"):
        search_files(str(birds), known, other, top=1, device="cpu")
    for top in (0, 12):  # the query is one of the twelve
        with pytest.raises(UserError, match=rf"top is {top}, but there are 11 images to find; choose 1 \.\.\. 11"):
            search_files(str(birds), known, model, top=top, device="cpu")
    with pytest.raises(UserError, match=r"no such file; make a gallery"):
        read_gallery(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no gallery")
    with pytest.raises(UserError, match=r"text\.npz cannot be read as a gallery"):
        read_gallery(tmp_path / "text.npz")
    np.savez(tmp_path / "else.npz", images=np.zeros(3))
    with pytest.raises(UserError, match=r"else\.npz cannot be read as a gallery"):
        read_gallery(tmp_path / "else.npz")
    with pytest.raises(UserError, match="holds no images"):
        read_gallery(rewritten(known, tmp_path / "empty.npz", names=np.array([], "U1")))
    with pytest.raises(UserError, match=r"names duck/0\.png twice"):
        read_gallery(rewritten(known, tmp_path / "twice.npz", names=np.array([*known.names, "duck/0.png"])))
    cut = read_gallery(rewritten(known, tmp_path / "cut.npz", embeddings=known.embeddings()[:5]))
    with pytest.raises(UserError, match=r"cut\.npz cannot be read as a gallery \(embeddings \(5, 96\)"):
        search_files(str(birds), cut, model, top=1, device="cpu")
    with pytest.raises(UserError, match=r"call it \S*birds\.npz"):
        write_gallery(str(birds), model, "birds.pt")
    with pytest.raises(UserError, match="no images in it"):
        write_gallery(str(tmp_path / "other"), model, tmp_path / "x.npz", device="cpu")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install segvit\[retrieve\]"):
        search_files(str(birds), known, model, top=1, device="cpu")
