from xml.sax.saxutils import quoteattr

import numpy as np
import pytest

from segvit.contracts import UserError
from segvit.data.dataset import open_dataset
from segvit.data.formats.convert import convert
from tests.data.formats.maps import SIZE, assert_identical, example, photo
from tests.data.formats.outlines import keyhole, painted, runs

NAMES = ("road", "car", "sky & sea")  # in the order of the labels in <meta>


def xml(images, names=NAMES):
    listed = "".join(f"<label><name>{name.replace('&', '&amp;')}</name></label>" for name in names)
    meta = f"<meta><task><labels>{listed}</labels></task></meta>" if names else ""
    return f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>{meta}{images}</annotations>'


def image(name, shapes, **attributes):
    values = {"id": 0, "name": name, "width": SIZE[1], "height": SIZE[0], **attributes}
    written = " ".join(f"{key}={quoteattr(str(value))}" for key, value in values.items())
    return f"<image {written}>{''.join(shapes)}</image>"


def element(tag, label, **values):
    written = " ".join(f'{key}="{value}"' for key, value in values.items())
    return f"<{tag} label={quoteattr(label)} source='manual' occluded='0' {written}/>"


def polygon(label, points, **values):
    return element("polygon", label, points=";".join(f"{x:.2f},{y:.2f}" for x, y in points), **values)


