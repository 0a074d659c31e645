"""Which files a command reads and which it writes."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from segvit.contracts import UserError
from segvit.data.dataset import IMAGE_SUFFIXES
from segvit.data.volumes import is_nifti


def default_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_folder(model: str) -> Path:
    """predictions/ in the run folder, or here when the model is no run."""
    run = Path(model)
    return run / "predictions" if (run / "config.yaml").is_file() else Path("predictions")


def find_images(source: str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> dict[Path, Path]:
    """Images of a file, folder (recursively) or glob pattern, each with its name below the source.

    Several sources stand on lines of their own, as the command line passes `photos/*.jpg` once a shell has expanded it.
    Raises UserError when there are none.
    """
    path = Path(source).expanduser()
    if "\n" in source:
        found = sorted({file for part in source.split("\n") for file in find_images(part, suffixes)})
        shared = os.path.commonpath([file.parent for file in found])
        named = {file: file.relative_to(shared) for file in found}
    elif path.is_dir():
        kinds = tuple(suffixes)
        found = sorted(file for file in path.rglob("*") if file.name.lower().endswith(kinds) and file.is_file())
        named = {file: file.relative_to(path) for file in found}
    elif path.is_file():
        named = {path: Path(path.name)}
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        shared = os.path.commonpath([file.parent for file in found]) if found else ""
        named = {file: file.relative_to(shared) for file in found}  # two folders may hold files of one name
    if not named:
        kinds_told = ", ".join(suffix[1:] for suffix in suffixes)
        raise UserError(f"{source}: no such image, and no images in it or matching it ({kinds_told})")
    return named


def output_names(labels: Path, extra: dict[str, bool]) -> dict[str, Path]:
    """The files of one image: the label map, and beside it what was asked for."""
    others = {
        "overlay": labels.with_name(f"{labels.stem}_overlay.png"),
        "scores": labels.with_name(f"{labels.stem}_scores.npz"),
        "areas": labels.with_suffix("").with_suffix(".json") if is_nifti(labels) else labels.with_suffix(".json"),
    }
    return {"labels": labels} | {kind: path for kind, path in others.items() if extra[kind]}


def check_names(images: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Raise UserError when an output would replace an input or another output."""
    inputs = {path.resolve() for path in images}
    seen: set[Path] = set()
    for path in outputs:
        if path.resolve() in inputs:
            raise UserError(f"{path} would replace an input image; choose another --out")
        if path in seen:
            raise UserError(f"{path} would be written for two images; rename one, or segment them into two folders")
        seen.add(path)
