"""The main job at the command line: train, evaluate, predict, and what to paste into a bug report."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from segvit.cli.parsing import show, sides
from segvit.contracts import UserError

Precision = Literal["fp32", "bf16", "fp16", "int8"]
Engine = Literal["torch", "compile", "onnxruntime", "openvino"]
Device = Literal["cpu", "cuda"]
Convention = Literal["medpy", "monai", "deepmind", "transunet"]
Empty = Literal["exclude", "transunet", "zero", "penalty"]
Background = Literal["none", "threshold", "words"]


def train(**options: Any) -> None:
    """Train a model; --data and --out are required, everything else may stand in a recipe (--config)."""
    from segvit.tasks.dense import train as run
    from segvit.tasks.experiment import Experiment

    run(Experiment(**options))


def find_lr(*, json: bool = False, **options: Any) -> None:
    """Suggest a learning rate: a short sweep over rates with a recipe's model, data and batch; nothing is written."""
    from segvit.tasks.experiment import Experiment
    from segvit.tasks.find_lr import find_lr as sweep

    if options["steps"] is None and options["epochs"] is None:  # the sweep has its own length
        options["steps"] = 1
    found = sweep(Experiment(**options))
    show(found.report, json, found.text)


def val(
    run: str, *, data: str | None = None, split: str = "val", out: str | None = None,
    scales: tuple[float, ...] = (1.0,), flip: bool = False,
    precision: Precision = "fp32", engine: Engine | None = None, device: Device | None = None, workers: int = 2,
    polyp: bool = False,
    classes: str | None = None, text_weights: str | None = None, unseen: str | None = None, gap: float | None = None,
    volumes: Convention | None = None, spacing: str | None = None, empty: Empty | None = None, json: bool = False,
) -> None:  # fmt: skip
    """Evaluate a model at the original resolution; writes metrics.json and a report.

    Args:
        run: Run folder, model folder, hub id, or a file that segvit export wrote.
        data: Dataset; None = the one that the run was trained on.
        split: Split to evaluate.
        out: Folder for metrics.json and index.html; None = evaluation/SPLIT in the run folder, or here.
        scales: Scales whose softmax scores are averaged.
        flip: Whether each scale is also seen mirrored.
        precision: Of the network; int8 is for onnxruntime and openvino.
        engine: As for predict.
        device: cpu or cuda; None = cuda where there is one.
        workers: Processes that decode images.
        polyp: Of two classes, also the second one's measures of polyp papers: mean Dice and IoU over thresholds ...
        volumes: Also Dice, Jaccard, HD95 and ASD of whole volumes, as this package takes them; transunet is the rule of
            the Synapse tables: medpy's surfaces in voxels.
        spacing: With volumes: own, voxel, or millimetres such as 5,0.8,0.8 along D, H, W; None = the convention's.
        empty: With volumes: what a class without voxels is worth; None = the convention's, exclude for packages.
        classes: As for predict, in the order of the data's classes; data = their own names.
        text_weights: As for predict.
        unseen: Classes whose mean stands apart: names parted by commas, or voc12, coco_stuff164k, pascal_context59;
            None = those that training hid.
        gap: What ZegCLIP takes off the scores of seen classes, 0 to 1; None = the model's.
        json: Print JSON instead of a table.
    """
    from segvit.export.engines import start
    from segvit.export.runtimes import is_exported
    from segvit.inference.predictor import Views
    from segvit.tasks.commands import evaluate_run
    from segvit.tasks.open_vocabulary import Vocabulary
    from segvit.tasks.volumes import make_protocol

    vocabulary = Vocabulary(classes=classes, text_weights=text_weights, gap=gap)
    views = Views(scales=tuple(scales), flip=flip)
    if volumes is None and (spacing, empty) != (None, None):
        raise UserError("--spacing and --empty belong to --volumes; name a convention there, such as medpy")
    result = evaluate_run(
        run, data, split, out, views=views, precision=precision, device=device, workers=workers, polyp=polyp,
        vocabulary=vocabulary, unseen=unseen,
        volumes=None if volumes is None else make_protocol(volumes, spacing=spacing, empty=empty),
        start=partial(start, engine=engine, precision=precision),
        ran={"Precision": "as exported", "Device": "cpu"} if is_exported(run) else {"Engine": engine or "torch"},
    )  # fmt: skip
    show(result.report, json, result.text)


