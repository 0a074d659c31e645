"""Every finding on surveys built by hand: its kind, its severity, its sentence, and what it is not said of."""

from dataclasses import replace

import numpy as np
import pytest

from segvit.data.doctor.balance import class_table
from segvit.data.doctor.diagnose import diagnose
from segvit.data.doctor.tables import Diagnosis, Finding
from tests.data.doctor.surveys import blended, blob_maps, jpeg, label_maps, mask_file, split, survey, train_and_val

COLORS = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]])
NAMES = ["tree", "road", "sky"]
COLOR_TABLE = "".join(
    f"  {i}: {{name: {name}, color: {color}, values: [{color}]}}\n"
    for i, (name, color) in enumerate(zip(NAMES, COLORS.tolist(), strict=True))
)
COLOR_YAML = f"classes:\n{COLOR_TABLE}"
MAPS = label_maps(8)
TWO = label_maps(8, classes=2)


def kinds(diagnosis, severity=None):
    return [finding.kind for finding in diagnosis.findings if severity in (None, finding.severity)]


def one(diagnosis, kind):
    (found,) = (finding for finding in diagnosis.findings if finding.kind == kind)
    return found


def errors(found):
    return kinds(diagnose(found), "error")


def change(found, name, i, **fields):
    """The survey with fields of one pair's image and mask replaced: image_error=..., mask_size=..."""
    part = next(part for part in found.splits if part.name == name)
    pair = part.pairs[i]
    for key, value in fields.items():
        what, _, field = key.partition("_")
        pair = replace(pair, **{what: replace(getattr(pair, what), **{field: value})})
    part = replace(part, pairs=(*part.pairs[:i], pair, *part.pairs[i + 1 :]))
    return replace(found, splits=tuple(part if other.name == name else other for other in found.splits))


def test_a_good_dataset_has_nothing_to_say():
    assert diagnose(train_and_val(MAPS, names=NAMES)) == Diagnosis((), None)


def test_a_good_dataset_of_colours_palettes_or_nearness_has_nothing_to_say():
    painted = [COLORS[labels] for labels in MAPS]
    palette = dict(enumerate(map(tuple, COLORS.tolist())))
    assert diagnose(train_and_val(painted, yaml=COLOR_YAML)) == Diagnosis((), None)
    assert diagnose(train_and_val(MAPS, yaml=COLOR_YAML, palettes=[palette])) == Diagnosis((), None)
    blurred = [jpeg(color) for color in painted]
    near = train_and_val(blurred, yaml=f"{COLOR_YAML}nearest: true\n", format="JPEG")
    assert diagnose(near) == Diagnosis((), None)


def test_two_classes_as_0_and_255_is_an_error_with_and_without_a_table():
    found = diagnose(train_and_val([255 * labels for labels in TWO]))
    assert found.findings[0].sentence == (
        "my_data: values {0, 255} in 8 of 8 masks: two-class masks stored as 0/255; write values: [255] for class 1"
    )
    named = diagnose(train_and_val([255 * labels for labels in TWO], names=["ground", "road"]))
    assert kinds(named) == ["binary_255"]
    assert "255 is ignored unless a class lists it" in named.findings[0].sentence
    assert not named.healthy


def test_0_and_255_of_many_classes_is_not_called_binary():
    assert "binary_255" not in errors(train_and_val([255 * labels for labels in TWO], names=NAMES))


def test_16_bit_masks_of_0_and_65535_are_binary_too():
    found = one(diagnose(train_and_val([65535 * labels for labels in TWO], mode="I;16")), "binary_255")
    assert "values: [65535] for class 1" in found.sentence


@pytest.mark.parametrize("names", [None, NAMES])
def test_ids_from_1(names):
    found = one(diagnose(train_and_val([labels + 1 for labels in MAPS], names=names)), "one_based")
    assert found.severity == "error"
    assert (
        "ids start at 1, 0 never occurs: values {1, 2, 3} in 8 masks; write values: [1] for class 0" in found.sentence
    )


def test_a_class_that_never_occurs_does_not_make_ids_start_at_1():
    found = diagnose(train_and_val([labels + 1 for labels in TWO], names=NAMES))
    assert kinds(found) == ["absent_class"]
    assert found.healthy


def test_zero_that_stands_for_no_class_is_said_as_a_guess_and_not_where_the_first_class_is_a_background():
    maps = label_maps(8, classes=4)
    found = one(diagnose(train_and_val(maps, names=NAMES)), "zero_is_other")
    assert "probably 0 means no class" in found.sentence
    assert errors(train_and_val(maps, names=["background", "road", "sky"])) == ["unknown_values"]


