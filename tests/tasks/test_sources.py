"""Which files are read, by what name, and which results would stand in each other's way."""

from __future__ import annotations

from pathlib import Path

import pytest

from segvit.contracts import UserError
from segvit.tasks.sources import check_names, find_images


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("photos/a.png", "photos/b/c.png", "photos/masks/a.png", "photos/masks/b/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path / "photos"


@pytest.mark.parametrize("pattern", ["", "**/*.png"])
def test_results_are_no_sources(photos: Path, pattern: str) -> None:
    found = find_images(str(photos / pattern), leave_out=photos / "b/../masks")
    assert found == {photos / "a.png": Path("a.png"), photos / "b/c.png": Path("b/c.png")}


def test_what_is_asked_for_by_name_is_read_wherever_results_go(photos: Path) -> None:
    masks = photos / "masks"
    assert find_images(str(masks / "a.png"), leave_out=masks) == {masks / "a.png": Path("a.png")}
    assert len(find_images(str(masks), leave_out=masks)) == len(find_images(str(masks), leave_out=photos)) == 2
    assert len(find_images(f"{photos / 'a.png'}\n{masks / 'a.png'}", leave_out=masks)) == 2


def test_absolute_and_relative_names_go_together(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos / "b")
    found = find_images(f"c.png\n{photos / 'a.png'}\n../masks/a.png")
    assert found == {
        Path("c.png"): Path("b/c.png"), photos / "a.png": Path("a.png"), Path("../masks/a.png"): Path("masks/a.png"),
    }  # fmt: skip


def test_pictures_and_frames_of_a_film_may_not_share_names(tmp_path: Path) -> None:
    film = tmp_path / "out" / "walk"  # a folder
    with pytest.raises(UserError, match="where the frames of a film go"):
        check_names([], [film, film / "000001.png"])
    with pytest.raises(UserError, match="where the frames of a film go"):
        check_names([film / "000001.png"], [film])
    check_names([], [film, film / "portrait.png", film / "12.png"])
