"""Exports of trained models in every format and precision: gates, and predictions from clean processes.

    python benchmarks/exports.py runs/segvit_camvid runs/ddrnet_camvid --data camvid --table exports.md

Every `segvit export` and every `segvit predict` runs in a process of its own. The label images of the exported file are
compared with those of PyTorch in fp32 pixel by pixel. What the gate refuses stands in the table with its reason; int8
is then tried again with the layers in fp32 that the refusal names.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

from segvit.bench.measure import processor
from segvit.data.dataset import open_dataset
from segvit.files import write_text

KINDS = (
    ("onnx", "fp32", ".onnx"), ("onnx", "int8", ".onnx"), ("openvino", "fp32", ".xml"), ("openvino", "bf16", ".xml"),
    ("openvino", "int8", ".xml"), ("pt2", "fp32", ".pt2"), ("pt2", "bf16", ".pt2"),
)  # fmt: skip
PHOTOS = 5
HEAD = ("run", "format", "precision", "export", "labels that differ in the gate", "mIoU", "gate",
        "pixels that differ in predictions")  # fmt: skip


def segvit(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    command = [str(Path(sys.executable).with_name("segvit")), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def labels(model: Path, photos: Path, out: Path) -> dict[str, np.ndarray]:
    """What `segvit predict` writes for each photograph."""
    done = segvit("predict", photos, "--model", model, "--out", out)
    if done.returncode:
        raise SystemExit(f"segvit predict --model {model}: {done.stderr}")
    return {path.name: np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))}


def row(
    run: Path, kind: tuple[str, str, str], expected: dict[str, np.ndarray], options: argparse.Namespace, work: Path,
    keep: list[str],
) -> tuple[list[str], list[str]]:  # fmt: skip
    """One export, its gate and its predictions beside those of PyTorch; and the layers that a refusal names."""
    format, precision, suffix = kind
    path = work / f"{run.name}-{precision}{suffix}"
    start = time.perf_counter()
    done = segvit("export", run, "--format", format, "--precision", precision, "--out", path, "--data", options.data,
                  "--images", str(options.images), *(["--keep_fp32", ",".join(keep)] if keep else []))  # fmt: skip
    shown = f"{precision}, fp32 in {', '.join(keep)}" if keep else precision
    spent = time.perf_counter() - start
    report = path.with_name(f"{path.name}.gate.json")
    if not report.is_file():
        return [run.name, format, shown, f"{spent:.0f} s", "-", "-", done.stderr.strip().splitlines()[-1], "-"], []
    gate = json.loads(report.read_text())
    differing = f"{100 * (1 - gate['label_agreement']):.4f} %"
    before, after = gate["miou"]
    found = [run.name, format, shown, f"{spent:.0f} s", differing, f"{before:.4f} -> {after:.4f}"]
    if done.returncode:
        named = [layer["layer"] for layer in gate["costly_layers"]] if precision == "int8" else []
        return [*found, f"refused: {'; '.join(gate['failures'])}", "-"], named
    got = labels(path, work / "photos", work / f"{path.name}-labels")
    pixels = sum(one.size for one in expected.values())
    other = sum(int((got[name] != one).sum()) for name, one in expected.items())
    return [*found, "passed", f"{other} of {pixels}"], []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--data", required=True, help="data set whose validation images go through the gate")
    parser.add_argument("--images", type=int, default=32, help="of them, at most")
    parser.add_argument("--table", type=Path, help="Where to write the table, a Markdown file.")
    options = parser.parse_args()
    data = open_dataset(options.data)
    count = data.count("val")
    rows = [list(HEAD), ["---"] * len(HEAD)]
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        (work / "photos").mkdir()
        for number in range(PHOTOS):
            shutil.copy(data.image_path("val", number * count // PHOTOS), work / "photos")
        for run in options.runs:
            expected = labels(run, work / "photos", work / f"{run.name}-torch")
            for kind in KINDS:
                cells, named = row(run, kind, expected, options, work, [])
                rows.append(cells)
                if named:
                    rows.append(row(run, kind, expected, options, work, named)[0])
                print("| " + " | ".join(rows[-1]) + " |", flush=True)
    packages = ", ".join(f"{n} {metadata.version(n)}" for n in ("torch", "onnx", "onnxruntime", "openvino", "nncf"))
    text = "\n".join([
        "# Exports of trained models", "", *("| " + " | ".join(cells) + " |" for cells in rows), "",
        f"{processor()}; {packages}; {date.today().isoformat()}. Seconds are those of the whole command. Every export "
        f"and every prediction (of {PHOTOS} validation images) ran in a process of its own.", "",
        f"    python benchmarks/exports.py {' '.join(sys.argv[1:])}", "",
    ])  # fmt: skip
    if options.table is not None:
        write_text(options.table, text)


if __name__ == "__main__":
    main()
