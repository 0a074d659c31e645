"""Reads a whole dataset once and writes down what is there; what that means is for `diagnose` to say.

Three passes, timed apart: masks are decoded and their values counted, of images only the headers are read, and their
perceptual hashes, where asked for, need the pixels again. Masks and hashes are remembered by content (`records`).

Threads share the work, not processes: Pillow decodes and counts without the interpreter's lock, so they are as fast on
a few cores, and cost nothing to start.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from segvit.contracts import UserError
from segvit.data.dataset import (
    CLASS_FILE,
    DESCRIPTIONS,
    JPEG_SUFFIXES,
    Found,
    describe_source,
    find_layout,
    find_pairs,
    split_by_name,
)
from segvit.data.description import Description, Entry
from segvit.data.doctor.hashes import hash_of
from segvit.data.doctor.images import look_at_image
from segvit.data.doctor.masks import from_json, look_at_mask, reason_of, to_json
from segvit.data.doctor.records import Record, Records, Stamp, digest_of, stamp_of
from segvit.data.doctor.tables import ImageFile, MaskFile, Pair, SplitSurvey, Survey
from segvit.data.sources import named_source, recognise

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[str, int, int], None]  # gets the pass, what is done and the total
Files = Mapping[str, Path]  # by the name in the records

CHUNK = 16  # files that a thread takes at a time
MAX_THREADS = 8  # more only wait for the interpreter's lock


class _Split(NamedTuple):
    name: str
    entries: Sequence[Entry]
    found: Found


def survey(
    source: str | Path, *, hashes: bool = True, workers: int | None = None, remember: bool = True,
    progress: Progress = lambda name, done, total: None,
) -> Survey:  # fmt: skip
    """What lies in the dataset of a YAML, a folder or a named source, split as `open_dataset` splits it.

    A folder needs images/ and masks/, with or without train, val and test below and classes.txt; where nothing names
    the classes, all images without such a folder are train. Files without a counterpart and files that cannot be read
    are recorded; UserError is for a description, folder or list that cannot be read at all. `hashes` asks for
    perceptual hashes, `workers` is the number of threads (default: one a core), and with `remember` false the user's
    cache is neither read nor written. `progress` is called with "masks", "images" or "hashes".
    """
    description, root, entries = _describe(source)
    splits = _find(root, entries, description)
    pairs = [pair for split in splits for pair in split.found.pairs]
    names = {file: below(root, file) for _, image, mask in pairs for file in (image, mask)}
    masks, images = {names[mask]: mask for _, _, mask in pairs}, {names[image]: image for _, image, _ in pairs}
    crew, records = _Crew(workers or min(MAX_THREADS, _cores()), progress), Records(root, keep=remember)
    seconds: dict[str, float] = {}
    try:
        with _timed(seconds, "masks"):
            mask_files = _mask_files(crew, records, masks)
        with _timed(seconds, "images"):
            image_files = _image_files(crew, images)
        if hashes:
            with _timed(seconds, "hashes"):
                image_files = _hashed(crew, records, image_files, images)
    finally:
        records.save()  # what was read before an interrupt need not be read again

    def listed(split: _Split) -> SplitSurvey:
        return SplitSurvey(
            name=split.name,
            images=", ".join(entry.images for entry in split.entries),
            masks=", ".join(entry.masks for entry in split.entries),
            pairs=tuple(
                Pair(stem, image_files[names[image]], mask_files[names[mask]])
                for stem, image, mask in split.found.pairs
            ),
            images_alone=tuple(stem for stem, _ in split.found.images_alone),
            masks_alone=tuple(stem for stem, _ in split.found.masks_alone),
            lines_alone=split.found.lines_alone,
        )

    classes, rule = (description.classes, description.rule) if description else (None, None)
    path = root if named_source(str(source)) else Path(source).expanduser()
    return Survey(root, path, tuple(map(listed, splits)), classes, rule, seconds, description)


def below(root: Path, file: Path) -> str:
    """The name of a file in the records: its path below the root, where it is there."""
    return (file.relative_to(root) if file.is_relative_to(root) else file).as_posix()


def _describe(source: str | Path) -> tuple[Description | None, Path, Mapping[str, tuple[Entry, ...]]]:
    """The description if there is one, the root and the entries of all splits."""
    path = Path(source).expanduser()
    if (
        path.is_dir()
        and not any((path / name).is_file() for name in (*DESCRIPTIONS, CLASS_FILE))
        and not recognise(path)
    ):
        return None, path, find_layout(path)
    description = describe_source(source)
    if not description.root.is_dir():
        raise UserError(f"{description.root}: no such folder; check the path")
    return description, description.root, description.splits


def _find(root: Path, entries: Mapping[str, tuple[Entry, ...]], description: Description | None) -> list[_Split]:
    nearest = description is not None and description.rule.nearest
    splits = [_Split(name, parts, _found(root, parts, nearest=nearest)) for name, parts in entries.items()]
    if description is None or description.val_part is None:
        return splits
    train = next(split for split in splits if split.name == "train")
    kept = split_by_name([stem for stem, _, _ in train.found.pairs], description.val_part)
    ours = train.found._replace(pairs=tuple(pair for pair in train.found.pairs if pair[0] not in kept))
    theirs = Found(tuple(pair for pair in train.found.pairs if pair[0] in kept), (), ())
    others = [split for split in splits if split.name != "train"]
    return [train._replace(found=ours), _Split("val", train.entries, theirs), *others]


def _found(root: Path, entries: Sequence[Entry], *, nearest: bool) -> Found:
    """The files of all entries of a split."""
    parts = [find_pairs(root, entry) for entry in entries]
    pairs = tuple(pair for part in parts for pair in part.pairs)
    masks_alone = tuple(file for part in parts for file in part.masks_alone)
    if pairs and not nearest:  # JPEGs beside the masks are pictures for people, as in training
        masks_alone = tuple(file for file in masks_alone if file[1].suffix.lower() not in JPEG_SUFFIXES)
    return Found(
        pairs,
        tuple(file for part in parts for file in part.images_alone),
        masks_alone,
        tuple(line for part in parts for line in part.lines_alone),
    )


class _Crew(NamedTuple):
    """Threads, and who is told of their progress."""

    workers: int
    progress: Progress

    def each(
        self, name: str, work: Callable[[T], R], items: Sequence[T], take: Callable[[T, R], None], *, done: int = 0
    ) -> None:
        """Call take(item, work(item)) for all items, in order; only `work` runs in the threads.

        `done` items of the pass count as done already.
        """
        chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
        total = done + len(items)
        self.progress(name, done, total)
        pool = ThreadPoolExecutor(self.workers)
        try:
            for chunk, results in zip(chunks, pool.map(lambda chunk: list(map(work, chunk)), chunks), strict=True):
                for item, result in zip(chunk, results, strict=True):
                    take(item, result)
                done += len(chunk)
                self.progress(name, done, total)
        finally:
            pool.shutdown(cancel_futures=True)


def _mask_files(crew: _Crew, records: Records, files: Files) -> dict[str, MaskFile]:
    found = _remembered(crew, records, "masks", files, lambda path, data: to_json(look_at_mask(path, data)))
    return {name: from_json(name, record) for name, record in found.items()}


def _image_files(crew: _Crew, files: Files) -> dict[str, ImageFile]:
    found: dict[str, ImageFile] = {}
    crew.each("images", lambda name: look_at_image(files[name], name), list(files), found.__setitem__)
    return found


def _hashed(crew: _Crew, records: Records, images: Mapping[str, ImageFile], files: Files) -> dict[str, ImageFile]:
    """The images with their hashes; a file whose pixels cannot be decoded gets its error here."""
    readable = {name: path for name, path in files.items() if not images[name].error}
    found = _remembered(crew, records, "hashes", readable, _hash_record)
    changes = {
        name: replace(images[name], size=None, error=record["error"])
        if "error" in record
        else replace(images[name], hash=record["hash"])
        for name, record in found.items()
    }
    return {**images, **changes}


def _hash_record(path: Path, data: bytes) -> Record:
    try:
        return {"hash": hash_of(path, data)}
    except Exception as error:  # as for masks
        return {"error": reason_of(error, path)}


def _remembered(
    crew: _Crew, records: Records, kind: str, files: Files, look: Callable[[Path, bytes], Record]
) -> dict[str, Record]:
    """What `look` finds in each file; it is only asked for content that was not seen before."""
    found = {name: record for name, path in files.items() if (record := records.of_file(kind, name, path))}

    def read(name: str) -> tuple[Record, Stamp | None, str]:
        path = files[name]
        try:
            stamp = stamp_of(path)  # before the bytes: what changes meanwhile is then read again next time
            data = path.read_bytes()
        except OSError as error:
            return {"error": reason_of(error, path)}, None, ""
        digest = digest_of(path, data)
        return records.of_content(kind, digest) or look(path, data), stamp, digest

    def take(name: str, result: tuple[Record, Stamp | None, str]) -> None:
        record, stamp, digest = result
        found[name] = record
        if stamp is not None and "error" not in record:  # the next try may go better: a disk, a missing package
            records.add(kind, name, stamp, digest, record)

    crew.each(kind, read, [name for name in files if name not in found], take, done=len(found))
    return found


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