@pytest.mark.parametrize("names", [None, NAMES, ["tree", "road"]])
@pytest.mark.parametrize("levels", [[0, 127, 255], [0, 128, 255], [0, 100, 200]])
def test_grey_levels(names, levels):
    found = diagnose(train_and_val([np.array(levels)[labels] for labels in MAPS], names=names))
    assert errors(train_and_val([np.array(levels)[labels] for labels in MAPS], names=names)) == ["gray_levels"]
    assert "evenly spaced grey levels" in found.findings[0].sentence


def test_values_of_no_class_are_counted_and_their_masks_named():
    maps = [labels.copy() for labels in MAPS]
    maps[3][:4, :4] = 77
    found = one(diagnose(train_and_val(maps, names=NAMES)), "unknown_values")
    assert "values {77} are in no class: 0.195 % of the pixels, in 1 of 8 masks at least" in found.sentence
    assert found.files == ("masks/train/3.png",)


def test_colours_of_no_class_are_unknown_values_too():
    maps = [COLORS[labels] for labels in MAPS]
    maps[0][:8, :8] = [1, 2, 3]
    assert "colours {[1, 2, 3]} are in no class" in one(
        diagnose(train_and_val(maps, yaml=COLOR_YAML)), "unknown_values"
    ).sentence  # fmt: skip


def test_nothing_names_the_classes():
    found = diagnose(train_and_val(label_maps(8, classes=5)))
    assert kinds(found) == ["no_classes"]
    assert "the masks hold 0..4" in found.findings[0].sentence


@pytest.mark.parametrize("yaml", [None, f"classes: [{', '.join(NAMES)}]\n"])
def test_masks_painted_in_colours_where_numbers_are_expected(yaml):
    found = one(diagnose(train_and_val([COLORS[labels] for labels in MAPS], yaml=yaml)), "rgb_masks")
    assert found.severity == "error"
    assert "8 of 8 masks painted in 3 colours: [0, 128, 0] 34.4 %, [0, 0, 0] 33.6 %, [128, 0, 0] 32 %" in found.sentence


def test_numbers_where_colours_are_expected():
    found = diagnose(train_and_val(MAPS, yaml=COLOR_YAML))
    assert kinds(found) == ["numbers_not_colors"]
    assert "the masks hold the numbers {0, 1, 2}" in found.findings[0].sentence


def test_red_and_blue_exchanged_is_a_wrong_palette():
    found = diagnose(train_and_val([COLORS[labels][..., ::-1] for labels in MAPS], yaml=COLOR_YAML))
    assert kinds(found) == ["wrong_palette"]
    assert "red and blue exchanged" in found.findings[0].sentence


def test_palettes_that_give_a_colour_to_another_id_in_every_other_file():
    swapped = np.array([0, 2, 1])
    maps = [labels if i % 2 == 0 else swapped[labels] for i, labels in enumerate(MAPS)]
    palette = {i: tuple(color) for i, color in enumerate(COLORS.tolist())}
    other = {0: palette[0], 1: palette[2], 2: palette[1]}
    found = diagnose(train_and_val(maps, names=NAMES, palettes=[palette, other]))
    assert kinds(found) == ["wrong_palette"]
    assert "2 colours stand for different ids: [128, 0, 0] is 1 in masks/train/0.png and 2 in masks/train/1.png" in (
        found.findings[0].sentence
    )


def test_palettes_that_repeat_colours_or_only_differ_prove_nothing():
    black = dict.fromkeys(range(3), (0, 0, 0))
    assert not errors(train_and_val(MAPS, names=NAMES, palettes=[black, {**black, 1: (9, 9, 9)}]))
    one_way = {0: (0, 0, 0), 1: (1, 1, 1), 2: (2, 2, 2)}
    other_way = {0: (0, 0, 0), 1: (200, 0, 0), 2: (0, 200, 0)}
    assert not errors(train_and_val(MAPS, names=NAMES, palettes=[one_way, other_way]))


@pytest.mark.parametrize("quality", [50, 75, 95])
@pytest.mark.parametrize("levels", [[0, 255], [0, 127, 255], [0, 60, 120, 180, 240]])
def test_jpeg_masks_and_the_values_that_were_meant(quality, levels):
    maps = [jpeg(np.array(levels)[labels], quality) for labels in blob_maps(8, classes=len(levels))]
    found = one(diagnose(train_and_val(maps, format="JPEG")), "jpeg_masks")
    assert f"in 8 of 8 masks where {len(levels)} fill areas" in found.sentence
    assert "export the masks as PNG" in found.sentence


