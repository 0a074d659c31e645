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


def find_images(
    source: str, suffixes: Sequence[str] = IMAGE_SUFFIXES, *, leave_out: Path | None = None
) -> dict[Path, Path]:
    """Images of a file, folder (recursively) or glob pattern, each with its name below the source.

    Several sources stand on lines of their own, as the command line passes `photos/*.jpg` once a shell has expanded it.
    A search passes over the folder `leave_out`, where the results go, unless it finds nothing outside.
    Raises UserError when there are none.
    """
    path = Path(source).expanduser()
    if "\n" in source:
        parts = (find_images(part, suffixes, leave_out=leave_out) for part in source.split("\n"))
        named = _below_shared(sorted({file for part in parts for file in part}))
    elif path.is_dir():
        kinds = tuple(suffixes)
        found = (file for file in path.rglob("*") if file.name.lower().endswith(kinds) and file.is_file())
        named = {file: file.relative_to(path) for file in _outside(leave_out, sorted(found))}
    elif path.is_file():
        named = {path: Path(path.name)}
    else:
        found = (Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        named = _below_shared(_outside(leave_out, sorted(found)))  # two folders may hold files of one name
    if not named:
        kinds_told = ", ".join(suffix[1:] for suffix in suffixes)
        raise UserError(f"{source}: no such image, and no images in it or matching it ({kinds_told})")
    return named


def _outside(folder: Path | None, files: list[Path]) -> list[Path]:
    """The files that do not lie in a folder, or all where all do: then it is what was asked for."""
    if folder is None:
        return files
    inside = folder.resolve()
    return [file for file in files if inside not in file.resolve().parents] or files


def _below_shared(files: list[Path]) -> dict[Path, Path]:
    """Each file with its name below the folder that all share."""
    places = [Path(os.path.abspath(file)) for file in files]  # relative and absolute names have no shared folder
    shared = os.path.commonpath([place.parent for place in places]) if places else ""
    return {file: place.relative_to(shared) for file, place in zip(files, places, strict=True)}


def output_names(labels: Path, extra: dict[str, bool]) -> dict[str, Path]:
    """The files of one image: the label map, and beside it what was asked for."""
    others = {
        "overlay": labels.with_name(f"{labels.stem}_overlay.png"),
        "scores": labels.with_name(f"{labels.stem}_scores.npz"),
        "areas": labels.with_suffix("").with_suffix(".json") if is_nifti(labels) else labels.with_suffix(".json"),
    }
    return {"labels": labels} | {kind: path for kind, path in others.items() if extra[kind]}


def is_frame(path: Path) -> bool:
    """Whether a name is that of a frame's label map or areas: 000001.png."""
    return len(path.stem) >= 6 and path.stem.isdecimal() and path.suffix in (".png", ".json")


def check_names(images: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Raise UserError when an output would replace an input or another output.

    The frames of a film go to a folder of their own, where nothing else may have such a name.
    """
    inputs = {path.resolve() for path in images}
    seen: set[Path] = set()
    folders = {path.resolve() for path in outputs}
    for path in outputs:
        if path.resolve() in inputs:
            raise UserError(f"{path} would replace an input image; choose another --out")
        if path in seen:
            raise UserError(f"{path} would be written for two images; rename one, or segment them into two folders")
        seen.add(path)
    for path in (*images, *outputs):
        if is_frame(path) and path.resolve().parent in folders:
            raise UserError(f"{path} lies where the frames of a film go; rename the film, or choose another --out")
