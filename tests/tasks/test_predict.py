"""`segvit predict` over many files: films, large images, and going on where a run was stopped."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from segvit.cli import main
from segvit.contracts import InputSpec, UserError
from segvit.data.video import read_film, write_film
from segvit.inference.predictor import Predictor
from segvit.model_folder import load_model, save_model
from segvit.tasks import predict
from segvit.zoo import create_model
from tests.tasks.tiny import OPTIONS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    network = create_model("segvit_vit_tiny", num_classes=4, spec=InputSpec(scale=(64, 32)), **OPTIONS)
    save_model(network, folder)
    return folder


def photos(folder: Path, count: int = 3, size: tuple[int, int] = (40, 50)) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def run(*arguments: object) -> None:
    main(["predict", *map(str, arguments)])


def labels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}


def test_a_folder_in_a_stream_gives_what_single_calls_give(model: Path, tmp_path: Path) -> None:
    source = photos(tmp_path / "photos")
    run(source, "--model", model, "--out", tmp_path / "out", "--areas")
    segment = Predictor(load_model(model))
    for path in source.iterdir():
        np.testing.assert_array_equal(labels(tmp_path / "out" / path.name), segment(path).labels)
        assert json.loads((tmp_path / "out" / f"{path.stem}.json").read_text())["name"] == str(path)


def test_resume_does_the_rest(model: Path, tmp_path: Path) -> None:
    source = photos(tmp_path / "photos")
    out = tmp_path / "out"
    run(source, "--model", model, "--out", out)
    (out / "1.png").unlink()
    before = stamps(out)
    run(source, "--model", model, "--out", out, "--resume")
    after = stamps(out)
    assert sorted(after) == ["0.png", "1.png", "2.png"]
    assert {name: after[name] for name in before} == before


def test_resume_does_not_take_another_models_maps_for_its_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run is one with windows, the second one without is stopped, the third goes on."""
    source, out = photos(tmp_path / "photos"), tmp_path / "out"
    run(source, "--model", model, "--out", out, "--window", 16, "--overlay")
    (out / "mine.png").write_bytes(b"not ours")
    before = stamps(out)

    def stop(*arguments: object) -> None:
        raise UserError("no space left on the disk")

    with monkeypatch.context() as patch:
        patch.setattr(predict, "write_prediction", stop)
        with pytest.raises(SystemExit):
            run(source, "--model", model, "--out", out, "--overlay")
    assert list(stamps(out)) == ["mine.png"]
    run(source, "--model", model, "--out", out, "--overlay", "--resume")
    after = stamps(out)
    assert sorted(after) == sorted(before)
    assert [name for name in before if after[name] == before[name]] == ["mine.png"]
    np.testing.assert_array_equal(labels(out / "0.png"), Predictor(load_model(model))(source / "0.png").labels)


def test_resume_knows_images_by_path_size_and_time(model: Path, tmp_path: Path) -> None:
    first, out = photos(tmp_path / "a"), tmp_path / "out"
    run(first, "--model", model, "--out", out)
    before = stamps(out)
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(first / "1.png")  # edited
    second = photos(tmp_path / "b", 1, (20, 60))  # has a 0.png too
    run(second, "--model", model, "--out", out, "--resume")
    assert labels(out / "0.png").shape == (20, 60)
    run(first, "--model", model, "--out", out, "--resume")
    assert [labels(out / f"{number}.png").shape for number in range(3)] == [(40, 50), (30, 20), (40, 50)]
    assert stamps(out)["2.png"] == before["2.png"]


def test_older_records_do_not_say_what_is_done(model: Path, tmp_path: Path) -> None:
    source, out = photos(tmp_path / "photos", 1), tmp_path / "out"
    run(source, "--model", model, "--out", out)
    record = json.loads((out / predict.RECORD).read_text())
    del record["images"]
    (out / predict.RECORD).write_text(json.dumps(record))
    before = stamps(out)
    run(source, "--model", model, "--out", out, "--resume")
    assert stamps(out)["0.png"] > before["0.png"]


def test_results_below_the_source_are_no_images_of_the_next_run(model: Path, tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 2)
    for options in ([], ["--resume"]):
        run(source, "--model", model, "--out", source / "masks", *options)
    assert sorted(path.name for path in (source / "masks").iterdir()) == [predict.RECORD, "0.png", "1.png"]


