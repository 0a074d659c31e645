"""Episodes: folds, fold files and what is wrong in them, draws that recur, pictures of the right size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segvit.contracts import Sample, UserError
from segvit.data import episodes
from segvit.data.dataset import open_dataset
from segvit.data.episodes import (
    Episode,
    Episodes,
    Fold,
    base_mask,
    benchmark_folds,
    binary,
    check_support,
    distort,
    find_objects,
    fit,
    open_folds,
)

DATA = open_dataset("synthetic:shapes?train=12&val=6&size=64")
NAMES = DATA.classes.names


def fold_file(folder: Path, text: str) -> str:
    (folder / "folds.yaml").write_text(text, encoding="utf-8")
    return str(folder / "folds.yaml")


def test_benchmarks_split_all_classes():
    for name, count in {"pascal": 20, "coco_fwb": 80, "coco_panet": 80}.items():
        folds = benchmark_folds(name)
        assert sorted(label for fold in folds for label in fold.novel) == list(range(1, count + 1))
        assert all(sorted(fold.base + fold.novel) == list(range(1, count + 1)) for fold in folds)
    assert benchmark_folds("coco_fwb")[1].novel[:3] == (2, 6, 10)
    with pytest.raises(UserError, match="unknown folds 'voc'"):
        benchmark_folds("voc")


def test_a_fold_file_has_names_and_ids(tmp_path):
    source = fold_file(tmp_path, f"folds:\n  - [{NAMES[2]}]\n  - [3, {NAMES[4]}]\n")
    assert open_folds(source, DATA.classes) == (Fold((3, 4), (2,)), Fold((2,), (3, 4)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("folds: [[1], [1]]", "lists .* twice"),
        ("folds: [[1], [cow]]", "'cow' is no class"),
        ("folds: [[1], [99]]", "99 is no class"),
        ("folds: [[1]]", "two or more lists"),
        ("{", "is not YAML"),
        ("folds: [{novel: [1], base: [1, 2]}]", "lists .* twice"),
        ("folds: [{novel: [1], base: [cow]}]", "'cow' is no class"),
        ("folds: [{novel: [1], others: [2]}]", "`novel` and `base` and nothing else"),
    ],
)
def test_wrong_fold_files(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        open_folds(fold_file(tmp_path, text), DATA.classes)


def test_a_fold_names_its_base_classes_itself(tmp_path):
    source = fold_file(tmp_path, f"folds: [{{novel: [{NAMES[2]}], base: [5, 3]}}]")
    assert open_folds(source, DATA.classes) == (Fold((3, 5), (2,)),)


def test_a_fold_file_may_be_text(tmp_path):
    (tmp_path / "folds.txt").write_text(f"{NAMES[2]}\n\n3, {NAMES[4]}\n", encoding="utf-8")
    assert open_folds(str(tmp_path / "folds.txt"), DATA.classes) == (Fold((3, 4), (2,)), Fold((2,), (3, 4)))


def folder_of_squares(folder):
    for kind in ("images", "masks"):
        (folder / kind / "train").mkdir(parents=True)
    for i in range(3):
        mask = np.zeros((20, 20), np.uint8)
        mask[: 4 + i, :10] = 1
        Image.fromarray(mask).save(folder / f"masks/train/{i}.png")
        Image.fromarray(np.full((20, 20, 3), 80 * i, np.uint8)).save(folder / f"images/train/{i}.png")
    (folder / "classes.txt").write_text("ground\nsquare\n", encoding="utf-8")
    (folder / "dataset.yaml").write_text(
        "classes: [ground, square]\ntrain: {images: images/train, masks: masks/train}\n", encoding="utf-8"
    )
    return open_dataset(folder)


def test_masks_are_counted_once_and_again_when_they_change(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGVIT_CACHE", str(tmp_path / "cache"))
    data, read = folder_of_squares(tmp_path / "data"), []
    decode = episodes.read_mask
    monkeypatch.setattr(episodes, "read_mask", lambda *arguments: read.append(1) or decode(*arguments))
    for _ in range(2):
        assert find_objects(data, "train", (1,), min_pixels=50) == {1: (1, 2)}
    assert len(read) == 3
    Image.fromarray(np.ones((20, 20), np.uint8)).save(tmp_path / "data/masks/train/0.png")
    assert find_objects(data, "train", (1,), min_pixels=50) == {1: (0, 1, 2)}
    assert len(read) == 6
    for file in (tmp_path / "cache/pixels").iterdir():
        file.write_bytes(file.read_bytes()[:20])  # cut short
    assert find_objects(data, "train", (1,), min_pixels=50) == {1: (0, 1, 2)}
    assert len(read) == 9


def test_a_mask_of_another_size_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGVIT_CACHE", str(tmp_path / "cache"))
    data = folder_of_squares(tmp_path / "data")
    Image.fromarray(np.ones((20, 10), np.uint8)).save(tmp_path / "data/masks/train/1.png")
    objects = find_objects(data, "train", (1,), min_pixels=1)
    with pytest.raises(UserError, match=r"1\.png"):
        Episodes(data, "train", objects).read(Episode(0, 1, (1,)))


def test_base_classes_are_numbered_from_one():
    mask = np.array([[0, 2, 5], [7, 255, 2]], np.uint8)
    assert base_mask(mask, (2, 7), 255).tolist() == [[0, 1, 0], [2, 255, 1]]


def test_benchmarks_need_their_classes():
    with pytest.raises(UserError, match=r"class id 20, the data only 0\.\."):
        open_folds("pascal", DATA.classes)
    with pytest.raises(UserError, match="no such fold file"):
        open_folds("nowhere.yaml", DATA.classes)


def test_objects_are_large_enough_and_images_with_novel_classes_left_out():
    found = find_objects(DATA, "train", (2, 3), min_pixels=30, without=(4,))
    for label, images in found.items():
        for i in range(12):
            mask = DATA.read("train", i).mask
            assert (i in images) == (np.sum(mask == label) >= 30 and not np.any(mask == 4))


def test_draws_recur_and_never_show_the_query_as_support():
    objects = {2: (0, 1, 2, 5), 3: (1, 4, 5)}
    sequence = Episodes(DATA, "train", objects, shots=2, seed=1)
    drawn = [sequence.draw(i) for i in range(40)]
    assert drawn == [sequence.draw(i) for i in range(40)]
    assert [episode.query for episode in drawn[:6]] == [0, 1, 2, 4, 5, 0]
    for query, label, supports in drawn:
        assert query not in supports
        assert len(set(supports)) == 2
        assert {query, *supports} <= set(objects[label])
    assert {episode.label for episode in drawn if episode.query == 1} == {2, 3}
    assert drawn != [replace(sequence, seed=2).draw(i) for i in range(40)]
    shuffled = [replace(sequence, shuffle=True).draw(i).query for i in range(10)]
    assert sorted(shuffled[:5]) == sorted(shuffled[5:]) == [0, 1, 2, 4, 5]
    assert shuffled[:5] != [0, 1, 2, 4, 5] or shuffled[5:] != [0, 1, 2, 4, 5]


def test_a_class_needs_a_query_and_supports():
    with pytest.raises(UserError, match=r"\(id 2\) has 1 usable images in train; a query and 1 supports need 2"):
        Episodes(DATA, "train", {2: (4,)})
    with pytest.raises(UserError, match="shots is 0"):
        Episodes(DATA, "train", {2: (4, 5)}, shots=0)


def test_a_support_is_not_the_query():
    sample = DATA.read("train", 0)
    with pytest.raises(UserError, match=r"support copy\.png equals the query train_00000"):
        check_support(sample, sample._replace(name="copy.png"))
    with pytest.raises(UserError, match="equals the query"):
        Episodes(DATA, "train", {2: (0, 1)}).read(Episode(0, 2, (0,)))


def test_masks_become_binary():
    assert binary(np.array([[2, 3, 255]], np.uint8), 3, 255).tolist() == [[0, 1, 255]]
    assert binary(np.array([[300, 65535]], np.uint16), 300, 65535).tolist() == [[1, 255]]


def test_a_tested_picture_is_fitted_and_padded():
    sample = Sample(np.full((30, 60, 3), 9, np.uint8), np.ones((30, 60), np.uint8))
    fitted = fit(sample, 49)
    assert fitted.image.shape == (49, 49, 3)
    assert (fitted.mask[:24, :48] == 1).all()
    assert fitted.mask[24:].min() == fitted.mask[:, 48:].min() == 255
    assert fitted.image[:24, :48].min() == 9
    assert fitted.image[24:].max() == 0


@pytest.mark.parametrize("side", [49, 97])
def test_a_distorted_picture_keeps_mask_and_image_together(side):
    mask = np.zeros((64, 80), np.uint8)
    mask[10:40, 20:60] = 1
    sample = Sample(np.repeat(mask[:, :, None] * 200, 3, 2), mask)
    for seed in range(8):
        found = distort(sample, side, np.random.default_rng(seed))
        assert found.image.shape == (side, side, 3)
        assert set(np.unique(found.mask)) <= {0, 1, 255}
        inside, outside = found.image[found.mask == 1], found.image[found.mask == 0]
        assert inside.mean() > 170
        assert outside.mean() < 40
