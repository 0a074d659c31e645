"""What a dataset YAML says, apart from its files; the errors are in test_dataset.py."""

import numpy as np
import pytest

from segvit.contracts import UserError
from segvit.data.decode import UNKNOWN
from segvit.data.description import Entry, label_rule, parse_description, read_class_file, read_description

FULL = """
path: files
train:
  - {images: a, masks: b, list: l.txt, exclude: [x, "bad_*"]}
  - {images: c, masks: "d/{stem}_m.png"}
val: 0.25
classes: [{name: road, values: [7, 8]}, {name: car, values: [9]}]
ignore: [0]
nearest: true
channels: 4
range: [0, 10000.5]
"""


def test_everything_a_description_can_say(tmp_path):
    found = parse_description(FULL, "here", tmp_path)
    assert found.root == tmp_path / "files"
    assert found.splits == {"train": (Entry("a", "b", "l.txt", ("x", "bad_*")), Entry("c", "d/{stem}_m.png"))}
    assert (found.val_part, found.channels, found.range) == (0.25, 4, (0.0, 10000.5))
    assert found.classes.names == ("road", "car")
    assert found.rule.nearest
    assert found.rule.table[[0, 3, 4, 7, 8, 9, 255]].tolist() == [255, 255, 0, 0, 0, 1, 1]
    (tmp_path / "d.yaml").write_text(FULL)
    assert read_description(tmp_path / "d.yaml").splits == found.splits


def test_what_a_short_description_means(tmp_path):
    found = parse_description("val: {images: a, masks: b}\nclasses: {0: x, 1: y}", "here", tmp_path)
    assert found.root == tmp_path
    assert found.splits == {"val": (Entry("a", "b"),)}
    assert (found.val_part, found.channels, found.range, found.rule.nearest) == (None, 3, None, False)
    assert found.rule.table[[0, 1, 2, 255]].tolist() == [0, 1, UNKNOWN, 255]


def test_messages_name_the_place(tmp_path):
    with pytest.raises(UserError, match=r"^here: train: entry 2: unknown keys \['mask'\]"):
        parse_description("train: [{images: a, masks: b}, {images: a, mask: b}]\nclasses: [x]", "here", tmp_path)
    with pytest.raises(UserError, match=r"^here: not valid YAML") as caught:
        parse_description("a: [", "here", tmp_path)
    assert "\n" not in str(caught.value)


def test_rules_of_numbers_and_colours():
    numbers = label_rule([[0], [10, 20]], [30], 255, "here", nearest=True)
    assert numbers.table[[4, 5, 6, 15, 25, 26, 65535]].tolist() == [0, 0, 1, 1, 1, 255, 255]
    colors = label_rule([[(0, 0, 0)], [(255, 0, 0)]], [], 255, "here", nearest=True)
    assert colors.nearest
    assert colors.codes.tolist() == [0, 255 << 16]
    assert numbers.dtype == np.uint8
    assert label_rule([[0]], [], 65535, "here").dtype == np.uint16
    with pytest.raises(UserError, match="no class has values, so there is no nearest one"):
        label_rule([[], []], [], 255, "here", nearest=True)


def test_class_files(tmp_path):
    (tmp_path / "classes.txt").write_text("road\t128 64 128\ncar\n")
    classes, values = read_class_file(tmp_path / "classes.txt")
    assert classes.names == ("road", "car")
    assert classes.palette[0] == (128, 64, 128)
    assert values == [[0], [1]]
