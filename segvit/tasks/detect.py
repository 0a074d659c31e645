"""Object detection: train, evaluate (COCO's mAP) and use a detector on one device. Boxes are left, top, right, bottom.

The run folder is like that of dense training: config.yaml, env.json, metrics.jsonl, checkpoints/, model/, val.json.
"""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate.utils import set_seed
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.utils.data import DataLoader

from segvit import __version__
from segvit.contracts import UserError
from segvit.data.boxes import BoxDataset, BoxSample, open_boxes
from segvit.data.decode import read_image
from segvit.data.loading import permutation
from segvit.engine.optim import clip_gradients, make_optimizer, parameter_rates, set_rates
from segvit.engine.run import PREVIOUS_STATE, STATE, claim, locked, write_environment
from segvit.engine.settings import Optim, Schedule, check_counts
from segvit.engine.state import random_state, replace_state, restored
from segvit.files import open_atomic, write_json, write_text
from segvit.palette import generate_palette
from segvit.systems.retinanet import DETECTORS
from segvit.tasks.console import progress_bar
from segvit.tasks.dense import located
from segvit.tasks.sources import default_device, find_images

Target = dict[str, Tensor]  # "boxes" (N, 4), "labels" (N,); of a detection also "scores" (N,)
STATISTICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")  # the first of COCO's twelve


@dataclass(frozen=True, kw_only=True)
class Detection:
    """One training run of a detector; the rates are those of the PVT paper.

    `size` is the short side that images are resized to and the most that the long side may be; `batch_size` images go
    through the network at once. Raises UserError for numbers that make no run.
    """

    data: str
    out: str
    model: str = "retinanet_pvt_tiny"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    steps: int
    batch_size: int = 16
    size: tuple[int, int] = (800, 1333)
    flip: float = 0.5
    optim: Optim = Optim(lr=1e-4, weight_decay=1e-4, lr_mult={}, decay_mult={}, clip=None)
    schedule: Schedule = Schedule(warmup=500, warmup_ratio=0.001)
    seed: int = 0
    device: Literal["cpu", "cuda"] | None = None
    workers: int = 2
    checkpoint_every: int = 1000
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "steps", "batch_size", "checkpoint_every")
        if not 32 <= self.size[0] <= self.size[1]:
            raise UserError(
                f"size is {self.size}; give the short side, 32 or more, and the longest that the other may be"
            )
        if self.model not in DETECTORS:
            raise UserError(f"unknown detector {self.model!r}; choose from {', '.join(DETECTORS)}")


class Detector(NamedTuple):
    """A network with all that a folder says of it."""

    network: nn.Module
    config: dict[str, Any]  # name, options, classes

    @property
    def names(self) -> list[str]:
        """Class names in the order of the labels."""
        return list(self.config["classes"])


class Draws:
    """The endless sequence of training draws: image permutation(d // n)[d % n], mirrored by a coin of (seed, d)."""

    def __init__(self, dataset: BoxDataset, *, seed: int, flip: float) -> None:
        self.dataset, self.seed, self.flip = dataset, seed, flip

    def __getitem__(self, draw: int) -> tuple[Tensor, Target, str]:
        count = self.dataset.counts["train"]
        epoch, place = divmod(draw, count)
        sample = self.dataset.read("train", int(permutation(self.seed, epoch, count)[place]))
        image, target = tensors(sample)
        if np.random.default_rng([self.seed, draw]).random() < self.flip:
            boxes, width = target["boxes"], image.shape[-1]
            image = image.flip(-1)
            target["boxes"] = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
        return image, target, sample.name


def tensors(sample: BoxSample) -> tuple[Tensor, Target]:
    """The image (3, H, W) in 0..1, and the boxes that a detector learns: all but crowds."""
    single = ~sample.boxes.crowd
    boxes = {
        "boxes": torch.from_numpy(sample.boxes.corners[single]),
        "labels": torch.from_numpy(sample.boxes.labels[single]),
    }
    return picture(sample.image), boxes