def test_resume_refuses_what_was_made_otherwise(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = photos(tmp_path / "photos", 1)
    run(source, "--model", model, "--out", tmp_path / "out")
    with pytest.raises(SystemExit):
        run(source, "--model", model, "--out", tmp_path / "out", "--flip", "--resume")
    assert "was made with another views; choose another --out" in capsys.readouterr().err
    (tmp_path / "out" / predict.RECORD).unlink()
    with pytest.raises(SystemExit):
        run(source, "--model", model, "--out", tmp_path / "out", "--resume")
    assert "does not say how its files were made" in capsys.readouterr().err


def test_an_unreadable_picture_is_left_out(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = photos(tmp_path / "photos")
    (source / "1.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        run(source, "--model", model, "--out", tmp_path / "out")
    assert "1 images were left out" in capsys.readouterr().err
    assert sorted(stamps(tmp_path / "out")) == ["0.png", "2.png"]


def test_a_full_disk_is_said_and_stops(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise UserError("no space left on the disk")

    monkeypatch.setattr(predict, "write_prediction", full)
    with pytest.raises(SystemExit):
        run(photos(tmp_path / "photos"), "--model", model, "--out", tmp_path / "out")
    assert stamps(tmp_path / "out") == {}


def test_windows_at_the_own_resolution(model: Path, tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 1, (70, 90))
    run(source, "--model", model, "--out", tmp_path / "out", "--window", 32, "--stride", 16)
    network = load_model(model)
    network.spec = InputSpec(window=(32, 32), stride=(16, 16))
    np.testing.assert_array_equal(labels(tmp_path / "out" / "0.png"), Predictor(network)(source / "0.png").labels)


def test_a_large_tiff_becomes_a_tiff(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "LARGE", 5000)
    pixels = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", tile=(32, 32))
    run(tmp_path / "a.tif", "--model", model, "--out", tmp_path / "out", "--window", 32, "--areas")
    network = load_model(model)
    network.spec = InputSpec(window=(32, 32), stride=(24, 24))
    expected = Predictor(network)(pixels).labels
    np.testing.assert_array_equal(labels(tmp_path / "out" / "a.tif"), expected)
    areas = json.loads((tmp_path / "out" / "a.json").read_text())
    assert {row["id"]: row["pixels"] for row in areas["classes"]} == {
        i: count for i, count in enumerate(np.bincount(expected.ravel())) if count
    }


def test_a_film_becomes_numbered_maps_and_goes_on(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with write_film(tmp_path / "walk.mp4", Fraction(8)) as add:
        for _ in range(5):
            add(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    out = tmp_path / "out"
    run(tmp_path / "walk.mp4", "--model", model, "--out", out, "--overlay")
    frames = stamps(out / "walk")
    assert sorted(frames) == [f"{number:06}.png" for number in range(1, 6)]
    film = read_film(out / "walk_overlay.mp4")
    assert (film.frames, film.rate) == (5, 8)
    lost = labels(out / "walk" / "000003.png")
    (out / "walk" / "000003.png").unlink()
    run(tmp_path / "walk.mp4", "--model", model, "--out", out, "--overlay", "--resume")
    again = stamps(out / "walk")
    np.testing.assert_array_equal(labels(out / "walk" / "000003.png"), lost)
    assert {name: again[name] for name in again if name != "000003.png"} == {
        name: frames[name] for name in frames if name != "000003.png"
    }


def test_a_film_that_was_replaced_leaves_no_old_frames(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for count, size in ((5, (48, 64)), (3, (64, 48))):
        with write_film(tmp_path / "walk.mp4", Fraction(8)) as add:
            for _ in range(count):
                add(np.zeros((*size, 3), np.uint8))
        run(tmp_path / "walk.mp4", "--model", model, "--out", out, "--overlay", "--areas", "--resume")
        (out / "walk" / "notes.png").write_bytes(b"not ours")
    frames = [f"{number:06}.{kind}" for number in range(1, 4) for kind in ("json", "png")]
    assert sorted(path.name for path in (out / "walk").iterdir()) == [*frames, "notes.png"]
    assert labels(out / "walk" / "000003.png").shape == (64, 48)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stride", "16"], "stride goes with window"),
        (["--window", "16", "--stride", "32"], "there are gaps"),
        (["--window", "1,2,3"], "one side or height and width"),
    ],
)
def test_wrong_options_are_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], words: str
) -> None:
    with pytest.raises(SystemExit):
        run(photos(tmp_path / "photos", 1), "--model", model, "--out", tmp_path / "out", *options)
    assert words in capsys.readouterr().err


def test_what_special_files_do_not_have(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(predict, "LARGE", 100)
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((40, 40, 3), np.uint8), photometric="rgb")
    for option, words in (("--overlay", "has no overlay"), ("--scores", "single pictures only"), ("--flip", "at once")):
        with pytest.raises(SystemExit):
            run(tmp_path / "a.tif", "--model", model, "--out", tmp_path / option, "--window", 32, option)
        assert words.replace("at once", "looked at once") in capsys.readouterr().err


def test_a_large_image_that_cannot_be_read_in_parts_is_left_out_with_the_remedy(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(predict, "LARGE", 5000)
    source = photos(tmp_path / "photos", 1)
    planes = np.zeros((3, 70, 90), np.uint8)
    tifffile.imwrite(source / "large.tif", planes, photometric="rgb", planarconfig="separate")
    tifffile.imwrite(source / "small.tif", planes[:, :40], photometric="rgb", planarconfig="separate")
    (source / "broken.tif").write_bytes(b"no tiff")
    with pytest.raises(SystemExit):
        run(source, "--model", model, "--out", tmp_path / "out", "--window", 32)
    told = capsys.readouterr().err
    assert "large.tif: each channel is a plane of its own; save it with interleaved channels" in told
    assert "2 images were left out" in told
    assert sorted(stamps(tmp_path / "out")) == ["0.png", "small.png"]