def mask(label, region, **values):
    """Counts along the rows of the region's box."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    (top, bottom), (left, right) = rows[[0, -1]].tolist(), columns[[0, -1]].tolist()
    part = region[top : bottom + 1, left : right + 1]
    rle = ", ".join(map(str, runs(part.ravel())))
    size = {"width": part.shape[1], "height": part.shape[0]}
    return element("mask", label, rle=rle, left=left, top=top, **size, **values)


@pytest.mark.parametrize("kind", ["polygon", "mask"])
def test_round_trip(tmp_path, kind):
    root = tmp_path / "in"
    labelled = example({"train": root / "images", "val": root / "images"}, range(4))
    images = []
    for one in labelled:
        shapes = []
        for index in np.unique(one.ids[one.ids > 0]).tolist():
            region = one.ids == index
            name = NAMES[index - 1]
            shapes.append(polygon(name, keyhole(region)) if kind == "polygon" else mask(name, region))
        subset = "Validation" if one.split == "val" else "Train"
        images.append(image(one.image.name, shapes, subset=subset))
    (root / "annotations.xml").write_text(xml("".join(images)))
    result = convert(root, tmp_path / "out")
    assert (result.kind, result.images, result.notes) == ("cvat", {"train": 2, "val": 2}, {})
    assert_identical(tmp_path / "out", ("background", *NAMES), labelled)


def test_round_trip_by_z_order_above_255_classes(tmp_path):
    """Shapes in shuffled order, put right by z_order; the background is a label."""
    names = ["background", *(f"class {index}" for index in range(1, 300))]
    labelled = example({"train": tmp_path / "in"}, [0, 4, 255, 256, 299])
    images = []
    for one in labelled:
        shapes = [polygon(names[index], outline, z_order=z) for z, (index, outline) in enumerate(painted(one.ids))]
        np.random.default_rng(0).shuffle(shapes)
        images.append(image(one.image.name, shapes))
    (tmp_path / "in" / "annotations.xml").write_text(xml("".join(images), names))
    convert(tmp_path / "in" / "annotations.xml", tmp_path / "out")
    assert_identical(tmp_path / "out", names, labelled)


def test_points_of_skeletons_are_no_classes(tmp_path):
    photo(tmp_path / "a.jpg")
    meta = "<meta><label><name>person</name></label><label><name>knee</name><parent>person</parent></label></meta>"
    text = xml(meta + image("a.jpg", []), names=())
    (tmp_path / "a.xml").write_text(text)
    assert convert(tmp_path / "a.xml", tmp_path / "out").classes.names == ("background", "person")


def drawn(tmp_path, *shapes, names=("a", "b")):
    photo(tmp_path / "a.jpg")
    (tmp_path / "a.xml").write_text(xml(image("a.jpg", shapes), names))
    result = convert(tmp_path / "a.xml", tmp_path / "out")
    return open_dataset(tmp_path / "out").read("train", 0).mask, result


def test_boxes_and_ellipses_may_be_turned(tmp_path):
    found, _ = drawn(
        tmp_path,
        element("box", "a", xtl=10, ytl=8, xbr=20, ybr=12, rotation=90),
        element("ellipse", "b", cx=35.5, cy=20.5, rx=4, ry=9, rotation=90),
    )
    expected = np.zeros(SIZE, int)
    expected[5:15, 13:17] = 1  # turned about its centre (15, 10)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    expected[((x - 35) / 9) ** 2 + ((y - 20) / 4) ** 2 <= 1] = 2
    np.testing.assert_array_equal(found, expected)


def test_a_mask_that_reaches_out_of_the_image(tmp_path):
    found, _ = drawn(tmp_path, element("mask", "a", rle="0, 12", left=-1, top=-2, width=3, height=4))
    assert found.sum() == found[:2, :2].sum() == 4


def test_the_rest_is_counted_and_names_may_be_missing(tmp_path):
    found, result = drawn(
        tmp_path,
        element("polyline", "c", points="1,1;5,5"),
        element("points", "c", points="1,1"),
        element("points", "c", points="2,1"),
        element("tag", "night"),
        element("box", "zebra", xtl=10, ytl=8, xbr=20, ybr=12),
        element("box", "ape", xtl=0, ytl=0, xbr=4, ybr=4),
        names=(),
    )
    assert result.classes.names == ("background", "ape", "zebra")
    assert sorted(result.notes.values()) == [1, 1, 2]
    assert np.unique(found).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (element("polygon", "a", points="1,1;5,5"), r"a\.xml: image a\.jpg: polygon 0: 2 points but 3"),
        (element("polygon", "a", points="1,1;5,5;6"), "no list of numbers"),
        (element("polygon", "a", points="1,1;5,5;6,x"), "no list of numbers"),
        (element("polygon", "a"), "no list of numbers"),
        (element("polygon", "c", points="1,1;5,5;6,1"), r"class 'c' is not among those listed \(a, b\)"),
        (element("box", "a", xtl=1, ytl=2, xbr=3), "ybr is None but must be a number"),
        (element("box", "a", xtl=1, ytl=2, xbr="nan", ybr=4), "xbr is 'nan' but must be a number"),
        (element("ellipse", "a", cx=1, cy=2, rx=0, ry=4), "radius of 0 or less"),
        (element("mask", "a", rle="1, 2", left=0, top=0, width=2, height=2), "covers 3 pixels but 2x2 are 4"),
        (element("mask", "a", rle="1; 2", left=0, top=0, width=2, height=2), "rle is '1; 2' but must be whole numbers"),
        (element("mask", "a", rle="25", left=0, top=0, width=-5, height=-5), "the mask is -5x-5 pixels"),
        (element("mask", "a", rle="1", left=0.5, top=0, width=1, height=1), "left is 0.5 but must be a whole number"),
    ],
)
def test_wrong_shapes(tmp_path, shape, message):
    with pytest.raises(UserError, match=message) as caught:
        drawn(tmp_path, shape)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


BOMB = '<!DOCTYPE a [<!ENTITY x "xxxxxxxx"><!ENTITY y "&x;&x;&x;">]><annotations>&y;</annotations>'
OUTSIDE = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><annotations>&x;</annotations>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"a\.xml: has a DOCTYPE"),
        (OUTSIDE, "has a DOCTYPE"),
        ("<!DOCTYPE annotations><annotations/>", "has a DOCTYPE"),
        ("<annotations>", "not valid XML"),
        ('<?xml version="1.0" encoding="none-such"?><annotations/>', "not valid XML"),
        ("", "not valid XML"),
        ("<other/>", "begins with <other>, not <annotations>"),
        (xml("<track/>"), "tracks of a video"),
        (xml(""), "holds no annotated image"),
        (xml('<image name="a.jpg" width="52"/>'), "image a.jpg: height is None"),
        (xml(image("b.jpg", [])), "no image b.jpg below"),
        (xml(image("", [])), "the name of the image is ''"),
        (xml(image("a.jpg", [], width=7)), r"says \(height, width\) \(40, 7\)"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    photo(tmp_path / "a.jpg")
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        convert(tmp_path / "a.xml", tmp_path / "out", kind="cvat")
    assert "\n" not in str(caught.value)


def test_one_file_in_the_folder(tmp_path):
    with pytest.raises(UserError, match="no XML file in it"):
        convert(tmp_path, tmp_path / "out", kind="cvat")
    for name in ("a.xml", "b.xml"):
        (tmp_path / name).write_text(xml(""))
    with pytest.raises(UserError, match="2 XML files in it"):
        convert(tmp_path, tmp_path / "out", kind="cvat")
    with pytest.raises(UserError, match=r"c\.xml: no such file"):
        convert(tmp_path / "c.xml", tmp_path / "out", kind="cvat")
