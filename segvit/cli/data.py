"""The data tools at the command line: check, describe, convert, measure and show a dataset before training on it."""

from __future__ import annotations

import sys
from typing import Literal

from segvit.cli.parsing import show

Kind = Literal["auto", "coco", "coco_panoptic", "yolo", "labelme", "cvat", "label_studio", "dataset"]


def check(
    path: str, *, out: str = "data_report", no_leaks: bool = False, no_cache: bool = False, workers: int | None = None,
    json: bool = False,
) -> None:  # fmt: skip
    """Read every mask once, say what is wrong and which YAML mends it; exit code 1 when training would go wrong.

    Args:
        path: Dataset YAML, folder with images/ and masks/, or SOURCE:FOLDER of a well-known set.
        out: Folder for index.html and report.json.
        no_leaks: Do not look for the same pictures in train and val, which reads every image.
        no_cache: Read all masks again, also those that did not change since the last time.
        workers: Processes that read masks; None = one a core.
        json: Print the report as JSON.
    """
    from segvit.tasks.data_check import check_data

    result = check_data(path, out=out, leaks=not no_leaks, remember=not no_cache, workers=workers)
    show(result.report, json, result.text)
    if not result.diagnosis.healthy:
        sys.exit(1)


def init(path: str, *, overwrite: bool = False, json: bool = False) -> None:
    """Write the dataset.yaml of a folder by looking at its files.

    Args:
        path: Folder with images/ and masks/, or of a well-known set.
        overwrite: Replace a dataset.yaml that is there; the old one is kept as dataset.yaml.bak.
        json: Print what was written and the findings as JSON.
    """
    from segvit.tasks.data_check import init_data

    written = init_data(path, overwrite=overwrite)
    show(written.report, json, written.text)


def convert(
    path: str, *, out: str, kind: Kind = "auto", images: str | None = None, background: str | None = None,
    overwrite: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Convert annotations to the plain layout: images/, masks/ and dataset.yaml.

    Args:
        path: COCO or Label Studio JSON, YOLO or LabelMe folder, CVAT XML, or any dataset.
        out: Folder to write.
        kind: Format of the annotations; auto = by looking.
        images: Folder of the images where they do not lie beside the annotations.
        background: Class of the pixels in no shape, or ignore; None = a class background, as the format's rule is.
        overwrite: Replace what is in out.
        json: Print the summary as JSON.
    """
    from segvit.tasks.data_check import convert_data

    result = convert_data(path, out=out, kind=kind, images=images, background=background, overwrite=overwrite)
    show(result.report, json, result.text)


def stats(path: str, *, images: int = 200, json: bool = False) -> None:
    """Pixels and images of each class by split, class weights, and the images' mean and deviation.

    Args:
        path: Dataset.
        images: Images read for mean and deviation; 0 = none.
        json: Print JSON.
    """
    from segvit.tasks.data_stats import dataset_stats

    result = dataset_stats(path, images=images)
    show(result.report, json, result.text)


def preview(path: str, *, out: str = "preview", split: str = "train", count: int = 24, json: bool = False) -> None:
    """Contact sheets of images under their labels, to look at before training.

    Args:
        path: Dataset.
        out: Folder to write.
        split: Split to show.
        count: Images, evenly spread over the split.
        json: Print the written files as JSON.
    """
    from segvit.tasks.data_preview import preview_data

    sheets = preview_data(path, out=out, split=split, count=count)
    show(sheets, json, "\n".join(sheets))


def bench(
    data: str | None = None, *, model: str | None = None, config: str | None = None, batch_size: int | None = None,
    crop: tuple[int, int] | None = None, workers: int | None = None,
    cache: Literal["none", "ram", "disk"] | None = None, seconds: float = 10.0, json: bool = False,
) -> None:  # fmt: skip
    """Say whether loading or the model is the brake of training.

    Args:
        data: Dataset; None = that of the recipe.
        model: Model to compare with; None = that of the recipe, else segvit_vit_small.
        config: Recipe, of which everything not given here is taken.
        batch_size: Images in a step; None = the recipe's, else 16.
        crop: Height and width of the training crop; None = the recipe's, else 512 x 512.
        workers: Processes that load data; None = the recipe's, else 2.
        cache: Where decoded images are kept; None = as the recipe says, else nowhere.
        seconds: Length of each measurement.
        json: Print JSON.
    """
    from segvit.tasks.data_bench import bench as measure

    result = measure(
        data, model=model, config=config, batch_size=batch_size, crop=crop, workers=workers, cache=cache,
        seconds=seconds,
    )  # fmt: skip
    show(result.report, json, result.text)
