"""Seen and unseen classes of the zero-shot benchmarks, as explicit lists.

Source    VOC and COCO-Stuff: the released code of ZegCLIP and of zsseg, which agree; ids are those of our descriptions
          without background. PASCAL-Context: the ten names of ZS3Net (M. Bucher et al., NeurIPS 2019), which later
          papers follow; ids in the alphabetical order of our description. ZegCLIP's own list was never released.
Trap      A public fork of ZegCLIP combines the ids of the other common order of PASCAL-Context (VOC's classes first)
          with the alphabetical names, which hides other classes. Here names decide wherever there are any.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from segvit.contracts import UserError


class Split(NamedTuple):
    """The unseen classes by id; all other ids below `num_classes` are seen."""

    num_classes: int
    unseen: dict[int, str]

    @property
    def seen(self) -> tuple[int, ...]:
        """The ids of the seen classes, in order."""
        return tuple(number for number in range(self.num_classes) if number not in self.unseen)


SPLITS = {
    "voc12": Split(20, {15: "pottedplant", 16: "sheep", 17: "sofa", 18: "train", 19: "tvmonitor"}),
    "coco_stuff164k": Split(
        171,
        {
            19: "cow", 23: "giraffe", 28: "suitcase", 29: "frisbee", 36: "skateboard", 51: "carrot", 76: "scissors",
            88: "cardboard", 94: "clouds", 112: "grass", 133: "playingfield", 136: "river", 137: "road", 157: "tree",
            160: "wall-concrete",
        },
    ),
    "pascal_context59": Split(
        59,
        {
            0: "aeroplane", 6: "bird", 7: "boat", 14: "cat", 19: "cow", 24: "fence", 31: "keyboard", 33: "motorbike",
            48: "sofa", 54: "tvmonitor",
        },
    ),
}  # fmt: skip


def unseen_ids(
    unseen: str | Sequence[int], *, num_classes: int, class_names: Sequence[str | Sequence[str]] | None = None
) -> tuple[int, ...]:
    """The ids of unseen classes, rising: those given, or those of a split of `SPLITS`.

    A split's classes are looked up by name in `class_names` (of synonyms any will do), so that other orders and an
    extra background are right too; its own ids count where there are no names but class_0, class_1 and so on. Raises
    UserError for an unknown split, a name that is missing, and ids that are no class or are given twice.
    """
    if not isinstance(unseen, str):
        if len(set(unseen)) < len(unseen) or not all(0 <= number < num_classes for number in unseen):
            raise UserError(f"unseen classes {list(unseen)} must be different ids in 0..{num_classes - 1}")
        return tuple(sorted(unseen))
    if unseen not in SPLITS:
        raise UserError(f"unknown split {unseen!r}; choose from {', '.join(SPLITS)}, or list the unseen ids")
    names = [[_plain(word) for word in ([n] if isinstance(n, str) else n)] for n in class_names or ()]
    if all(re.fullmatch(r"class\d+", word) for words in names for word in words):
        return unseen_ids(tuple(SPLITS[unseen].unseen), num_classes=num_classes)
    found = {word: number for number, words in enumerate(names) for word in words}
    missing = [name for name in SPLITS[unseen].unseen.values() if _plain(name) not in found]
    if missing:
        raise UserError(f"split {unseen} hides {', '.join(missing)}, which no class is named; list the unseen ids")
    return tuple(sorted(found[_plain(name)] for name in SPLITS[unseen].unseen.values()))


def _plain(name: str) -> str:
    """`Potted plant`, `potted_plant` and `pottedplant` are one name."""
    return re.sub(r"[\s_]+", "", name.lower())