def test_jpeg_masks_of_ids_cannot_be_helped():
    maps = [jpeg(labels) for labels in blob_maps(8, classes=4)]
    found = diagnose(train_and_val(maps, names=[*NAMES, "sea"], format="JPEG"))
    assert kinds(found, "error") == ["jpeg_masks"]
    assert "cannot be told apart; JPEG changes pixel values, so export the masks as PNG" in found.findings[0].sentence
    assert "nearest" not in found.findings[0].sentence
    assert found.proposal is None


def test_interpolated_ids_cannot_be_helped():
    ids = np.array([0, 1, 4, 255])
    found = diagnose(train_and_val([blended(ids[labels], 0.5, "BILINEAR") for labels in blob_maps(8, classes=4)]))
    assert kinds(found, "error") == ["antialiased_masks"]
    assert found.proposal is None


def test_pictures_in_place_of_masks_cannot_be_helped():
    rng = np.random.default_rng(0)
    found = diagnose(train_and_val([rng.integers(0, 256, (64, 64)) for _ in range(8)]))
    assert (kinds(found, "error"), found.proposal) == (["too_many_values"], None)
    found = diagnose(train_and_val([rng.integers(0, 256, (64, 64)) for _ in range(8)], names=NAMES))
    assert (kinds(found, "error"), found.proposal) == (["unknown_values"], None)
    assert "probably the class table is not the one of these masks" in found.findings[0].sentence


@pytest.mark.parametrize("how", ["BILINEAR", "BICUBIC", "LANCZOS"])
@pytest.mark.parametrize("factor", [0.5, 1.5, 2])
def test_masks_resized_with_interpolation(how, factor):
    maps = [blended(np.array([0, 127, 255])[labels], factor, how) for labels in blob_maps(8, classes=3)]
    found = diagnose(train_and_val(maps, names=NAMES))
    assert kinds(found, "error") == ["antialiased_masks", "gray_levels"]
    assert "where 3 fill areas: {0, 127, 255}; probably they were resized" in found.findings[0].sentence


def test_many_rare_classes_are_not_called_interpolated():
    rng = np.random.default_rng(0)
    maps = [np.zeros((64, 64), int) for _ in range(12)]
    for labels in maps:
        for value in rng.choice(150, 12, replace=False):
            y, x, side = rng.integers(0, 56, 2).tolist() + [int(rng.integers(1, 20))]
            labels[y : y + side, x : x + side] = value
    assert "antialiased_masks" not in kinds(diagnose(train_and_val(maps)))
    assert "antialiased_masks" not in kinds(diagnose(train_and_val(maps, names=[f"c{i}" for i in range(100)])))


def test_16_bit_numbers_are_a_note_where_classes_list_them_and_an_error_beyond_65535():
    maps = [np.array([0, 1000, 40000])[labels] for labels in MAPS]
    yaml = "classes: {0: a, 1: {name: b, values: [1000]}, 2: {name: c, values: [40000]}}\n"
    found = diagnose(train_and_val(maps, yaml=yaml, mode="I;16"))
    assert [(finding.kind, finding.severity) for finding in found.findings] == [("sixteen_bit", "note")]
    assert "values up to 40,000 in 8 of 8 masks" in found.findings[0].sentence
    beyond = diagnose(train_and_val([100_000 * labels for labels in MAPS], mode="I", names=NAMES))
    assert (kinds(beyond, "error"), beyond.proposal) == (["values_beyond_range"], None)


@pytest.mark.parametrize("what", ["mask", "image"])
def test_files_that_cannot_be_read(what):
    empty = {f"{what}_error": "unknown or damaged format", f"{what}_size": None}
    found = one(diagnose(change(train_and_val(MAPS, names=NAMES), "val", 1, **empty)), f"corrupt_{what}")
    assert found.severity == "error"
    assert f"1 of 8 {what}s cannot be read: {what}s/val/1.png (unknown or damaged format)" in found.sentence


def test_sizes_that_differ_and_the_exif_turn_that_explains_it():
    good = train_and_val([labels[:, :24] for labels in MAPS], names=NAMES)
    plain = one(diagnose(change(good, "train", 0, image_size=(64, 48))), "size_mismatch")
    assert "images/train/0.png is 48x64 but masks/train/0.png is 24x32" in plain.sentence
    assert "EXIF" not in plain.sentence
    turned = one(diagnose(change(good, "train", 0, image_size=(24, 32), image_turned=True)), "size_mismatch")
    assert "all because an EXIF tag turns the image but not the mask" in turned.sentence