def predict(
    source: str, *, model: str, out: str | None = None, overlay: bool = False, scores: bool = False,
    areas: bool = False, classes: str | None = None, background: Background = "none", threshold: float | None = None,
    text_weights: str | None = None, gap: float | None = None, scales: tuple[float, ...] = (1.0,), flip: bool = False,
    window: tuple[int, ...] = (), stride: tuple[int, ...] = (), resume: bool = False, precision: Precision = "fp32",
    engine: Engine | None = None, device: Device | None = None, json: bool = False,
) -> None:  # fmt: skip
    """Segment images, folders of images or a glob pattern; writes palette PNGs that hold class ids.

    A volume (NIfTI, .npz) becomes a volume of class ids with its name and grid, a film a folder of numbered maps.

    Args:
        source: Image, volume, film, folder or pattern; several may be given.
        model: Run folder, model folder, hub id, or a file that segvit export wrote.
        out: Folder to write; None = predictions/ in the run folder, or here.
        overlay: Also write NAME_overlay.png, the image under its labels with a legend.
        scores: Also write NAME_scores.npz, all class scores as float16.
        areas: Also write NAME.json, pixels (of a volume: voxels and millilitres) and fraction by class.
        classes: Other classes for models that know words: "rust, bolt, cable tray", or with synonyms, which are
            averaged, "rust: corrosion, oxide; bolt", or a file of such lines; None = the model's own.
        background: none; threshold, pixels whose best probability is below --threshold become `background`; words,
            common background words compete as a class more.
        threshold: Probability for --background threshold.
        text_weights: Where CLIP's text tower is now, a tag such as openai or a file; None = where the model was made.
        gap: What ZegCLIP takes off the scores of seen classes, 0 to 1; None = the model's.
        scales: Scales whose softmax scores are averaged.
        flip: Whether each scale is also seen mirrored.
        window: Side of windows (or height, width) at the images' own resolution, in place of the model's size rule;
            TIFFs above 64 million pixels are then read and written in parts.
        stride: Step of these windows; none = three quarters.
        resume: Keep what an earlier call with the same options wrote, and do the rest.
        precision: Of the network; int8 is for onnxruntime and openvino.
        engine: torch; compile, which freezes the weights into compiled code; onnxruntime or openvino, which export the
            model, check it and keep the file in the run folder; None = torch, or what an exported file is for.
        device: cpu or cuda; None = cuda where there is one.
        json: Print what was written as JSON.
    """
    from segvit.export.engines import start
    from segvit.inference.predictor import Views
    from segvit.tasks.commands import predict_files
    from segvit.tasks.open_vocabulary import Vocabulary

    vocabulary = Vocabulary(
        classes=classes, background=background, threshold=threshold, text_weights=text_weights, gap=gap
    )
    extra = {"overlay": overlay, "scores": scores, "areas": areas}
    views = Views(scales=tuple(scales), flip=flip)
    result = predict_files(
        source, model, out, extra, views=views, precision=precision, device=device, vocabulary=vocabulary,
        start=partial(start, engine=engine, precision=precision), window=sides("window", window),
        stride=sides("stride", stride), resume=resume, engine=engine,
    )  # fmt: skip
    if result.written:
        show(result.written, json, "\n".join(item["labels"] for item in result.written))
    if result.failed:
        raise UserError(f"{len(result.failed)} images were left out: {'; '.join(result.failed[:3])}")


def watch(run: str, *, once: bool = False) -> None:
    """Draw the curves of a run in the terminal while it goes on; ends with it, or with Ctrl-C.

    Args:
        run: Run folder.
        once: Print the present state and exit.
    """
    from segvit.tasks.watch import watch_run

    watch_run(run, once=once)


def doctor(*, json: bool = False) -> None:
    """Versions, devices and settings, to paste into a bug report.

    Args:
        json: Print JSON.
    """
    from segvit.tasks.commands import environment

    report = environment()
    show(report, json, "\n".join(f"{key}: {value}" for key, value in report.items()))
