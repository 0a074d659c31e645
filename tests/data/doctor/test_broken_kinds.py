"""Folders broken in every known way: the doctor names the kind, and with its YAML they are read as was meant.

A folder holds 6 + 2 images of 32 x 32 pixels with label maps of three classes unless its maker says otherwise; makers
write what is broken over it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from segvit.contracts import UserError
from segvit.data.dataset import open_dataset
from segvit.data.doctor.diagnose import diagnose
from segvit.data.doctor.survey import survey
from tests.data.doctor.surveys import blended, blob_maps, jpeg, label_maps
from tests.data.folders import save

COLORS = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]])
GRAY = np.array([0, 127, 255])
NAMES = "tree\nroad\nsky\n"
COLOR_CLASSES = "classes:\n" + "".join(
    f"  {i}: {{name: {name}, color: {color}}}\n"
    for i, (name, color) in enumerate(zip(NAMES.split(), COLORS.tolist(), strict=True))
)
FOLDERS = "".join(f"{split}: {{images: images/{split}, masks: masks/{split}}}\n" for split in ("train", "val"))
WHOLE = (6, 2)


class Folder:
    """A dataset on disk: its truth, and where its files lie."""

    def __init__(self, root: Path, maps=None, *, names: str | None = NAMES, yaml: str | None = None) -> None:
        self.root = root
        names_of = [*(f"train/{i}" for i in range(6)), "val/0", "val/1"]
        self.truth = dict(zip(names_of, maps or label_maps(8), strict=True))
        rng = np.random.default_rng(0)
        for name, labels in self.truth.items():
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            save(self.image(name), np.asarray(coarse.resize(labels.shape[::-1])))
        if names:
            (root / "classes.txt").write_text(names)
        if yaml:
            (root / "dataset.yaml").write_text(FOLDERS + yaml)

    def image(self, name: str) -> Path:
        return self.root / "images" / f"{name}.png"

    def mask(self, name: str) -> Path:
        return self.root / "masks" / f"{name}.png"

    def write(self, draw: Callable, names=None) -> None:
        """Write masks as `draw` makes them of label maps."""
        for name in names or self.truth:
            save(self.mask(name), np.asarray(draw(self.truth[name])))


def plain(labels):
    return labels.astype(np.uint8)


def binary(root):
    folder = Folder(root, label_maps(8, classes=2), names=None)
    folder.write(lambda labels: plain(255 * labels))
    return folder


def binary_named(root):
    folder = Folder(root, label_maps(8, classes=2), names="ground\nroad\n")
    folder.write(lambda labels: plain(255 * labels))
    return folder


def one_based(root):
    folder = Folder(root)
    folder.write(lambda labels: plain(labels + 1))
    return folder


def zero_is_other(root):
    folder = Folder(root, label_maps(8, classes=4))
    folder.write(plain)
    folder.truth = {name: np.array([255, 0, 1, 2])[labels] for name, labels in folder.truth.items()}
    return folder


def gray(root):
    folder = Folder(root)
    folder.write(lambda labels: plain(GRAY[labels]))
    return folder


def rgb(root):
    folder = Folder(root, yaml=COLOR_CLASSES)
    folder.write(lambda labels: plain(COLORS[labels]))
    return folder


def rgb_unnamed(root):
    folder = Folder(root, names=None)
    folder.write(lambda labels: plain(COLORS[labels]))
    # Nothing says which colour comes first, so the classes are in the order of their codes.
    folder.truth = {name: np.array([0, 2, 1])[labels] for name, labels in folder.truth.items()}
    return folder


def jpeg_gray(root):
    folder = Folder(root, blob_maps(8, classes=3))
    for name, labels in folder.truth.items():
        folder.mask(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(plain(GRAY[labels])).save(folder.mask(name).with_suffix(".jpg"), quality=90)
    return folder


def jpeg_rgb(root):
    folder = Folder(root, blob_maps(8, classes=3), yaml=COLOR_CLASSES)
    for name, labels in folder.truth.items():
        folder.mask(name).parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(plain(COLORS[labels]))
        picture.save(folder.mask(name).with_suffix(".jpg"), quality=95, subsampling=0)
    return folder


def jpeg_in_png(root):
    """PNGs made of JPEGs: the blur is in the values alone."""
    folder = Folder(root, blob_maps(8, classes=2), names=None)
    folder.write(lambda labels: jpeg(255 * labels, 90))
    return folder


def antialiased(root):
    folder = Folder(root, blob_maps(8, classes=3))
    folder.write(lambda labels: blended(blended(GRAY[labels], 0.5, "NEAREST"), 2, "BICUBIC"))
    folder.truth = {name: labels[::2, ::2].repeat(2, 0).repeat(2, 1) for name, labels in folder.truth.items()}
    return folder


def shifted(root):
    folder = Folder(root)
    folder.write(plain)
    folder.write(lambda labels: plain(labels[1:]), ["train/2", "val/0"])
    return folder


def turned(root):
    """The masks of two images were drawn on what the camera stored, not on what viewers show."""
    folder = Folder(root, label_maps(8, size=(32, 48)))
    folder.write(plain)
    for name in ("train/1", "train/4"):
        exif = Image.Exif()
        exif[274] = 6
        Image.open(folder.image(name)).save(folder.image(name), exif=exif)
    return folder


def missing(root):
    folder = Folder(root)
    folder.write(plain)
    folder.mask("train/0").unlink()
    folder.image("train/5").unlink()
    folder.mask("val/1").unlink()
    return folder


def leaked(root):
    folder = Folder(root)
    folder.write(plain)
    Image.open(folder.image("val/1")).resize((48, 48)).resize((32, 32)).save(folder.image("train/3"))
    return folder


def empty(root):
    folder = Folder(root)
    folder.write(plain)
    folder.write(lambda labels: plain(0 * labels + 255), ["train/1"])
    return folder


def corrupt_mask(root):
    folder = Folder(root)
    folder.write(plain)
    for name in ("train/3", "val/0"):
        folder.mask(name).write_bytes(folder.mask(name).read_bytes()[:60])
    return folder


def corrupt_image(root):
    folder = Folder(root)
    folder.write(plain)
    folder.image("train/2").write_bytes(b"not an image")
    return folder


def deep(root):
    folder = Folder(root, names=None)
    folder.write(lambda labels: np.array([0, 300, 40000], np.uint16)[labels])
    return folder


def palettes(root):
    """Every other file numbers the same colours the other way round."""
    folder = Folder(root)
    for i, (name, labels) in enumerate(folder.truth.items()):
        order = np.array([0, 1, 2] if i % 2 == 0 else [0, 2, 1])
        picture = Image.fromarray(plain(order[labels]))
        picture.putpalette([*COLORS[order].astype(np.uint8).ravel()])
        folder.mask(name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder.mask(name))
    return folder


def blue_first(root):
    table = "".join(f"{line[:-1]}, values: [{color}]}}\n" for line, color in zip(
        COLOR_CLASSES.splitlines()[1:], COLORS.tolist(), strict=True))  # fmt: skip
    folder = Folder(root, yaml=f"classes:\n{table}")
    folder.write(lambda labels: plain(COLORS[labels][..., ::-1]))
    return folder


def unknown(root):
    folder = Folder(root)
    folder.truth["train/4"][:3, :3] = 77
    folder.write(plain)
    folder.truth["train/4"][:3, :3] = 255
    return folder


def channels(root):
    folder = Folder(root)
    folder.write(plain)
    for name, labels in folder.truth.items():
        folder.image(name).unlink()
        folder.image(name).parent.mkdir(parents=True, exist_ok=True)
        np.savez(folder.image(name).with_suffix(".npz"), image=np.zeros((*labels.shape, 5), np.uint8))
    return folder


def unnamed(root):
    folder = Folder(root, names=None)
    folder.write(plain)
    return folder


class Case(NamedTuple):
    """A maker, what the doctor must say, how many images remain, and how exactly masks are read."""

    make: Callable
    kinds: set[str]
    counts: tuple[int, int] = WHOLE
    exact: float = 1.0
    serious: bool = True  # whether it is an error


CASES = [
    Case(binary, {"binary_255"}),
    Case(binary_named, {"binary_255"}),
    Case(one_based, {"one_based"}),
    Case(zero_is_other, {"zero_is_other"}),
    Case(gray, {"gray_levels"}),
    Case(rgb, {"rgb_masks"}),
    Case(rgb_unnamed, {"rgb_masks"}),
    Case(jpeg_gray, {"jpeg_masks", "gray_levels"}, exact=0.98),
    Case(jpeg_rgb, {"jpeg_masks", "rgb_masks"}, exact=0.98),
    Case(jpeg_in_png, {"antialiased_masks", "binary_255"}, exact=0.98),
    Case(antialiased, {"antialiased_masks", "gray_levels"}, exact=0.97),  # from 0 to 255 borders pass 127
    Case(shifted, {"size_mismatch"}, (5, 1)),
    Case(turned, {"size_mismatch"}, (4, 2)),
    Case(missing, {"images_without_mask", "masks_without_image"}, (4, 1)),
    Case(leaked, {"leak"}, (5, 2), serious=False),
    Case(empty, {"empty_mask"}, (5, 2), serious=False),
    Case(corrupt_mask, {"corrupt_mask"}, (5, 1)),
    Case(corrupt_image, {"corrupt_image"}, (5, 2)),
    Case(deep, {"sixteen_bit", "no_classes"}),
    Case(palettes, {"wrong_palette"}),
    Case(blue_first, {"wrong_palette"}),
    Case(unknown, {"unknown_values"}),
    Case(channels, {"channel_mismatch"}),
    Case(unnamed, {"no_classes"}),
]


def paste(folder):
    """Survey and diagnose a folder, and write the proposed YAML."""
    found = diagnose(survey(folder.root, remember=False, workers=1))
    assert found.proposal is not None
    (folder.root / "dataset.yaml").write_text(found.proposal)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.make.__name__)
def test_a_broken_folder_is_named_and_mended(tmp_path, case):
    folder = case.make(tmp_path)
    assert not case.serious or is_misread(folder)
    found = paste(folder)
    wanted = [finding for finding in found.findings if finding.kind in case.kinds]
    assert {finding.kind for finding in wanted} == case.kinds
    assert found.healthy != case.serious
    assert {finding.kind for finding in found.findings if finding.severity == "error"} <= case.kinds

    dataset, right, total = read_all(folder)
    assert (dataset.count("train"), dataset.count("val")) == case.counts
    assert right >= case.exact * total
    after = diagnose(survey(folder.root, remember=False, workers=1))
    assert after.healthy
    assert after.proposal is None


def is_misread(folder):
    """Whether a dataset cannot be read, or gives other ids than were meant."""
    try:
        _, right, total = read_all(folder)
    except UserError:
        return True
    return right < total


def read_all(folder):
    """The dataset, and how many of its pixels are as they were meant."""
    dataset = open_dataset(folder.root)
    right = total = 0
    for split in dataset.splits:
        for i in range(dataset.count(split)):
            stem = dataset.image_path(split, i).relative_to(folder.root / "images").with_suffix("").as_posix()
            mask = dataset.read(split, i).mask
            right += int((mask == folder.truth[stem]).sum())
            total += mask.size
    return dataset, right, total


def test_a_folder_without_val_keeps_a_part_of_train(tmp_path):
    folder = Folder(tmp_path, names=None)
    folder.write(plain)
    for kind in ("images", "masks"):
        for path in (tmp_path / kind / "train").iterdir():
            path.rename(tmp_path / kind / path.name)
        for path in (tmp_path / kind / "val").iterdir():
            path.unlink()
        for split in ("train", "val"):
            (tmp_path / kind / split).rmdir()
    paste(folder)
    dataset = open_dataset(tmp_path)
    assert dataset.count("train") + dataset.count("val") == 6
    assert dataset.count("val") >= 1
    assert diagnose(survey(tmp_path, remember=False, workers=1)).healthy


def test_what_was_mended_trains(tmp_path, monkeypatch):
    from segvit.tasks.dense import train
    from tests.tasks.tiny import experiment

    monkeypatch.setenv("SEGVIT_CACHE", str(tmp_path / "cache"))
    for make, words in ((binary_named, "stored as 0/255"), (jpeg_gray, "JPEG masks"), (palettes, "wrong palette")):
        folder = make(tmp_path / make.__name__)
        with pytest.raises(UserError, match=words):
            train(experiment(tmp_path / "refused", data=str(folder.root)))
        paste(folder)
        result = train(experiment(tmp_path / "runs" / make.__name__, data=str(folder.root), steps=2))
        assert result.metrics is not None