def picture(image: Any) -> Tensor:
    """(H, W, 3) uint8 as a tensor (3, H, W) in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255


def train_detector(run: Detection) -> dict[str, Any]:
    """Train a detector; returns COCO's figures on the val split, {} where there is none.

    On the CPU a resumed run ends as one that was never stopped. Raises UserError for anything the user can mend.
    """
    folder, device = Path(run.out), torch.device(run.device or default_device())
    run = replace(run, data=located(run.data))
    dataset = open_boxes(run.data)
    if not dataset.counts.get("train"):
        raise UserError(f"{run.data} has no training images; it has {', '.join(dataset.counts) or 'no splits'}")
    if dataset.counts.get("val"):
        need_pycocotools()  # now, and not after hours of training
    set_seed(run.seed)
    detector = create_detector(run.model, dataset.names, run.options | {"size": list(run.size)}, weights=run.weights)
    detector.network.to(device)
    with locked(folder):
        claim(folder, asdict(run))
        write_environment(folder)
        fit_detector(detector.network, dataset, run, device)
        save_detector(detector, folder / "model")
        if not dataset.counts.get("val"):
            return {}
        found = coco_figures(detector, dataset, "val", device=device)
        write_json(folder / "val.json", found)
    return found


def fit_detector(network: nn.Module, dataset: BoxDataset, run: Detection, device: torch.device) -> None:
    """The training loop, from the last checkpoint on where the run is resumed."""
    folder = Path(run.out)
    optimizer = make_optimizer(parameter_rates(network.named_parameters(), run.optim), run.optim)
    start = restored(folder, network, optimizer) if run.resume else 0
    history = folder / "metrics.jsonl"
    before = history.read_text(encoding="utf-8").splitlines(keepends=True) if history.is_file() else []
    write_text(history, "".join(before[:start]))
    network.train()
    with history.open("a", encoding="utf-8") as file, progress_bar("training") as progress:
        for step, (images, targets, names) in enumerate(batches(dataset, run, start), start=start):
            started = time.perf_counter()
            _, lr = set_rates(optimizer, run.schedule, step, run.steps)
            terms = network(
                [image.to(device) for image in images],
                [{key: value.to(device) for key, value in target.items()} for target in targets],
            )
            values = {name: float(value.detach()) for name, value in terms.items()}
            if not math.isfinite(sum(values.values())):
                raise UserError(f"the loss is {values} at step {step + 1} ({', '.join(names)}); lower the rate")
            torch.stack(list(terms.values())).sum().backward()
            norm = float(clip_gradients(network.parameters(), run.optim.clip))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            row = {"step": step + 1, "loss": sum(values.values()), **{f"loss_{key}": v for key, v in values.items()}}
            row |= {"lr": lr, "grad_norm": norm, "seconds": time.perf_counter() - started}
            file.write(json.dumps(row) + "\n")
            file.flush()
            progress(step + 1, run.steps)
            if step + 1 == run.steps or (step + 1) % run.checkpoint_every == 0:
                state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                replace_state(folder / STATE, folder / PREVIOUS_STATE, state | {"random": random_state()})


def batches(dataset: BoxDataset, run: Detection, start: int) -> Iterator[Any]:
    """(images, targets, names) of each step from `start` to the end."""
    size = run.batch_size
    chosen = [list(range(step * size, (step + 1) * size)) for step in range(start, run.steps)]
    draws: Any = Draws(dataset, seed=run.seed, flip=run.flip)
    own = torch.Generator()  # else the loader draws from the one that dropout is to find as it was saved
    return iter(DataLoader(draws, batch_sampler=chosen, num_workers=run.workers, collate_fn=unzipped, generator=own))


def unzipped(samples: list[Any]) -> tuple[Any, ...]:
    """Images, targets and names apart: their sizes differ, so they cannot be stacked."""
    return tuple(zip(*samples, strict=True))


# Folders


def create_detector(name: str, classes: Any, options: dict[str, Any], *, weights: str | None = None) -> Detector:
    """A detector by name. Raises UserError for options that it does not have."""
    accepted = list(inspect.signature(DETECTORS[name]).parameters)
    for option in options:
        if option not in accepted:
            raise UserError(f"{name} has no option {option!r}; it has {', '.join(accepted)}")
    kept = json.loads(json.dumps(options))
    network = DETECTORS[name](num_classes=len(classes), weights=weights, **kept)
    return Detector(network, {"name": name, "options": kept, "classes": list(classes)})


def save_detector(detector: Detector, folder: Path) -> None:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in detector.network.state_dict().items()}
    write_json(folder / "config.json", {"model_type": "segvit_detector", "version": __version__, **detector.config})
    with open_atomic(folder / "model.safetensors") as file:
        file.write(serialize(state, metadata={"format": "pt"}))


def load_detector(source: str | Path, *, device: str | torch.device = "cpu") -> Detector:
    """A detector from a run or model folder, ready to use. Raises UserError when there is none or it is damaged."""
    folder = next((path for path in (Path(source), Path(source) / "model") if (path / "config.json").is_file()), None)
    if folder is None:
        raise UserError(f"{source} holds no detector (no config.json, no model/config.json); give a run folder")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        detector = create_detector(config["name"], config["classes"], config["options"])
        detector.network.load_state_dict(load_file(folder / "model.safetensors"))
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise UserError(f"{folder} cannot be read as a detector ({str(error)[:200]}); copy the folder again") from error
    return detector._replace(network=detector.network.to(device).eval())


# Using and measuring


@torch.inference_mode()
def detections(network: nn.Module, image: Any, device: torch.device) -> Target:
    """The boxes of one image (H, W, 3) uint8, the surest first, on the CPU."""
    network.eval()
    found: Target = network([picture(image).to(device)])[0]
    return {key: value.cpu() for key, value in found.items()}


def need_pycocotools() -> tuple[Any, Any]:
    """COCO's own data set and evaluation classes, or a UserError that says how to get them."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise UserError("COCO's mAP needs pycocotools, which is not installed; pip install segvit[detect]") from error
    return COCO, COCOeval