def test_images_and_masks_alone():
    train = replace(split("train", MAPS), images_alone=("x", "y"), masks_alone=("z", "0"))
    found = diagnose(survey(train, split("val", MAPS[:2]), names=NAMES))
    assert kinds(found) == ["images_without_mask", "masks_without_image", "same_stem"]
    assert "2 images without a mask: x of train, y of train;" in found.findings[0].sentence
    assert "1 name with two files, such as 0 of train;" in found.findings[2].sentence


def test_lines_of_a_list_without_a_file():
    train = replace(split("train", MAPS[:6]), lines_alone=("a b", "c"))
    found = diagnose(survey(train, split("val", MAPS[6:]), names=NAMES))
    assert kinds(found) == ["list_lines"]
    assert "the list of train has 2 lines without a file, such as 'a b', 'c'" in found.findings[0].sentence


def test_splits_without_pairs():
    train = replace(split("train", []), images_alone=("a_img",), masks_alone=("a_mask",))
    found = diagnose(survey(train, split("val", MAPS[:2]), names=NAMES))
    assert found.findings[0].kind == "no_pairs"
    assert "'a_img' and 1 mask such as 'a_mask' but no two of equal name" in found.findings[0].sentence
    assert found.proposal is None
    alike = replace(split("train", []), images_alone=("a", "b"), masks_alone=("x/a_L", "x/b_L", "x/c_L"))
    found = diagnose(survey(alike, split("val", MAPS[:2]), names=NAMES))
    assert "write a template such as masks: masks/train/x/{stem}_L.png" in found.findings[0].sentence
    missing = diagnose(survey(replace(split("train", []), images_alone=("a",)), names=NAMES))
    assert "train has 1 image but no masks in masks/train" in missing.findings[0].sentence


def test_how_many_images_are_enough():
    only_val = diagnose(survey(split("val", MAPS), names=NAMES))
    assert one(only_val, "too_few").severity == "error"
    lonely = diagnose(survey(split("train", MAPS[:1]), names=NAMES)).findings
    assert [(found.kind, found.severity) for found in lonely] == [("too_few", "warning")]
    without_val = one(diagnose(survey(split("train", MAPS), names=NAMES)), "too_few")
    assert without_val.severity == "warning"
    assert "val: 0.2" in without_val.sentence


def test_channels_that_are_not_as_described():
    yaml = "classes: [tree, road, sky]\nchannels: 4\n"
    found = one(diagnose(train_and_val(MAPS, yaml=yaml)), "channel_mismatch")
    assert "8 of 8 images do not have 4 channels: 8 with 3; write channels: 3" in found.sentence
    alpha = change(train_and_val(MAPS, names=NAMES), "train", 0, image_channels=4, image_mode="RGBA")
    assert not errors(alpha)
    assert errors(change(alpha, "train", 1, image_channels=7, image_format="TIFF")) == ["channel_mismatch"]


@pytest.mark.parametrize(("mode", "bits", "severity"), [("I;16", 16, "note"), ("I", 32, "warning"), ("F", 32, "error")])
def test_image_levels_without_a_natural_range(mode, bits, severity):
    good = train_and_val(MAPS, names=NAMES)
    assert (
        one(diagnose(change(good, "train", 0, image_mode=mode, image_bits=bits)), "range_missing").severity == severity
    )
    ranged = train_and_val(MAPS, yaml="classes: [tree, road, sky]\nrange: [0, 10]\n")
    assert not kinds(diagnose(change(ranged, "train", 0, image_mode=mode, image_bits=bits)))


def test_masks_of_which_all_is_ignored():
    maps = [*MAPS[:5], np.full((32, 32), 255), *MAPS[:2]]
    found = one(diagnose(train_and_val(maps, names=NAMES)), "empty_mask")
    assert (found.severity, found.files) == ("warning", ("masks/train/5.png",))
    assert "1 of 6 masks of train are ignored as a whole" in found.sentence
    nothing = one(diagnose(train_and_val([np.full((32, 32), 255)] * 8, names=NAMES)), "empty_mask")
    assert nothing.severity == "error"


def test_two_classes_of_which_some_masks_write_the_second_as_255():
    maps = [labels if i % 3 else 255 * labels for i, labels in enumerate(TWO)]
    found = one(diagnose(train_and_val(maps, names=["ground", "road"])), "mixed_binary")
    assert found.severity == "warning"
    assert "3 of 8 masks hold {0, 255} and 5 hold {0, 1}, none both" in found.sentence
    maps[0][0, 0] = 1
    assert "mixed_binary" not in kinds(diagnose(train_and_val(maps, names=["ground", "road"])))


def test_one_class_is_not_enough():
    found = one(diagnose(train_and_val([0 * labels for labels in MAPS], names=NAMES)), "only_one_class")
    assert found.severity == "error"
    assert "all labelled pixels of train are tree" in found.sentence


