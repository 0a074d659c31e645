"""The same picture in two splits: what a score on val is worth depends on it.

Pictures count as the same when their perceptual hashes are near each other (see `hashes`): a copy that was scaled or
compressed again, or the next frame of a film.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from segvit.data.doctor.evidence import EXAMPLES, part_of
from segvit.data.doctor.hashes import near_duplicates
from segvit.data.doctor.tables import Finding, Pair, Survey


class Leak(NamedTuple):
    """A training image that looks like one of another split."""

    train: Pair
    split: str
    other: Pair
    distance: int  # bits that differ


def find_leaks(survey: Survey) -> list[Leak]:
    """The training images that occur in another split, each with the image there that is most like it."""
    splits = {split.name: split.pairs for split in survey.splits}
    train = splits.pop("train", ())
    leaks: list[Leak] = []
    for name, pairs in splits.items():
        hashes = [pair.image.hash for pair in pairs]
        best: dict[int, Leak] = {}
        for i, j, distance in near_duplicates([pair.image.hash for pair in train], hashes):
            if i not in best or distance < best[i].distance:
                best[i] = Leak(train[i], name, pairs[j], distance)
        leaks += best.values()
    return leaks


def judge_leaks(survey: Survey, leaks: Sequence[Leak]) -> Iterator[Finding]:
    """`leak`, a warning, and `duplicates` (equal hashes inside train), a note."""
    train = next((split.pairs for split in survey.splits if split.name == "train"), ())
    for name in dict.fromkeys(leak.split for leak in leaks):
        found = [leak for leak in leaks if leak.split == name]
        count = len({leak.other.stem for leak in found})
        total = sum(len(split.pairs) for split in survey.splits if split.name == name)
        exact = sum(leak.distance == 0 for leak in found)
        first = min(found, key=lambda leak: leak.distance)
        sentence = (
            f"{part_of(count, total, f'images of {name}')} look like an image of train ({exact:,} of {len(found):,} "
            f"exactly): {first.train.image.path} and {first.other.image.path}; the score on {name} will be too good: "
            "leave them out of train by exclude:"
        )
        shown = [path for leak in found[:EXAMPLES] for path in (leak.train.image.path, leak.other.image.path)]
        yield Finding("leak", "warning", sentence, tuple(shown))
    times = Counter(pair.image.hash for pair in train if pair.image.hash is not None)
    alike = {value: count for value, count in times.items() if count > 1}
    if alike:
        copies = sum(alike.values()) - len(alike)
        value = max(alike, key=lambda value: alike[value])
        shown = [pair.image.path for pair in train if pair.image.hash == value][:EXAMPLES]
        sentence = (
            f"{part_of(copies, len(train), 'images of train')} look like another one of train: {shown[0]}, {shown[1]}"
        )
        yield Finding("duplicates", "note", sentence, tuple(shown))
