"""Export at the command line."""

from __future__ import annotations

from typing import Literal

from segvit.cli.parsing import show
from segvit.contracts import UserError

Format = Literal["pt2", "onnx", "openvino"]
Precision = Literal["fp32", "bf16", "int8"]


def export(
    run: str, *, format: Format = "onnx", precision: Precision = "fp32", out: str | None = None,
    readout: Literal["outside", "inside"] = "outside", data: str | None = None, sizes: str | None = None,
    keep_fp32: str | None = None, images: int = 32, calibration: int = 64, json: bool = False,
) -> None:  # fmt: skip
    """Write a model as one file for ONNX Runtime, OpenVINO or torch, and prove that it says the same.

    The file is compared with PyTorch in fp32 at several sizes, and with --data on validation images; above the bounds
    it is not left in place. The report stands beside it, NAME.gate.md and NAME.gate.json.

    Args:
        run: Run folder, model folder or hub id.
        format: onnx (.onnx), openvino (.xml and .bin) or pt2 (torch.export).
        precision: bf16 is for openvino and pt2, int8 for openvino and onnx.
        out: File to write; None = export/ in the run folder, or here.
        readout: inside, the graph gives scores and labels at the input's size; outside, small maps that Predictor reads
            in bands of rows, for large images and many classes.
        data: Dataset: training images calibrate int8, validation images go through the gate; None = the one that the
            run was trained on, if it is still there; none = no data.
        sizes: Three or more sizes to compare at, such as 512x512,384x640,200x333; None = around the model's own.
        keep_fp32: With int8, layers that stay in fp32, parted by commas, such as head,backbone.blocks.0.
        images: Validation images to compare on, at most.
        calibration: Training images to calibrate on, at most.
        json: Print the report as JSON.
    """
    from segvit.export.build import Plan, default_path, export_model
    from segvit.export.engines import own_data
    from segvit.model_folder import load_model

    source = own_data(run) if data is None else data
    kept = tuple(name.strip() for name in keep_fp32.split(",")) if keep_fp32 else ()
    plan = Plan(
        format=format, precision=precision, readout=readout, data=None if source == "none" else source,
        sizes=parse_sizes(sizes), keep_fp32=kept, images=images, calibration=calibration,
    )  # fmt: skip
    plan.check()
    result = export_model(load_model(run), out or default_path(run, plan), plan)
    show(result.to_json(), json, f"{result.to_text()}\n{result.path}")


def parse_sizes(text: str | None) -> tuple[tuple[int, int], ...]:
    """`512x512,384x640` as (height, width) pairs. Raises UserError for anything else."""
    sizes = []
    for part in text.split(",") if text else ():
        height, _, width = part.strip().partition("x")
        if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            raise UserError(f"sizes are height x width, such as 512x512,384x640,200x333; got {part!r}")
        sizes.append((int(height), int(width)))
    return tuple(sizes)
