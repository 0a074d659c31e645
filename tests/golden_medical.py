"""Builders of our counterparts to the golden cases of medical metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from segvit.metrics.polyp import image_measures
from segvit.metrics.volume import Package, overlap, surface_distances
from tests.golden.run import Case


def polyp(case: Case) -> dict[str, Tensor]:
    found = image_measures(
        case.inputs["pred"].numpy(), case.inputs["gt"].numpy(), alpha=case.config.get("alpha", 0.5),
        beta=case.config.get("beta", 1.0),
    )  # fmt: skip
    curves = {"dice": found.dice, "iou": found.iou, "e_measure": found.e}
    values = {
        "dice_binary": found.dice_half, "iou_binary": found.iou_half, "e_measure_adaptive": found.e_adaptive,
        "mae": found.mae, "s_measure": found.s, "weighted_f": found.weighted_f,
    }  # fmt: skip
    for name, curve in curves.items():
        values |= {f"{name}_mean": curve.mean(), f"{name}_max": curve.max()}
    return {
        **{f"{name}_curve": torch.from_numpy(curve) for name, curve in curves.items()},
        **{name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()},
    }


def surface(case: Case) -> dict[str, Tensor]:
    pred, truth = case.inputs["pred"].numpy() > 0, case.inputs["gt"].numpy() > 0
    values = {"dice": overlap(pred, truth).dice}
    for unit, spacing in {"mm": tuple(case.config["spacing"]), "voxel": "voxel"}.items():
        of = {name: surface_distances(pred, truth, spacing=spacing, package=name) for name in get_args(Package)}
        values |= {f"{name}_hd95_{unit}": found.hausdorff(95.0) for name, found in of.items()}
        values[f"medpy_hd_{unit}"] = of["medpy"].hausdorff(100.0)
        values |= {f"{name}_asd_{unit}": of[name].average() for name in ("monai",)}
        values |= {f"{name}_assd_{unit}": of[name].symmetric_average() for name in ("medpy", "monai")}
        for name, middle in {"medpy": "asd", "deepmind": "avg"}.items():
            values[f"{name}_{middle}_pred_to_gt_{unit}"] = of[name].average()
            values[f"{name}_{middle}_gt_to_pred_{unit}"] = of[name].average_back()
    return {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}


MEDICAL: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {
    ("medical_metrics", "polyp"): polyp,
    ("medical_metrics", "surface"): surface,
}