def coco_figures(detector: Detector, dataset: BoxDataset, split: str, *, device: torch.device) -> dict[str, Any]:
    """COCO's box AP over IoU 0.50:0.95 and its parts, and the AP of each class; None where no such object exists."""
    if not dataset.counts.get(split):
        raise UserError(f"the {split} split holds no images; name another with --split or add some")
    if detector.names != list(dataset.names):
        raise UserError(f"the detector knows {detector.names[:5]} and the data has {list(dataset.names)[:5]}")
    coco_class, eval_class = need_pycocotools()
    truth: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    truth["categories"] = [{"id": number, "name": name} for number, name in enumerate(dataset.names)]
    results: list[dict[str, Any]] = []
    with progress_bar("evaluating") as progress:
        for i in range(dataset.counts[split]):
            sample = dataset.read(split, i)
            truth["images"].append({"id": i})
            truth["annotations"] += coco_objects(sample, i, first=len(truth["annotations"]) + 1)
            results += coco_results(detections(detector.network, sample.image, device), i)
            progress(i + 1, dataset.counts[split])
    with redirect_stdout(StringIO()):  # it prints what it does
        known = coco_class()
        known.dataset = truth
        known.createIndex()
        judge = eval_class(known, known.loadRes(results) if results else coco_class(), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    figures = {name: _known(value) for name, value in zip(STATISTICS, judge.stats, strict=False)}
    precision = judge.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class) over all sizes, 100 detections an image
    each = {name: _mean(precision[:, :, number]) for number, name in enumerate(dataset.names)}
    return {**figures, "classes": each, "images": dataset.counts[split], "split": split}


def coco_objects(sample: BoxSample, image: int, *, first: int) -> list[dict[str, Any]]:
    """The objects of an image as COCO has them."""
    return [
        {"id": first + n, "image_id": image, "category_id": int(label), "bbox": _sides(corners), "area": float(area),
         "iscrowd": int(crowd)}
        for n, (corners, label, area, crowd) in enumerate(zip(*sample.boxes, strict=True))
    ]  # fmt: skip


def coco_results(found: Target, image: int) -> list[dict[str, Any]]:
    """Detections in COCO's format of results."""
    rows = zip(found["boxes"].numpy(), found["labels"].tolist(), found["scores"].tolist(), strict=True)
    return [{"image_id": image, "category_id": label, "bbox": _sides(corners), "score": score}
            for corners, label, score in rows]  # fmt: skip


def _sides(corners: Any) -> list[float]:
    """COCO's left, top, width, height."""
    left, top, right, bottom = (float(value) for value in corners)
    return [left, top, right - left, bottom - top]


def _known(value: float) -> float | None:
    """COCO writes -1 for what does not exist."""
    return float(value) if value >= 0 else None


def _mean(values: Any) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None


def detect_files(source: str, model: str, out: Path, *, threshold: float, device: str | None) -> list[dict[str, str]]:
    """Write NAME.json (class, score and box of each detection) and NAME.png (the boxes drawn) for each image."""
    where = torch.device(device or default_device())
    detector = load_detector(model, device=where)
    colors = generate_palette(len(detector.names))
    written = []
    for path, name in find_images(source).items():
        image = read_image(path)
        found = detections(detector.network, image, where)
        rows = zip(found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True)
        kept = [
            {"class": detector.names[label], "score": round(score, 4), "box": [round(side, 2) for side in box]}
            for box, label, score in rows if score >= threshold
        ]  # fmt: skip
        drawn = Image.fromarray(image)
        pen = ImageDraw.Draw(drawn)
        for row in kept:
            color = colors[detector.names.index(str(row["class"]))]
            pen.rectangle(row["box"], outline=color, width=2)
            pen.text((row["box"][0] + 3, row["box"][1] + 1), f"{row['class']} {row['score']:.2f}", fill=color)
        target = out / name.with_suffix(".json")
        write_json(target, kept)
        with open_atomic(target.with_suffix(".png")) as file:
            drawn.save(file, "PNG")
        written.append({"image": str(path), "boxes": str(target), "picture": str(target.with_suffix(".png"))})
    return written
