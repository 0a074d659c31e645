"""Several tasks on one backbone at the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from segvit.cli.parsing import show


def train(
    *, config: str, out: str | None = None, steps: int | None = None, adapt_steps: int | None = None,
    device: Literal["auto", "cpu", "cuda"] | None = None, workers: int | None = None, resume: bool = False,
    overwrite: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Train several tasks, each with its data, head and loss, on one backbone together.

    Args:
        config: YAML with the keys of a recipe, which count for all tasks, and tasks: a table of them by name.
        out: Run folder to write; None = the file's.
        steps: Optimiser steps; None = the file's.
        adapt_steps: Steps at the start in which the backbone stands still; None = the file's, else 0.
        device: Where to train; None = the file's, else auto.
        workers: Processes that load data for each task; None = the file's, else 2.
        resume: Go on with the run in out from its last checkpoint.
        overwrite: Replace the run in out.
        json: Print the figures as JSON.
    """
    from segvit.tasks.joint import read_joint, train_tasks

    given = {"out": out, "steps": steps, "adapt_steps": adapt_steps, "device": device, "workers": workers}
    joint = read_joint(config, given | {"resume": resume or None, "overwrite": overwrite or None})
    figures = train_tasks(joint)
    known = {name: None if figure != figure else figure for name, figure in figures.items()}  # NaN
    lines = [f"{name}  {'-' if figure is None else f'{figure:.4f}'}  {Path(joint.out) / name}"
             for name, figure in known.items()]  # fmt: skip
    show(known, json, "\n".join(lines))


def predict(
    source: str, *, tasks: str, out: str = "predictions", base: str | None = None,
    device: Literal["cpu", "cuda"] | None = None, json: bool = False,
) -> None:  # fmt: skip
    """Segment images for several tasks over one backbone; writes OUT/TASK/NAME.png.

    Args:
        source: Image, folder or pattern.
        tasks: Names and their run or adapter folders, such as roads=runs/roads,defects=runs/defects.
        out: Folder to write.
        base: Where the base weights of the adapters are now; None = where the first says itself.
        device: cpu or cuda; None = cuda where there is one.
        json: Print what was written as JSON.
    """
    from segvit.tasks.multi_task import predict_tasks

    written = predict_tasks(source, tasks, Path(out), base=base, device=device)
    show(written, json, "\n".join(row["labels"] for row in written))
