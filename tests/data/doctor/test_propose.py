"""The proposed YAML: read back it gives the right ids, keeps what was right, and says why each line is there."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from segvit.data.description import Entry, parse_description
from segvit.data.doctor.balance import count_labels
from segvit.data.doctor.diagnose import diagnose
from segvit.data.doctor.tables import Survey
from tests.data.doctor.surveys import blob_maps, jpeg, label_maps, split, survey, train_and_val

COLORS = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]])
NAMES = ["tree", "road", "sky"]
MAPS = label_maps(8)
TWO = label_maps(8, classes=2)


def read_back(found: Survey):
    """The description that the proposal makes, and the proposal."""
    text = diagnose(found).proposal
    assert text is not None
    return parse_description(text, "dataset.yaml", found.source), text


def check_ids(found: Survey, maps):
    """The proposed rule gives every mask the pixels of its label map."""
    description, _ = read_back(found)
    judged = replace(found, classes=description.classes, rule=description.rule)
    for part, truth in zip(judged.splits, (maps[:-2], maps[-2:]), strict=True):
        counted = count_labels(part, judged)
        for i, labels in enumerate(truth):
            values, pixels = np.unique(labels, return_counts=True)
            assert counted.ids[counted.owner == i].tolist() == values.tolist()
            assert counted.pixels[counted.owner == i].tolist() == pixels.tolist()
    return description


def after(found: Survey):
    """What the doctor says when the proposal was pasted."""
    description, _ = read_back(found)
    pasted = replace(found, classes=description.classes, rule=description.rule, description=description)
    for name, reasons in {part.name: description.splits.get(part.name, ()) for part in found.splits}.items():
        left_out = {stem for entry in reasons for stem in entry.exclude}
        pasted = replace(pasted, splits=tuple(without(part, left_out) if part.name == name else part
                                              for part in pasted.splits))  # fmt: skip
    return diagnose(pasted)


def without(part, stems):
    return replace(
        part,
        pairs=tuple(pair for pair in part.pairs if pair.stem not in stems),
        images_alone=tuple(stem for stem in part.images_alone if stem not in stems),
        masks_alone=tuple(stem for stem in part.masks_alone if stem not in stems),
    )


@pytest.mark.parametrize(
    ("raws", "maps", "table"),
    [
        ([255 * labels for labels in TWO], TWO, {}),
        ([255 * labels for labels in TWO], TWO, {"names": ["ground", "road"]}),
        ([255 * labels for labels in TWO], TWO, {"names": ["road"]}),
        ([labels + 1 for labels in MAPS], MAPS, {}),
        ([labels + 1 for labels in MAPS], MAPS, {"names": NAMES}),
        ([np.array([0, 127, 255])[labels] for labels in MAPS], MAPS, {"names": NAMES}),
        ([np.array([0, 127, 255])[labels] for labels in MAPS], MAPS, {"names": ["tree", "road"]}),
        ([np.array([3, 7, 500])[labels] for labels in MAPS], MAPS, {"names": NAMES}),
        ([np.array([255, 1, 2, 3])[labels] for labels in label_maps(8, classes=4)],
         [np.array([255, 0, 1, 2])[labels] for labels in label_maps(8, classes=4)], {"names": NAMES}),
        (label_maps(8, classes=4), [np.array([255, 0, 1, 2])[labels] for labels in label_maps(8, classes=4)],
         {"names": NAMES}),
    ],
    ids=["binary", "binary_named", "binary_one_name", "one_based", "one_based_named", "gray", "gray_more_than_named",
         "in_order", "one_based_with_ignore", "zero_is_other"],
)  # fmt: skip
def test_numbers_become_the_right_ids_and_the_doctor_is_content(raws, maps, table):
    found = train_and_val(raws, **table)
    check_ids(found, maps)
    assert after(found).healthy


@pytest.mark.parametrize("kind", ["rgb", "exchanged", "numbers", "palettes"])
def test_colours_become_the_right_ids_where_the_table_has_them(kind):
    colored = "".join(
        f"  {i}: {{name: {name}, color: {color}, values: [{color}]}}\n"
        for i, (name, color) in enumerate(zip(NAMES, COLORS.tolist(), strict=True))
    )
    plain = "classes:\n" + "".join(f"{line.partition(', values')[0]}}}\n" for line in colored.splitlines())
    swapped = np.array([0, 2, 1])
    one = {i: tuple(color) for i, color in enumerate(COLORS.tolist())}
    raws = {
        "rgb": [COLORS[labels] for labels in MAPS],
        "exchanged": [COLORS[labels][..., ::-1] for labels in MAPS],
        "numbers": MAPS,
        "palettes": [labels if i % 2 == 0 else swapped[labels] for i, labels in enumerate(MAPS)],
    }[kind]
    palettes = [one, {0: one[0], 1: one[2], 2: one[1]}] if kind == "palettes" else None
    found = train_and_val(
        raws, yaml=plain if kind in ("rgb", "palettes") else f"classes:\n{colored}", palettes=palettes
    )
    description = check_ids(found, MAPS)
    assert description.classes.names == tuple(NAMES)
    assert after(found).findings == ()


def test_palettes_without_colours_in_the_table_keep_the_names_of_most_files():
    swapped = np.array([0, 2, 1])
    one = {0: (9, 0, 0), 1: (0, 9, 0), 2: (0, 0, 9)}
    found = train_and_val(
        [swapped[labels] if i == 2 else labels for i, labels in enumerate(MAPS)], names=NAMES,
        palettes=[one, one, {0: one[0], 1: one[2], 2: one[1]}, one, one, one, one, one],
    )  # fmt: skip
    check_ids(found, MAPS)
    assert "probably: as in most files" in read_back(found)[1]


def test_colours_without_names_get_classes_of_their_own_and_the_names_are_asked_for():
    description, text = read_back(train_and_val([COLORS[labels] for labels in MAPS], names=NAMES))
    assert description.classes.names == ("class_0", "class_1", "class_2")
    assert description.classes.palette == ((0, 0, 0), (0, 128, 0), (128, 0, 0))
    assert "# which colour is which class? The names were: tree, road, sky" in text


@pytest.mark.parametrize("colored", [False, True])
def test_jpegs_are_read_by_nearness(colored):
    maps = blob_maps(8, classes=3)
    levels = COLORS if colored else np.array([0, 127, 255])
    found = train_and_val([jpeg(levels[labels], 90) for labels in maps], format="JPEG")
    description, text = read_back(found)
    assert description.rule.nearest
    assert len(description.classes) == 3
    assert "nearest: true" in text
    assert after(found).healthy


def test_jpegs_of_listed_colours_keep_the_table():
    table = "".join(
        f"  {i}: {{name: {name}, color: {color}, values: [{color}]}}\n"
        for i, (name, color) in enumerate(zip(NAMES, COLORS.tolist(), strict=True))
    )
    maps = label_maps(8, seed=1)  # small areas, so that nothing but the table says which colours were meant
    found = train_and_val([jpeg(COLORS[labels], 50) for labels in maps], format="JPEG", yaml=f"classes:\n{table}")
    description, _ = read_back(found)
    assert yaml.safe_load(table) == {
        i: {"name": name, "color": list(color), "values": [list(color)]}
        for i, (name, color) in enumerate(zip(description.classes.names, description.classes.palette, strict=True))
    }
    assert description.rule.nearest


def test_nearness_lists_the_ignore_id_where_it_occurs():
    levels = np.array([0, 100, 200, 255])
    maps = blob_maps(8, classes=4)
    classes = "classes: {0: {name: a, values: [0]}, 1: {name: b, values: [100]}, 2: {name: c, values: [200]}}\n"
    description, _ = read_back(train_and_val([jpeg(levels[labels]) for labels in maps], format="JPEG", yaml=classes))
    assert description.ignored == (255,)


def test_what_is_right_is_kept():
    text = """
