"""Builders for the protocol of mmsegmentation 0.24: pipeline, schedule, groups, sliding windows, metric, end to end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.contracts import Classes, Dense, InputSpec, Readout, Sample
from segvit.data import prepare, transforms
from segvit.data.resize import scaled_size
from segvit.engine.optim import parameter_rates
from segvit.engine.schedule import learning_rate
from segvit.engine.settings import Optim, Schedule
from segvit.inference.predictor import Predictor, Views
from segvit.inference.windows import WindowedScores, place_windows
from segvit.metrics.confusion import ConfusionMatrix
from segvit.nn.readout import logit_rows
from segvit.systems import segvit
from tests.golden.run import Case


def optim_settings(config: dict[str, Any]) -> Optim:
    """Our optimiser settings from mmcv's `custom_keys`."""
    keys = config["paramwise_cfg"]["custom_keys"]
    return Optim(
        lr=config["lr"], betas=tuple(config["betas"]), weight_decay=config["weight_decay"],
        lr_mult={k: v["lr_mult"] for k, v in keys.items() if "lr_mult" in v},
        decay_mult={k: v["decay_mult"] for k, v in keys.items() if "decay_mult" in v},
    )  # fmt: skip


def schedule_settings(config: dict[str, Any]) -> Schedule:
    """Our schedule from mmcv's `lr_config`."""
    warmup = config["warmup_iters"] if config.get("warmup") else 0
    ratio = config.get("warmup_ratio", 1.0)
    return Schedule(kind="poly", power=config["power"], min_lr=config["min_lr"], warmup=warmup, warmup_ratio=ratio)


def numbered(count: int) -> Classes:
    return Classes(tuple(str(i) for i in range(count)), tuple((i, i, i) for i in range(count)))


def input_spec(config: dict[str, Any]) -> InputSpec:
    """Our input spec from a case's mmseg test pipeline (means are on 0..255)."""
    test = config.get("test_cfg", {})
    scale = tuple(config["img_scale"])
    keep = config.get("keep_ratio", True)
    return InputSpec(
        mean=tuple(value / 255 for value in config["mean"]), std=tuple(value / 255 for value in config["std"]),
        scale=scale if keep else None, exact=None if keep else (scale[1], scale[0]), min_side=config.get("min_size"),
        window=tuple(test["crop_size"]) if test.get("mode") == "slide" else None,
        stride=tuple(test["stride"]) if test.get("mode") == "slide" else None,
    )  # fmt: skip


