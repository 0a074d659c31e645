"""Segments files of every kind: images in a stream, films frame by frame, volumes, and images too large to hold.

Decoding, computing and writing overlap, and memory does not grow with the number of files. All files are written
atomically; so what exists is whole, and a run that was stopped goes on with what is missing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segvit.contracts import Size, UserError
from segvit.data.dataset import IMAGE_SUFFIXES
from segvit.data.tiff_regions import TIFF_SUFFIXES, open_regions, tiff_size
from segvit.data.video import VIDEO_SUFFIXES, is_video, read_film, read_frames, write_film
from segvit.data.volumes import NIFTI_SUFFIXES, is_volume
from segvit.files import open_atomic, write_json
from segvit.inference.large import Windowed, segment_large
from segvit.inference.prediction import Prediction
from segvit.inference.predictor import Predictor, as_image
from segvit.inference.stream import read_ahead, write_behind
from segvit.tasks.console import progress_bar
from segvit.tasks.sources import check_names, find_images, is_frame, output_names
from segvit.tasks.volumes import predict_volume

READABLE = (*IMAGE_SUFFIXES, *NIFTI_SUFFIXES, *VIDEO_SUFFIXES)
LARGE = 64_000_000  # pixels from which a TIFF is read and written in parts
RECORD = ".predict.json"  # what the files of a folder were made with, and of which images


@dataclass(frozen=True)
class Predicted:
    """What `segvit predict` wrote, and what it could not read."""

    written: list[dict[str, str]]
    failed: list[str]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How files are segmented and written.

    Args:
        extra: Which of overlay, scores and areas are written too.
        window: Size of windows at the images' own resolution, in place of the model's size rule.
        stride: Their step; None = three quarters of the window.
        resume: Whether what exists already is kept.
        identity: What the result depends on; `resume` refuses a folder that was made with something else.
    """

    extra: dict[str, bool]
    window: Size | None = None
    stride: Size | None = None
    resume: bool = False
    identity: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stride is not None and self.window is None:
            raise UserError("stride goes with window; give --window too")
        if self.window is not None and not all(
            1 <= step <= side for step, side in zip(self.step, self.window, strict=True)
        ):
            raise UserError(f"stride {self.step} must lie between 1 and the window {self.window}; else there are gaps")

    @property
    def step(self) -> Size:
        """The stride that holds."""
        height, width = self.window or (1, 1)
        return self.stride or (max(1, height * 3 // 4), max(1, width * 3 // 4))


def segment_files(source: str, folder: Path, plan: Plan, load: Callable[[], Callable[..., Prediction]]) -> Predicted:
    """Segment files and write the results; a file that cannot be read does not stop the others.

    `load` makes what segments an image, when the names of inputs and outputs are found to be right. Volumes, films and
    windows need a Predictor. Raises UserError for what a kind of file does not have.
    """
    images = find_images(source, READABLE, leave_out=folder)
    kinds = {image: other_kind(image, plan) for image in images}
    names = all_names(images, kinds, folder, plan)
    check_names(list(images), [path for paths in names.values() for path in paths.values()])
    record = checked_record(folder, plan)
    targets = {image: paths["labels"].relative_to(folder).as_posix() for image, paths in names.items()}
    made_of = {target: state_of(image) for image, target in targets.items()}
    kept = {image for image, at in targets.items() if plan.resume and record["images"].get(at) == made_of[at]}
    rest = {image: paths for image, paths in names.items() if not (image in kept and is_done(image, paths))}
    written, failed = [], []
    if rest:
        segment = load()
        if isinstance(segment, Predictor) and plan.window is not None:
            segment.run = Windowed(segment.run, plan.window, plan.step)
        special = {image: kind for image in rest if (kind := kinds[image]) is not None}
        if special and not isinstance(segment, Predictor):
            raise UserError(f"{min(special)}: this model segments images only; give it single pictures")
        for image in rest.keys() - kept:
            remove_outputs(image, rest[image])
        write_json(folder / RECORD, record | {"images": record["images"] | made_of})
        for image, error in itertools.chain(
            stream_images({image: paths for image, paths in rest.items() if image not in special}, segment, plan),
            ((image, failure(one, segment, image, rest[image], plan)) for image, one in special.items()),
        ):
            if error is not None:
                failed.append(error)
                del names[image]
    for image, paths in names.items():
        written.append({"image": str(image)} | {kind: str(path) for kind, path in paths.items()})
    return Predicted(written, failed)


def all_names(
    images: dict[Path, Path], kinds: dict[Path, Kind | None], folder: Path, plan: Plan
) -> dict[Path, dict[str, Path]]:
    """The files to write of every file to read."""
    targets = {image: folder / name.with_suffix(".png") for image, name in images.items() if not is_volume(image)}
    if len(set(targets.values())) < len(targets):  # a.jpg and a.png
        targets = {image: folder / images[image].parent / f"{images[image].name}.png" for image in targets}
    targets |= {image: folder / name for image, name in images.items() if is_volume(image)}
    found = {}
    for image, target in targets.items():
        kind = kinds[image]
        if kind is not None and plan.extra["scores"]:
            raise UserError(f"{image}: scores are written of single pictures only; leave out --scores")
        if kind is not None and kind is not film and plan.extra["overlay"]:
            raise UserError(f"{image}: a volume or large image has no overlay; leave out --overlay")
        found[image] = output_names(target.with_suffix(".tif") if kind is large else target, plan.extra)
        if kind is film:
            found[image]["labels"] = target.with_suffix("")  # a folder of frames
            found[image].pop("areas", None)  # stand beside the frames
            if plan.extra["overlay"]:
                found[image]["overlay"] = target.with_name(f"{target.stem}_overlay.mp4")
    return found


def checked_record(folder: Path, plan: Plan) -> dict[str, Any]:
    """What the files are made with, and under `images` of what each was made that is made so already.

    Raises UserError where `resume` meets files of another model or option.
    """
    record = folder / RECORD
    wanted: dict[str, Any] = json.loads(
        json.dumps({**plan.identity, "window": plan.window, "stride": plan.window and plan.step})
    )
    if not record.is_file():
        if plan.resume and folder.is_dir() and any(folder.iterdir()):
            raise UserError(
                f"{folder} does not say how its files were made; leave out --resume or choose another --out"
            )
        return wanted | {"images": {}}
    made = json.loads(record.read_text(encoding="utf-8"))
    images = made.pop("images", {})  # older records do not say
    other = sorted(key for key in {*made, *wanted} if made.get(key) != wanted.get(key))
    if plan.resume and other:
        raise UserError(f"{folder} was made with another {', '.join(other)}; choose another --out")
    return wanted | {"images": {} if other else images}


def state_of(image: Path) -> list[str | int]:
    """What tells an image from another, and from what it was before it was edited."""
    stat = image.stat()
    return [str(image.resolve()), stat.st_size, stat.st_mtime_ns]


def is_done(image: Path, paths: dict[str, Path]) -> bool:
    """Whether all files of an image exist; of a film only its own frames tell."""
    return not is_video(image) and all(path.is_file() for path in paths.values())


def remove_outputs(image: Path, paths: dict[str, Path]) -> None:
    """Remove what another run left in the place of an image's files: by the record they would count as this one's."""
    frames = paths["labels"].glob("*") if is_video(image) else ()
    for file in (*filter(is_frame, frames), *filter(Path.is_file, paths.values())):
        file.unlink()


def failure(kind: Kind, segment: Any, image: Path, paths: dict[str, Path], plan: Plan) -> str | None:
    """What was wrong with a file of a special kind, or None when it is written."""
    try:
        kind(segment, image, paths, plan)
    except UserError as error:
        return str(error)
    return None


def stream_images(
    names: dict[Path, dict[str, Path]], segment: Callable[..., Prediction], plan: Plan
) -> Iterator[tuple[Path, str | None]]:
    """Segment pictures, decoded ahead and written behind; yields each with what was wrong with it or None."""

    def read(image: Path) -> Path | NDArray[np.uint8]:
        if not isinstance(segment, Predictor):
            return image
        return as_image(image, channels=segment.run.spec.channels, levels=segment.run.spec.levels)[0]

    with progress_bar("segmenting") as progress, write_behind() as write:
        for done, (image, future) in enumerate(read_ahead(read, names)):
            progress(done, len(names))
            try:
                result = segment(future.result(), scores=plan.extra["scores"])
            except UserError as error:
                yield image, str(error)
                continue
            write(write_prediction, replace(result, name=str(image)), names[image])
            yield image, None


def write_prediction(result: Prediction, paths: dict[str, Path]) -> None:
    """Write what `paths` names: the labels last, so that they stand for all."""
    if "overlay" in paths:
        save_overlay(result, paths["overlay"])
    if "scores" in paths:
        result.save_scores(paths["scores"])
    if "areas" in paths:
        write_json(paths["areas"], result.areas())
    result.save(paths["labels"])


def save_overlay(result: Prediction, path: Path) -> None:
    """Write a prediction's overlay as PNG, atomically."""
    with open_atomic(path) as file:
        result.overlay().save(file, "PNG")


Kind = Callable[[Predictor, Path, dict[str, Path], Plan], None]


def volume(segment: Predictor, image: Path, paths: dict[str, Path], plan: Plan) -> None:
    """A volume, slice by slice."""
    predict_volume(segment, image, paths)


def large(segment: Predictor, image: Path, paths: dict[str, Path], plan: Plan) -> None:
    """A large TIFF in strips of windows; goes on where it was stopped."""
    if segment.views.count > 1:
        raise UserError(f"{image}: an image this large is looked at once; leave out --scales and --flip")
    spec, stat = segment.run.spec, image.stat()
    made_of = {"window": spec.window, "stride": spec.stride, "image": [stat.st_size, stat.st_mtime_ns]}
    identity = json.loads(json.dumps({**plan.identity, **made_of}))
    with (
        open_regions(image, channels=spec.channels, levels=spec.levels) as regions,
        progress_bar(f"segmenting {image.name}, rows") as progress,
    ):
        counts = segment_large(
            segment.run, regions, paths["labels"], identity=identity, resume=plan.resume,
            at_once=segment.windows_at_once, progress=progress,
        )  # fmt: skip
        if "areas" in paths:
            height, width = regions.size
            present = [
                {"id": i, "name": segment.run.classes.names[i], "pixels": pixels, "fraction": pixels / (height * width)}
                for i, pixels in sorted(enumerate(counts.tolist()), key=lambda pair: -pair[1]) if pixels
            ]  # fmt: skip
            write_json(paths["areas"], {"name": str(image), "height": height, "width": width, "classes": present})


def film(segment: Predictor, image: Path, paths: dict[str, Path], plan: Plan) -> None:
    """A film: one label map a frame, numbered from 1, and with overlay a film; keeps the frames that exist."""
    facts = read_film(image)
    frames = read_frames(image)
    with ExitStack() as stack:
        progress = stack.enter_context(progress_bar(f"segmenting {image.name}, frames"))
        overlay = paths.get("overlay")
        add = None if overlay is None else stack.enter_context(write_film(overlay, facts.rate))
        write = stack.enter_context(write_behind())
        for number, future in read_ahead(lambda _: next(frames, None), itertools.count(1)):
            picture = future.result()
            if picture is None:
                break
            progress(number, max(facts.frames, number))
            frame = output_names(paths["labels"] / f"{number:06}.png", plan.extra | {"overlay": False})
            if plan.resume and is_done(frame["labels"], frame):
                labels = np.asarray(Image.open(frame["labels"]))
                result = Prediction(labels=labels, classes=segment.run.classes, image=picture)
            else:
                result = replace(segment(picture), name=f"{image}, frame {number}")
                write(write_prediction, result, frame)
            if add is not None:
                write(add, np.asarray(result.overlay(legend=False)))


def other_kind(image: Path, plan: Plan) -> Kind | None:
    """What segments a file that is no single picture of ordinary size; None for one that is."""
    if is_volume(image):
        return volume
    if is_video(image):
        return film
    return large if plan.window is not None and is_large(image) else None


def is_large(image: Path) -> bool:
    """Whether an image is a TIFF of so many pixels that it is handled in parts."""
    if image.suffix.lower() not in TIFF_SUFFIXES:
        return False
    try:
        height, width = tiff_size(image)
    except UserError:  # read whole, it fails by itself, or another reader knows it
        return False
    return height * width >= LARGE
