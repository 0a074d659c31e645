"""What is wrong with single files and with their matching, and which of them a description has to leave out.

Every finding is an error, since `segvit train` would stop at the file, unless its function says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from segvit.contracts import Size
from segvit.data.doctor.evidence import EXAMPLES, counted, part_of
from segvit.data.doctor.tables import Finding, Pair, Severity, SplitSurvey, Survey

SMALL = 32  # pixels of a side below which a ViT sees next to nothing
PICTURE_CHANNELS = 4  # more are no picture, so that nothing makes three of them unasked
ARRAYS = ("NPY", "NPZ")

Excluded = dict[str, dict[str, str]]  # split -> stem -> why it is to be left out


class Judged(NamedTuple):
    """The findings on files and what follows for the description."""

    findings: list[Finding]
    excluded: Excluded
    channels: int | None  # of all images, where the description says something else


def judge_files(survey: Survey) -> Judged:
    """All findings on single files and on their matching."""
    excluded: Excluded = {split.name: {} for split in survey.splits}
    findings = [
        *no_pairs(survey),
        *corrupt(survey, excluded, "mask"),
        *corrupt(survey, excluded, "image"),
        *size_mismatch(survey, excluded),
        *orphans(survey, excluded),
        *list_lines(survey),
    ]
    channel_findings, channels = channel_mismatch(survey, excluded)
    findings += [*channel_findings, *too_few(survey, excluded), *mixed_modes(survey), *sizes(survey), *depth(survey)]
    return Judged(findings, excluded, channels)


def no_pairs(survey: Survey) -> Iterator[Finding]:
    """`no_pairs`: a split has images or masks but none that belong together."""
    for split in survey.splits:
        if split.pairs:
            continue
        images, masks = split.images_alone, split.masks_alone
        if images and masks:
            template = common_template(images, masks) or "{stem}_mask"
            seen = (
                f"{counted(len(images), 'image')} such as {images[0]!r} and {counted(len(masks), 'mask')} such as "
                f"{masks[0]!r} but no two of equal name; give them equal names, or write a template such as "
                f"masks: {split.masks}/{template}.png"
            )
        elif images or masks:
            have, lack, folder = ("image", "masks", split.masks) if images else ("mask", "images", split.images)
            count = len(images) + len(masks)
            seen = f"{counted(count, have)} but no {lack} in {folder}; put the {lack} there or correct the path"
        else:
            seen = f"no files in {split.images} and {split.masks}; correct the paths"
        yield Finding("no_pairs", "error", f"{split.name} has {seen}")


def common_template(images: Sequence[str], masks: Sequence[str]) -> str | None:
    """The template that makes a mask of most images by their stems, such as `{stem}_mask`; None where there is none."""
    names = set(masks)
    for mask in masks:
        before, found, after = mask.partition(images[0])
        if found and sum(f"{before}{image}{after}" in names for image in images) > len(images) / 2:
            return f"{before}{{stem}}{after}"
    return None


def corrupt(survey: Survey, excluded: Excluded, what: str) -> Iterator[Finding]:
    """`corrupt_mask` and `corrupt_image`: files that cannot be read."""
    bad: list[tuple[str, str]] = []  # path, reason
    for split, pair in _pairs(survey):
        file = pair.mask if what == "mask" else pair.image
        if file.error:
            bad.append((file.path, file.error))
            excluded[split.name][pair.stem] = f"the {what} cannot be read"
    if bad:
        path, reason = bad[0]
        sentence = (
            f"{part_of(len(bad), _count(survey), f'{what}s')} cannot be read: {path} ({_short(reason)}); replace the "
            "files, or leave them out by exclude:"
        )
        yield Finding(f"corrupt_{what}", "error", sentence, _few(path for path, _ in bad))


def size_mismatch(survey: Survey, excluded: Excluded) -> Iterator[Finding]:
    """`size_mismatch`: a mask is not as large as its image, perhaps since an EXIF tag turns the image alone."""
    bad = []
    turned = 0
    for split, pair in _pairs(survey):
        image, mask = pair.image, pair.mask
        if image.size is None or mask.size is None or image.size == mask.size:
            continue
        bad.append(pair)
        turned += image.turned and mask.size == image.size[::-1]
        excluded[split.name][pair.stem] = f"the image is {_wide(image.size)}, the mask {_wide(mask.size)}"
    if not bad:
        return
    first = bad[0]
    assert first.image.size is not None
    assert first.mask.size is not None
    why = ""
    if turned:
        number = "all" if turned == len(bad) else f"{turned:,}"
        why = f" ({number} because an EXIF tag turns the image but not the mask: turn these masks)"
    sentence = (
        f"{part_of(len(bad), _count(survey), 'masks')} have another size than their image{why}: {first.image.path} is "
        f"{_wide(first.image.size)} but {first.mask.path} is {_wide(first.mask.size)}; export the masks at the size of "
        "the images, or leave these out by exclude:"
    )
    yield Finding("size_mismatch", "error", sentence, _few(pair.mask.path for pair in bad))


def orphans(survey: Survey, excluded: Excluded) -> Iterator[Finding]:
    """`images_without_mask`, `masks_without_image` and `same_stem` (two files for one place)."""
    questions: tuple[tuple[str, str, Callable[[SplitSurvey], tuple[str, ...]]], ...] = (
        ("images_without_mask", "image without a mask", lambda split: split.images_alone),
        ("masks_without_image", "mask without an image", lambda split: split.masks_alone),
    )
    twice: list[str] = []
    for kind, what, stems_of in questions:
        alone: list[str] = []
        for split in survey.splits:
            paired = {pair.stem for pair in split.pairs}
            for stem in stems_of(split):
                (twice if stem in paired else alone).append(f"{stem} of {split.name}")
                why = "two files of this name" if stem in paired else what
                excluded[split.name][stem] = why
        if alone:
            shown = ", ".join(alone[:3]) + (", ..." if len(alone) > 3 else "")
            word, _, lack = what.partition(" ")
            sentence = f"{counted(len(alone), word)} {lack}: {shown}; add what is missing, or leave out by exclude:"
            yield Finding(kind, "error", sentence, _few(name.rpartition(" of ")[0] for name in alone))
    if twice:
        sentence = f"{counted(len(twice), 'name')} with two files, such as {twice[0]}; keep one of the two"
        yield Finding("same_stem", "error", sentence, _few(name.rpartition(" of ")[0] for name in twice))


def list_lines(survey: Survey) -> Iterator[Finding]:
    """`list_lines`: lines of a list file that name no file; only the list can be mended."""
    for split in survey.splits:
        if split.lines_alone:
            shown = ", ".join(map(repr, split.lines_alone[:3]))
            lines = counted(len(split.lines_alone), "line")
            sentence = f"the list of {split.name} has {lines} without a file, such as {shown}; mend the list"
            yield Finding("list_lines", "error", sentence, _few(split.lines_alone))


def channel_mismatch(survey: Survey, excluded: Excluded) -> tuple[list[Finding], int | None]:
    """`channel_mismatch`: images with other channels than the description says, and the number that fits all."""
    wanted = survey.description.channels if survey.description else 3
    bad = [(split, pair) for split, pair in _pairs(survey) if not _fits(pair, wanted)]
    if not bad:
        return [], None
    found = Counter(pair.image.channels for _, pair in bad)
    count = sum(1 for _, pair in _pairs(survey) if not pair.image.error)
    shown = ", ".join(f"{number:,} with {channels}" for channels, number in found.most_common(4))
    uniform = len(found) == 1 and len(bad) == count
    remedy = f"write channels: {next(iter(found))}" if uniform else "write channels: as in most, leave out the others"
    sentence = f"{part_of(len(bad), count, 'images')} do not have {wanted} channels: {shown}; {remedy}"
    if not uniform and len(bad) < count:
        for split, pair in bad:
            excluded[split.name][pair.stem] = f"the image has {pair.image.channels} channels"
    finding = Finding("channel_mismatch", "error", sentence, _few(pair.image.path for _, pair in bad))
    return [finding], next(iter(found)) if uniform else None


def too_few(survey: Survey, excluded: Excluded) -> Iterator[Finding]:
    """`too_few`: an error where no training image is left, a warning where there is one, or nothing to validate on."""
    good = {split.name: sum(pair.stem not in excluded[split.name] for pair in split.pairs) for split in survey.splits}
    train = good.get("train", 0)
    if "train" not in good:
        yield Finding("too_few", "error", f"no train split, only {', '.join(good) or 'nothing'}; add train:")
    elif not train:
        yield Finding("too_few", "error", "no image of train can be used; mend the files named in the other errors")
    elif train == 1 and survey.description and survey.description.val_part and not good.get("val"):
        yield Finding("too_few", "error", "train has one image, so no part of it can be val; add images")
    elif train == 1:
        yield Finding("too_few", "warning", "train has one image that can be used; a network only learns it by heart")
    if not good.get("val") and train > 1:
        seen = "no image of val can be used" if "val" in good else "no val split"
        sentence = f"{seen}, so nothing tells how good the model is; write val: 0.2 to keep a part of train for it"
        yield Finding("too_few", "warning", sentence)


def mixed_modes(survey: Survey) -> Iterator[Finding]:
    """`mixed_modes`, a warning: masks are stored in several ways, so perhaps not all by the same tool."""
    modes = Counter(pair.mask.mode for _, pair in _pairs(survey) if not pair.mask.error)
    if len(modes) < 2:
        return
    shown = ", ".join(f"{count:,} {mode}" for mode, count in modes.most_common())
    rare = [pair.mask.path for _, pair in _pairs(survey) if pair.mask.mode == modes.most_common()[-1][0]]
    sentence = f"masks are stored in {len(modes)} modes: {shown}; check that values mean the same in all of them"
    yield Finding("mixed_modes", "warning", sentence, _few(rare))


def sizes(survey: Survey) -> Iterator[Finding]:
    """`mixed_sizes`, a note, and `small_images`, a warning."""
    known = [(pair.image.size, pair.image.path) for _, pair in _pairs(survey) if pair.image.size]
    different = sorted({size for size, _ in known}, key=lambda size: size[0] * size[1])
    if len(different) > 1:
        least, most = _wide(different[0]), _wide(different[-1])
        sentence = f"images come in {len(different):,} sizes, from {least} to {most} pixels"
        yield Finding("mixed_sizes", "note", sentence)
    small = [path for size, path in known if min(size) < SMALL]
    if small:
        sentence = (
            f"{part_of(len(small), len(known), 'images')} have a side below {SMALL} pixels, where patches of 16 pixels "
            "show little; check that these are no thumbnails"
        )
        yield Finding("small_images", "warning", sentence, _few(small))


def depth(survey: Survey) -> Iterator[Finding]:
    """`range_missing`: an error for fractions, a warning for integers beyond 16 bits, a note for 16 bits."""
    if survey.description and survey.description.range:
        return
    known = [pair.image for _, pair in _pairs(survey) if not pair.image.error]
    fractions = [image.path for image in known if image.mode == "F"]
    wide = [image.path for image in known if image.mode != "F" and image.bits > 16]
    deep = [image.path for image in known if image.mode != "F" and image.bits == 16]
    questions: tuple[tuple[list[str], Severity, str], ...] = (
        (fractions, "error", "hold fractions, which have no natural range;"),
        (wide, "warning", "have more than 16 bits, and values above 65535 cannot be read as they are;"),
        (deep, "note", "have 16 bits, read so that 65535 is white; where they use less,"),
    )
    for paths, severity, what in questions:
        if paths:
            sentence = f"{part_of(len(paths), len(known), 'images')} {what} write range: [LOWEST, HIGHEST]"
            yield Finding("range_missing", severity, sentence, _few(paths))


def _fits(pair: Pair, wanted: int) -> bool:
    image = pair.image
    if image.error or image.channels == wanted:
        return True
    if wanted not in (1, 3):
        return False
    return image.channels in (1, 3) if image.format in ARRAYS else image.channels <= PICTURE_CHANNELS


def _pairs(survey: Survey) -> Iterator[tuple[SplitSurvey, Pair]]:
    return ((split, pair) for split in survey.splits for pair in split.pairs)


def _count(survey: Survey) -> int:
    return sum(len(split.pairs) for split in survey.splits)


def _wide(size: Size) -> str:
    return f"{size[1]}x{size[0]}"


def _few(paths: Iterable[str]) -> tuple[str, ...]:
    found: Sequence[str] = list(paths)
    return tuple(found[:EXAMPLES])


def _short(reason: str) -> str:
    return reason if len(reason) <= 120 else f"{reason[:117]}..."