def resize(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    checks = {}
    for number, row in enumerate(case.data["cases"]):
        keep, scale = row["keep_ratio"], tuple(row["img_scale"])
        spec = InputSpec(
            scale=scale if keep else None, exact=None if keep else (scale[1], scale[0]), min_side=row["min_size"]
        )
        ours = prepare.target_size((row["h"], row["w"]), spec)
        if keep:
            assert ours == scaled_size((row["h"], row["w"]), scale=scale, min_side=row["min_size"])
        checks[f"check:{number}"] = (torch.tensor(ours), torch.tensor(row["out_hw"]))
    return checks


def normalize_pad(case: Case) -> dict[str, Tensor]:
    config = case.config
    spec = InputSpec(mean=tuple(m / 255 for m in config["mean"]), std=tuple(s / 255 for s in config["std"]))
    bgr = case.inputs["image_bgr"].numpy()
    image = np.ascontiguousarray(bgr[..., ::-1] if config.get("to_rgb", True) else bgr)
    padded, mask = prepare.pad(
        prepare.normalise(image, spec), case.inputs["label"].numpy(), tuple(config["size"]), config["seg_pad_val"]
    )
    return {"image": padded.permute(1, 2, 0), "label_out": torch.from_numpy(mask)}


def poly_lr(case: Case) -> dict[str, Tensor]:
    config, schedule = case.config, schedule_settings(case.config)
    rows = [
        [learning_rate(schedule, int(step), base=base, steps=config["max_iters"]) for base in config["base_lrs"]]
        for step in case.inputs["iterations"]
    ]
    return {"lr": torch.tensor(rows, dtype=torch.float64)}


def param_groups(case: Case) -> dict[str, Tensor]:
    named = [(name, nn.Parameter(torch.zeros(1))) for name in case.data["names"]]
    rates = parameter_rates(named, optim_settings(case.config))
    return {"lr_wd": torch.tensor([[rate.lr, rate.weight_decay] for rate in rates], dtype=torch.float64)}


def metric(case: Case) -> dict[str, Tensor]:
    config = case.config
    count, ignore = config["num_classes"], config["ignore_index"]
    total, outputs = ConfusionMatrix(count, ignore), {}
    for number in range(len([name for name in case.inputs if name.startswith("label")])):
        label = case.inputs[f"label{number}"].numpy()
        if config.get("reduce_zero_label"):
            label = np.where(label == 0, 255, np.where(label == 255, 255, label.astype(int) - 1))
        outputs |= add_image(total, f"img{number}", case.inputs[f"pred{number}"].numpy(), label)
    return outputs | figures(total)


def add_image(total: ConfusionMatrix, name: str, prediction: Any, label: Any) -> dict[str, Tensor]:
    """Count an image and give its areas under the official names."""
    single = ConfusionMatrix(total.num_classes, total.ignore_index)
    single.update(prediction, label)
    total.add(single)
    return {f"{name}_area_{part}": torch.from_numpy(area) for part, area in single.areas()._asdict().items()}


def figures(total: ConfusionMatrix) -> dict[str, Tensor]:
    metrics = total.metrics()
    classwise = {"IoU": metrics.iou, "Acc": metrics.acc, "Dice": metrics.dice, "Fscore": metrics.fscore,
                 "Precision": metrics.precision, "Recall": metrics.recall}  # fmt: skip
    means = {"mIoU": metrics.miou, "mAcc": metrics.macc, "aAcc": metrics.aacc}
    outputs = {name: torch.from_numpy(np.asarray(value)) for name, value in classwise.items()}
    return outputs | {name: torch.tensor([value], dtype=torch.float64) for name, value in means.items()}


class ConvRuntime:
    """The slide case's network: average pooling, one convolution, logits at half resolution."""

    def __init__(self, case: Case) -> None:
        config = case.config
        self.weight, self.bias = case.weights["conv.weight"], case.weights["conv.bias"]
        self.spec = InputSpec(window=tuple(config["crop_size"]), stride=tuple(config["stride"]))
        self.classes, self.readout = numbered(config["num_classes"]), Readout(logit_rows)

    def __call__(self, images: Tensor) -> Dense:
        logits = F.conv2d(F.avg_pool2d(images, 2), self.weight, self.bias, padding=1)
        return Dense(logits, {}, (images.shape[-2], images.shape[-1]))


def slide(case: Case) -> dict[str, Tensor]:
    config, run = case.config, ConvRuntime(case)
    image = case.inputs["image"]
    size, original = (image.shape[-2], image.shape[-1]), tuple(config["ori_shape"])
    boxes = [box for row in place_windows(size, tuple(config["crop_size"]), tuple(config["stride"])) for box in row]
    count = torch.zeros(size)
    for box in boxes:
        count[box.top : box.bottom, box.left : box.right] += 1
    small = in_bands(WindowedScores(run, image[0]), size)
    large = in_bands(WindowedScores(run, image[0]), original)
    softmax = large.softmax(0)
    if config.get("flip"):
        softmax = softmax.flip(-1)
    return {
        "count": count, "windows_y1y2x1x2": torch.tensor([list(box) for box in boxes]),
        "logits_input_size": small[None], "logits_ori_size": large[None], "softmax_ori_size": softmax[None],
        "label": softmax.argmax(0),
    }  # fmt: skip


def in_bands(view: WindowedScores, size: tuple[int, int], rows: int = 7) -> Tensor:
    """All rows of a view, read in small bands as the predictor does."""
    bands = [view.rows_at(size, range(top, min(top + rows, size[0]))) for top in range(0, size[0], rows)]
    return torch.cat(bands, dim=1)


class ModelRuntime:
    """A golden model with the case's test pipeline."""

    def __init__(self, model: nn.Module, spec: InputSpec, classes: Classes) -> None:
        self.model, self.spec, self.classes, self.readout = model, spec, classes, segvit.READOUT

    def __call__(self, images: Tensor) -> Dense:
        return self.model(images)


def protocol(case: Case) -> dict[str, Tensor]:
    """The whole test pipeline of mmseg on raw images, through prepare, windows, views and the metric."""
    from tests.golden_cases import segvit_model

    config = case.config
    model = segvit_model(config["model"], case.weights)
    run = ModelRuntime(model, input_spec(config), numbered(config["num_classes"]))
    ratios = config["img_ratios"] or [1.0]
    predictor = Predictor(run, views=Views(scales=tuple(ratios), flip=config["flip"]))
    total, outputs = ConfusionMatrix(config["num_classes"], config["ignore_index"]), {}
    with torch.inference_mode():
        for number in range(config["num_images"]):
            image, label = case.inputs[f"image{number}"].numpy(), case.inputs[f"label{number}"].numpy()
            if config.get("reduce_zero_label"):
                label = np.where(label == 0, 255, np.where(label == 255, 255, label.astype(int) - 1)).astype(np.uint8)
            for place, ratio in enumerate(ratios):
                outputs[f"img{number}_resized{place}"] = torch.from_numpy(prepare.resize_for(image, run.spec, ratio))
                outputs[f"img{number}_normalised{place}"] = prepare.prepare(image, run.spec, ratio=ratio)
            view = WindowedScores(run, prepare.prepare(image, run.spec, ratio=ratios[0]))
            outputs[f"img{number}_scores_view0_ori_size"] = in_bands(view, image.shape[:2])
            bands = torch.cat([band for _, band in predictor.bands(image)], dim=1)
            single = len(ratios) == 1 and not config["flip"]
            outputs[f"img{number}_mean_softmax"] = bands.softmax(0) if single else bands
            prediction, _ = predictor.segment(image)
            outputs[f"img{number}_pred"] = torch.from_numpy(prediction)
            outputs |= add_image(total, f"img{number}", prediction, label)
    outputs |= figures(total)
    means = [float(outputs[name]) for name in ("mIoU", "mAcc", "aAcc")]
    reported = [round(100 * value, 2) / 100 for value in means]
    return outputs | {"reported_mIoU_mAcc_aAcc": torch.tensor(reported, dtype=torch.float64)}


def photometric(case: Case) -> dict[str, Tensor]:
    image = case.inputs["image"].numpy()
    hsv = transforms.rgb_to_hsv(image)
    outputs = {"hsv_cv2": hsv, "rgb_from_hsv_cv2": transforms.hsv_to_rgb(hsv), "none": image}
    for row in case.data["cases"]:
        outputs[row["name"]] = replay(image, row)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in outputs.items()}


