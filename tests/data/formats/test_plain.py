import numpy as np
import pytest
import yaml
from PIL import Image

from segvit.contracts import Classes, Sample, UserError
from segvit.data.dataset import open_dataset
from segvit.data.formats.plain import plain_folder, write_dataset
from segvit.palette import generate_palette
from tests.data.folders import save, two_folders

CLASSES = Classes(("yes", "caf\u00e9", "a: b"), generate_palette(3))
MASK = np.array([[0, 1], [2, 255]], np.uint8)
PIXELS = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)


def fill(out, *, classes=CLASSES, mask=MASK, **options):
    with plain_folder(out, classes, **options) as writer:
        writer.add("train", "sub/a", PIXELS, mask)


def test_what_is_written_opens_as_a_dataset(tmp_path):
    fill(tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.classes == CLASSES
    assert dataset.splits == ("train",)
    sample = dataset.read("train", 0)
    np.testing.assert_array_equal(sample.image, PIXELS)
    np.testing.assert_array_equal(sample.mask, MASK)
    with Image.open(tmp_path / "out" / "masks" / "train" / "sub" / "a.png") as picture:
        assert picture.mode == "P"
        assert tuple(picture.getpalette()[3:6]) == CLASSES.palette[1]


@pytest.mark.parametrize("count", [1, 2, 16, 255, 256, 300])
def test_every_id_survives(tmp_path, count):
    classes = Classes(tuple(map(str, range(count))), generate_palette(count))
    mask = np.array([[*range(count), classes.ignore_index]], classes.dtype)
    with plain_folder(tmp_path / "out", classes) as writer:
        writer.add("val", "a", np.zeros((*mask.shape, 3), np.uint8), mask)
    read = open_dataset(tmp_path / "out").read("val", 0).mask
    assert read.dtype == classes.dtype
    np.testing.assert_array_equal(read, mask)


def test_an_error_leaves_nothing_behind(tmp_path):
    fill(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="the split 'extra' has no place"):
        fill_twice(tmp_path / "out", "extra", overwrite=True)
    with pytest.raises(UserError, match="the split 'extra' has no place"):
        fill_twice(tmp_path / "new", "extra")
    assert contents(tmp_path) == before


def fill_twice(out, split, **options):
    with plain_folder(out, CLASSES, **options) as writer:
        writer.add("train", "b", PIXELS, MASK)
        writer.add(split, "b", PIXELS, MASK)


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_failed_exchange_brings_the_old_folder_back(tmp_path, monkeypatch):
    fill(tmp_path / "out")
    rename = type(tmp_path).rename

    def failing(path, target):
        if path.name == "new":
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", failing)
    with pytest.raises(OSError, match="no"):
        fill(tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (tmp_path / "out" / "dataset.yaml").is_file()


def test_what_stands_in_the_way(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    fill(out)  # an empty folder does not
    with pytest.raises(UserError, match="is not empty; give another folder, or overwrite it"):
        fill(out)
    fill(out, mask=MASK * 0, overwrite=True)
    assert open_dataset(out).read("train", 0).mask.max() == 0
    (out / "thesis.txt").write_text("")
    with pytest.raises(UserError, match=r"holds thesis\.txt, which a conversion never wrote"):
        fill(out, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        fill(out / "thesis.txt")


COLORS = {"road": [[128, 64, 128], [1, 2, 3]], "car": [[0, 0, 142]]}


def colored(root):
    """Merged colours, one to ignore, and the same stem in two folders."""
    rng = np.random.default_rng(1)
    raw = np.array([[128, 64, 128], [1, 2, 3], [0, 0, 142], [9, 9, 9]], np.uint8)
    expected = {}
    for name in ("a/x", "b/x"):
        choice = rng.integers(0, 4, (7, 9))
        save(root / "pictures" / f"{name}.jpg", rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        save(root / "labels" / f"{name}.png", raw[choice])
        expected[name] = np.array([0, 0, 1, 255], np.uint8)[choice]
    classes = {index: {"name": name, "values": values} for index, (name, values) in enumerate(COLORS.items())}
    entries = {"classes": classes, "ignore": [[9, 9, 9]], "train": {"images": "pictures", "masks": "labels"}}
    (root / "dataset.yaml").write_text(yaml.safe_dump(entries))
    return expected


def test_colours_and_merged_classes_become_ids(tmp_path):
    expected = colored(tmp_path / "in")
    source = open_dataset(tmp_path / "in")
    calls = []
    counts = write_dataset(source, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert counts == {"train": 2}
    assert calls == [(1, 2), (2, 2)]
    result = open_dataset(tmp_path / "out")
    assert result.classes == source.classes
    for i in range(2):
        sample = result.read("train", i)
        stem = sample.name.removeprefix("images/train/").removesuffix(".jpg")
        np.testing.assert_array_equal(sample.mask, expected[stem])
        copy, original = tmp_path / "out" / sample.name, tmp_path / "in" / "pictures" / f"{stem}.jpg"
        assert copy.read_bytes() == original.read_bytes()


def test_16_bit_ids(tmp_path):
    root = two_folders(tmp_path / "in", counts={"train": 1, "val": 1})
    (root / "classes.txt").write_text("".join(f"class {i}\n" for i in range(300)))
    for split in ("train", "val"):
        save(root / "masks" / split / "0.png", np.array([[0, 299, 65535, 256]], np.uint16))
        save(root / "images" / split / "0.png", np.zeros((1, 4, 3), np.uint8))
    write_dataset(open_dataset(root), tmp_path / "out")
    read = open_dataset(tmp_path / "out").read("val", 0).mask
    assert read.tolist() == [[0, 299, 65535, 256]]


def test_generated_images_have_no_files(tmp_path):
    source = open_dataset("synthetic:shapes?train=2&val=1&size=24")
    write_dataset(source, tmp_path / "out")
    result = open_dataset(tmp_path / "out")
    for split in source.splits:
        for i in range(source.count(split)):
            for ours, theirs in zip(result.read(split, i)[:2], source.read(split, i)[:2], strict=True):
                np.testing.assert_array_equal(ours, theirs)


class FourChannels:
    """A dataset of four channels that is not made of files."""

    classes, splits, channels, levels = CLASSES, ("val",), 4, None

    def count(self, split):
        return 1

    def name(self, split, i):
        return "one"

    def read(self, split, i):
        return Sample(np.arange(16, dtype=np.uint8).reshape(2, 2, 4), MASK, "one")


def test_other_channels_are_kept(tmp_path):
    write_dataset(FourChannels(), tmp_path / "out")
    result = open_dataset(tmp_path / "out")
    assert result.channels == 4
    np.testing.assert_array_equal(result.read("val", 0).image, FourChannels().read("val", 0).image)


def test_raw_levels_are_kept(tmp_path):
    root = two_folders(tmp_path / "in", counts={"train": 1})
    save(root / "images" / "train" / "0.png", np.linspace(0, 4000, 20 * 24).reshape(20, 24).astype(np.uint16))
    entries = {"train": {"images": "images/train", "masks": "masks/train"}, "channels": 1, "range": [0, 4000]}
    (root / "dataset.yaml").write_text(yaml.safe_dump({**entries, "classes": ["a", "b", "c"]}))
    source = open_dataset(root)
    write_dataset(source, tmp_path / "out")
    first, second = source.read("train", 0), open_dataset(tmp_path / "out").read("train", 0)
    assert second.image.shape == (20, 24, 1)
    np.testing.assert_array_equal(first.image, second.image)


def test_the_source_is_not_overwritten(tmp_path):
    root = two_folders(tmp_path / "in", counts={"train": 1})
    (root / "dataset.yaml").write_text(
        yaml.safe_dump({"train": {"images": "images/train", "masks": "masks/train"}, "classes": ["a", "b", "c"]})
    )
    (root / "classes.txt").unlink()
    (tmp_path / "link").symlink_to(root)
    for out in (root, root / "images" / "..", tmp_path / "link"):
        with pytest.raises(UserError, match="which is to be converted; write to another folder"):
            write_dataset(open_dataset(root), out, overwrite=True)
    assert open_dataset(root).count("train") == 1
