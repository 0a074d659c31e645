"""The zero-shot splits: sizes, agreement with the data descriptions, and ids looked up by name."""

from __future__ import annotations

from importlib.resources import files

import pytest
import yaml

from segvit.contracts import UserError
from segvit.text.splits import SPLITS, unseen_ids


def described(source: str) -> tuple[str, ...]:
    text = (files("segvit") / "data" / "sources" / f"{source}.yaml").read_text(encoding="utf-8")
    return tuple(entry["name"] for entry in yaml.safe_load(text)["classes"].values())


def test_sizes() -> None:
    counts = {name: (len(split.seen), len(split.unseen)) for name, split in SPLITS.items()}
    assert counts == {"voc12": (15, 5), "coco_stuff164k": (156, 15), "pascal_context59": (49, 10)}


@pytest.mark.parametrize("name", SPLITS)
def test_ids_are_those_of_the_descriptions_without_background(name: str) -> None:
    names = tuple(entry for entry in described(name) if entry != "background")
    assert len(names) == SPLITS[name].num_classes
    assert {number: names[number] for number in SPLITS[name].unseen} == SPLITS[name].unseen
    assert unseen_ids(name, num_classes=len(names), class_names=names) == tuple(SPLITS[name].unseen)


def test_names_decide_where_there_are_any() -> None:
    assert unseen_ids("voc12", num_classes=21, class_names=described("voc12")) == (16, 17, 18, 19, 20)
    words = ["Potted plant", "tv_monitor", ["couch", "sofa"], "train", "sheep", "cat"]
    assert unseen_ids("voc12", num_classes=6, class_names=words) == (0, 1, 2, 3, 4)
    numbered = [f"class_{i}" for i in range(20)]
    assert unseen_ids("voc12", num_classes=20, class_names=numbered) == (15, 16, 17, 18, 19)
    assert unseen_ids("voc12", num_classes=20) == (15, 16, 17, 18, 19)
    assert unseen_ids([4, 1], num_classes=5, class_names=words) == (1, 4)


def test_wrong_splits() -> None:
    for unseen, message in (("ade20k", "unknown split 'ade20k'"), ([1, 1], "different ids"), ([-1], "different ids")):
        with pytest.raises(UserError, match=message):
            unseen_ids(unseen, num_classes=5)
    with pytest.raises(UserError, match="hides sofa, which no class is named"):
        unseen_ids("voc12", num_classes=4, class_names=["pottedplant", "sheep", "train", "tvmonitor"])
    with pytest.raises(UserError, match="different ids"):
        unseen_ids("voc12", num_classes=4)