def replay(image: Any, row: dict[str, Any]) -> Any:
    """One operation, or the whole distortion with the official draws replaced by fixed answers."""
    operations = {
        "brightness": lambda: transforms.brightness(image, row["delta"]),
        "contrast": lambda: transforms.contrast(image, row["factor"]),
        "saturation": lambda: transforms.saturation(image, row["factor"]),
        "hue": lambda: transforms.hue(image, row["delta"]),
    }
    if row["op"] in operations:
        return operations[row["op"]]()
    return transforms.photometric(
        Sample(image, np.zeros(image.shape[:2], np.uint8)), FixedAnswers(row["answers"])
    ).image


class FixedAnswers:
    """A generator that gives the case's answers in the order in which they are asked for."""

    def __init__(self, answers: list[float]) -> None:
        self.answers = list(answers)

    def integers(self, *bounds: int) -> int:
        return int(self.answers.pop(0))

    def uniform(self, *bounds: float) -> float:
        return float(self.answers.pop(0))

    def random(self) -> float:
        return 0.0 if self.answers.pop(0) else 1.0


def crop_rule(case: Case) -> dict[str, Any]:
    accepted = []
    labels = case.inputs["labels"].numpy()
    for box, ratio in zip(case.inputs["box"].tolist(), case.inputs["cat_max_ratio"].tolist(), strict=True):
        number, top, bottom, left, right = box
        crop = labels[number, top:bottom, left:right]
        accepted.append(ratio >= 1 or transforms.crop_accepted(crop, ratio, case.config["ignore_index"]))
    return {"accepted": torch.tensor(accepted, dtype=torch.uint8)} | redraws(case, labels)


def redraws(case: Case, labels: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """How often the crop is drawn again, with candidate boxes given by the case."""
    setup, checks = case.data["redraw_setup"], {}
    for number, row in enumerate(case.data["redraw"]):
        drawn: list[bool] = []

        class Boxes:
            """Offsets of the bad box for the first draws, then of the good one; height is asked for first."""

            def integers(self, *bounds: int, drawn: list[bool] = drawn, row: dict[str, Any] = row) -> int:
                good = len(drawn) // 2 >= row["first_bad"]
                box = setup["good_box"] if good else setup["bad_box"]
                drawn.append(good)
                return int(box[0] if len(drawn) % 2 else box[2])

        transforms.choose_crop(
            labels[setup["label"]], tuple(case.config["crop_size"]), setup["cat_max_ratio"], Boxes(),
            case.config["ignore_index"],
        )  # fmt: skip
        ours = torch.tensor([len(drawn) // 2, len(drawn) // 2 - 1, int(drawn[-1])])
        checks[f"check:redraw{number}"] = (
            ours,
            torch.tensor([row["draws"], row["used_draw"], int(row["used_is_good"])]),
        )
    return checks


MMSEG: dict[tuple[str, str], Callable[[Case], Any]] = {
    ("mmseg", "resize"): resize,
    ("mmseg", "normalize_pad"): normalize_pad,
    ("mmseg", "poly_lr"): poly_lr,
    ("mmseg", "param_groups"): param_groups,
    ("mmseg", "metric"): metric,
    ("mmseg", "slide"): slide,
    ("mmseg", "protocol"): protocol,
    ("mmseg", "photometric"): photometric,
    ("mmseg", "crop_rule"): crop_rule,
}