def test_classes_that_are_rare_absent_or_missing_from_val():
    maps = [np.zeros((256, 256), int) for _ in range(8)]
    for labels in maps:
        labels[:64] = 1
    maps[0][0, :3] = 2
    maps[7][0, :3] = 3
    found = diagnose(train_and_val(maps, names=["a", "b", "c", "d", "e"]))
    assert kinds(found) == ["absent_class", "never_in_val", "rare_class", "imbalance"]
    sentences = [finding.sentence for finding in found.findings]
    assert "2 classes without a pixel in train, so not learnt: d, e (in val only: d)" in sentences[0]
    assert "1 class of train without a pixel in val, so without a score: c" in sentences[1]
    assert "c 0.000763 % in 1 image;" in sentences[2]
    assert "a has 98,303 times the pixels of c" in sentences[3].replace("98,304", "98,303")
    assert found.healthy


def test_much_that_is_ignored():
    maps = [np.where(np.arange(32)[:, None] < 20, 255, labels) for labels in MAPS]
    found = diagnose(train_and_val(maps, names=NAMES))
    assert kinds(found) == ["many_ignored", "many_ignored"]
    assert "62.5 % of the pixels of train are ignored" in found.findings[0].sentence


def test_the_same_picture_in_train_and_val_and_twice_in_train():
    hashes = [0xF0F0F0F0F0F0F0F0, 0x123456789ABCDEF0, 0x0FEDCBA987654321, 0x0FEDCBA987654321]
    train = split("train", MAPS[:4], hashes=hashes)
    val = split("val", MAPS[:2], hashes=[0xF0F0F0F0F0F0F0F3, 0x00FF00FF00FF00FF])
    found = diagnose(survey(train, val, names=NAMES))
    assert [(finding.kind, finding.severity) for finding in found.findings] == [
        ("leak", "warning"),
        ("duplicates", "note"),
    ]
    assert found.findings[0].files == ("images/train/0.png", "images/val/0.png")
    assert "1 of 2 images of val look like an image of train (0 of 1 exactly)" in found.findings[0].sentence
    assert found.findings[1].files == ("images/train/2.png", "images/train/3.png")


def test_modes_and_sizes():
    good = train_and_val(MAPS, names=NAMES)
    small = change(good, "train", 0, image_size=(16, 40), mask_size=(16, 40), mask_mode="P")
    found = diagnose(small)
    severities = {finding.kind: finding.severity for finding in found.findings}
    assert severities == {"mixed_modes": "warning", "small_images": "warning", "mixed_sizes": "note"}
    assert "masks are stored in 2 modes: 7 L, 1 P" in one(found, "mixed_modes").sentence


def test_errors_come_first_and_name_the_dataset():
    found = diagnose(change(train_and_val([labels + 1 for labels in MAPS], names=NAMES), "train", 0, mask_mode="P"))
    assert kinds(found) == ["one_based", "mixed_modes"]
    assert found.findings[0].sentence.startswith("my_data: ids start at 1")
    assert not found.findings[1].sentence.startswith("my_data")
    assert all(isinstance(finding, Finding) and "\n" not in finding.sentence for finding in found.findings)


def test_the_class_table_counts_pixels_shares_and_images():
    raw = np.zeros((10, 10), int)
    raw[:2], raw[2], raw[3] = 1, 255, 9
    rows = class_table(survey(split("train", [raw, 0 * raw]), names=["a", "b"]))
    assert [tuple(row) for row in rows] == [
        ("train", 0, "a", 160, 160 / 180, 2), ("train", 1, "b", 20, 20 / 180, 1),
        ("train", 255, "ignored", 10, 0.05, 1), ("train", -1, "in no class", 10, 0.05, 1),
    ]  # fmt: skip
    assert rows[0].to_json()["share"] == 160 / 180
    assert class_table(survey(split("train", [raw]))) == []


def test_the_class_table_under_nearness_counts_as_decoding_does():
    raw = COLORS[MAPS[0]].copy()
    raw[0, 0] = [120, 10, 10]
    rows = class_table(survey(split("train", [raw]), yaml=f"{COLOR_YAML}nearest: true\n"))
    expected = np.bincount(np.where(np.arange(1024) == 0, 1, MAPS[0].ravel()), minlength=3)
    assert [row.pixels for row in rows[:3]] == expected.tolist()


def test_a_file_record_knows_what_the_array_held():
    assert mask_file(MAPS[0]).values == {i: int((MAPS[0] == i).sum()) for i in range(3)}
