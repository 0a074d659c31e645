"""What a run must remember to go on exactly: a dictionary of named parts in one file, written whole or not at all.

One file, replaced by an atomic rename, is the whole checkpoint: a process killed at any moment leaves the previous one.
"""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from segvit.contracts import UserError
from segvit.engine.run import PREVIOUS_STATE, STATE
from segvit.files import open_atomic

FORMAT = 1


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a dictionary of tensors, numbers, strings and containers of them.

    Raises UserError on a full disk; the previous file is then intact.
    """
    with open_atomic(path) as file:
        guarded = _Guarded(file)
        try:
            torch.save(state | {"format": FORMAT}, guarded)  # type: ignore[arg-type]
        except RuntimeError:
            if guarded.error is not None:  # torch's archive writer hides what the disk said
                raise guarded.error from None
            raise


class _Guarded:
    """A file that remembers the first error of writing."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return int(self.file.write(data))
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def read_state(path: Path) -> dict[str, Any]:
    """The dictionary of a checkpoint; never runs code from it.

    Raises UserError when the file is missing, damaged, or holds pickled code.
    """
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):  # torch would take it for a file of its oldest format
                raise EOFError("it is cut short, or no checkpoint")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no checkpoint to resume from; leave --resume out to start the run") from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused, the file holds pickled code and not a checkpoint of ours") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: damaged ({str(error).partition(chr(10))[0]}); start again with --overwrite"
        ) from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: written by another version of segvit (format {found}, here {FORMAT})")
    return state


def random_state() -> dict[str, Any]:
    """The state of torch's generators; augmentation has none, it is a function of the draw number."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_random(state: dict[str, Any]) -> None:
    """The inverse of `random_state`; GPU generators only where there are as many GPUs."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def replace_state(path: Path, previous: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint and keep the one before it; a kill or a full disk at any moment leaves one of them whole."""
    fresh = path.with_name(f"{path.name}.new")
    save_state(fresh, state)
    if path.exists():
        previous.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, previous)
    os.replace(fresh, path)


def newest_state(candidates: Sequence[Path]) -> tuple[dict[str, Any], Path, list[str]]:
    """The first checkpoint that can be read, which file it is, and why the ones before it cannot.

    Raises UserError when none can.
    """
    problems: list[str] = []
    for path in candidates:
        if not path.exists():
            continue
        try:
            return read_state(path), path, problems
        except UserError as error:
            problems.append(str(error))
    raise UserError("; ".join(problems) or "there is no checkpoint to resume from; leave --resume out")


def restored(folder: Path, network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The steps done by the last checkpoint of a run folder, which is taken up; 0 where there is none yet."""
    places = [folder / place for place in (STATE, PREVIOUS_STATE)]
    if not any(place.is_file() for place in places):
        return 0
    state, _, _ = newest_state(places)
    network.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    restore_random(state["random"])
    return int(state["step"])


def copy_state(source: Path, target: Path) -> None:
    """Copy a finished checkpoint, atomically."""
    with source.open("rb") as original, open_atomic(target) as file:
        shutil.copyfileobj(original, file)