path: ../elsewhere
train:
  - {images: a, masks: "m/{stem}_x.png", list: lists/train.txt, exclude: ["old*"]}
  - {images: b, masks: m2}
val: {images: v, masks: vm}
classes: {0: {name: "off: road", color: [1, 2, 3], values: [3, 4]}, 1: {name: "yes", values: [5]}, 2: plain}
ignore: [9]
channels: 4
range: [0, 10000]
"""
    root = Path("my_data")
    description = parse_description(text, "dataset.yaml", root)
    raws = [np.array([3, 5, 9])[labels] for labels in MAPS]
    train = split("train", raws[:4])
    pairs = [replace(pair, image=replace(pair.image, path=f"{folder}/{pair.stem}.png", channels=4))
             for pair, folder in zip(train.pairs, "aabb", strict=True)]  # fmt: skip
    pairs[0] = replace(pairs[0], mask=replace(pairs[0].mask, error="damaged", size=None))
    pairs[3] = replace(pairs[3], image=replace(pairs[3].image, size=(1, 1)))
    val = split("val", raws[4:])
    val = replace(val, images="v", masks="vm", pairs=tuple(
        replace(pair, image=replace(pair.image, path=f"v/{pair.stem}.png", channels=4)) for pair in val.pairs
    ))  # fmt: skip
    train = replace(train, pairs=tuple(pairs), masks_alone=("z[1]",))
    found = Survey(description.root, root, (train, val), description.classes, description.rule, description=description)
    new, written = read_back(found)
    assert new.root == description.root
    assert new.splits == {
        "train": (
            Entry("a", "m/{stem}_x.png", "lists/train.txt", ("old*", "z[[]1]", "0")),
            Entry("b", "m2", None, ("z[[]1]", "3")),
        ),
        "val": (Entry("v", "vm"),),
    }
    assert (new.classes, new.values, new.ignored) == (description.classes, description.values, description.ignored)
    assert (new.channels, new.range) == (4, (0, 10000))
    assert "- '0' # the mask cannot be read" in written
    assert "- '3' # the image is 1x1, the mask 32x32" in written


def test_a_nearest_table_is_kept_as_written():
    text = "classes: {0: {name: a, values: [0, 30]}, 1: {name: b, values: [60]}}\nignore: [255]\nnearest: true\n"
    found = survey(replace(split("train", [60 * labels for labels in TWO]), images_alone=("x",)), yaml=text)
    new, _ = read_back(found)
    assert (new.values, new.ignored, new.rule.nearest) == (((0, 30), (60,)), (255,), True)


def test_folders_where_nothing_says_anything_are_described_as_found():
    root = Path("my_data")
    train, val = split("train", MAPS[:6]), split("val", MAPS[6:])
    apart, _ = read_back(Survey(root, root, (train, val)))
    assert apart.splits == {
        "train": (Entry("images/train", "masks/train"),), "val": (Entry("images/val", "masks/val"),)
    }  # fmt: skip
    flat = [replace(part, images="images", masks="masks") for part in (train, val)]
    together, _ = read_back(Survey(root, root, tuple(flat)))
    assert together.splits == {"train": (Entry("images", "masks"),)}
    assert together.val_part == 0.2
    assert together.root == root


def test_the_path_is_relative_to_where_the_yaml_lies():
    for source, path in (("a/b", "../c"), ("a/b/dataset.yaml", "../c"), ("a/c", ".")):
        found = replace(train_and_val([labels + 1 for labels in MAPS]), root=Path("a/c"), source=Path(source))
        assert yaml.safe_load(diagnose(found).proposal)["path"] == path


def test_a_missing_or_useless_val_becomes_a_part_of_train():
    description, text = read_back(survey(split("train", MAPS), names=NAMES))
    assert (description.val_part, list(description.splits)) == (0.2, ["train"])
    assert "val: 0.2 # a part of train, since there is no val" in text
    val = replace(split("val", []), images_alone=("0", "1"))
    description, _ = read_back(survey(split("train", MAPS), val, names=NAMES))
    assert description.val_part == 0.2
    assert description.splits["train"][0].exclude == ()  # 0 and 1 are files of val alone


def test_leaks_are_left_out_of_train_unless_that_is_most_of_it():
    hashes = [0x123456789ABCDEF0 * (i + 1) % 2**63 for i in range(6)]
    train = split("train", MAPS[:6], hashes=hashes)
    description, text = read_back(survey(train, split("val", MAPS[:2], hashes=hashes[2:4]), names=NAMES))
    assert description.splits["train"][0].exclude == ("2", "3")
    assert "- '2' # looks like images/val/0.png of val" in text
    assert description.val_part is None
    everything = survey(train, split("val", MAPS[:6], hashes=hashes), names=NAMES)
    description, text = read_back(everything)
    assert description.val_part == 0.2
    assert description.splits == {"train": (Entry("images/train", "masks/train"),)}
    assert "val held the images of train" in text


def test_masks_that_teach_nothing_are_left_out():
    maps = [*MAPS[:5], np.full((32, 32), 255), *MAPS[:2]]
    description, text = read_back(train_and_val(maps, names=NAMES))
    assert description.splits["train"][0].exclude == ("5",)
    assert "no pixel is labelled" in text


def test_values_of_no_class_are_ignored_with_a_question():
    maps = [labels.copy() for labels in MAPS]
    maps[3][:4, :4] = 77
    expected = [np.where(labels == 77, 255, labels) for labels in maps]
    assert check_ids(train_and_val(maps, names=NAMES), expected).ignored == (77,)
    assert "  - 77 # look: in no class, 16 pixels in 1 mask\n" in read_back(train_and_val(maps, names=NAMES))[1]


def test_channels_are_as_the_images_have_them():
    description, _ = read_back(train_and_val(MAPS, yaml="classes: [tree, road, sky]\nchannels: 4\n"))
    assert description.channels == 3


@pytest.mark.parametrize("count", [0, 8])
def test_no_yaml_where_none_can_help(count):
    broken = [replace(pair, mask=replace(pair.mask, error="damaged", size=None)) for pair in split("train", MAPS).pairs]
    found = survey(replace(split("train", MAPS), pairs=tuple(broken[:count])), names=NAMES)
    assert diagnose(found).proposal is None
    assert not diagnose(found).healthy
