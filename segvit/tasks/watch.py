"""`segvit watch`: the curves of a run, drawn in the terminal from its files while another process writes them."""

from __future__ import annotations

import fcntl
import json
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from segvit.contracts import UserError
from segvit.engine.history import Row, Tail
from segvit.engine.pace import duration
from segvit.engine.terminal import Points, chart
from segvit.tasks.experiment import Experiment

SECONDS = 1.0  # between two looks at the files
RECENT = 50  # steps whose median time says how long the rest takes
AUXILIARY = re.compile(r"_\d+$")  # terms of earlier outputs; the total holds them


def watch_run(run: str, *, once: bool, console: Console | None = None) -> None:
    """Draw the curves until the run has ended or Ctrl-C; `once` draws a single frame.

    Raises UserError for a folder that holds no run.
    """
    folder = Path(run)
    steps = planned_steps(folder)
    tail, console = Tail(folder), console or Console()
    if once:
        console.print(frame(folder, tail.read(), steps=steps, console=console))
        return
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            # Asked first: what a run writes before it ends must be in the last frame.
            over = ended(folder, tail.read(), steps)
            live.update(frame(folder, tail.read(), steps=steps, console=console), refresh=True)
            if over:
                break
            time.sleep(SECONDS)


def planned_steps(folder: Path) -> int:
    """The length of a run in steps, from its configuration."""
    stored = folder / "config.yaml"
    if not stored.is_file():
        raise UserError(f"{folder} holds no run (there is no config.yaml in it); give the --out of `segvit train`")
    config: dict[str, Any] = yaml.safe_load(stored.read_text(encoding="utf-8"))
    if config["steps"] is not None:
        return int(config["steps"])
    described = json.loads((folder / "data_report.json").read_text(encoding="utf-8"))
    run = Experiment(data="", out="", epochs=config["epochs"], batch_size=config["batch_size"])
    return run.total_steps(described["splits"]["train"])


def is_written(folder: Path) -> bool:
    """Whether a process holds the run."""
    try:
        with (folder / ".lock").open() as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def ended(folder: Path, rows: Sequence[Row], steps: int) -> bool:
    """Whether the last step is done and, where there is a validation at the end, that too."""
    done = bool(rows) and rows[-1]["step"] >= steps
    return done and ((folder / "val.json").exists() or not is_written(folder))


def frame(folder: Path, rows: Sequence[Row], *, steps: int, console: Console) -> Group:
    """Where the run stands and four plots of it, as wide as the console."""
    train = [row for row in rows if "val" not in row]
    tests = [{"step": row["step"], **row["val"]} for row in rows if "val" in row]
    terms = sorted({key for row in train[-1:] for key in row if key.startswith("loss_") and not AUXILIARY.search(key)})
    losses = {"total": _points(train, "loss")}
    losses |= {key.removeprefix("loss_"): _points(train, key) for key in terms if len(terms) > 1}
    size = (console.width - 3) // 2, max(8, min(18, (console.height - 4) // 2))
    grid = Table.grid(padding=(0, 3, 1, 0))
    grid.add_row(
        chart("loss", losses, size=size),
        chart("validation mIoU", {"mIoU": _points(tests, "miou")}, unit="%", size=size),
    )
    grid.add_row(
        chart("learning rate", {"lr": _points(train, "lr")}, size=size),
        chart("gradient norm", {"norm": _points(train, "grad_norm")}, size=size),
    )
    return Group(_headline(folder, train, tests, steps), "", grid)


def _points(rows: Sequence[Row], key: str) -> Points:
    known = [(row["step"], np.nan if row[key] is None else row[key]) for row in rows if key in row]
    steps, values = np.array(known, np.float64).reshape(-1, 2).T
    return steps, values


def _headline(folder: Path, train: Sequence[Row], tests: Sequence[Row], steps: int) -> Text:
    step = train[-1]["step"] if train else 0
    text = Text.assemble((folder.name, "bold"), f"  step {step} of {steps}")
    seconds = [row["seconds"] for row in train[-RECENT:] if row.get("seconds")]
    if ended(folder, train, steps):
        text.append("  finished", "green")
    elif not is_written(folder):
        text.append("  no process is writing it; go on with segvit train --resume", "yellow")
    elif seconds:
        each = float(np.median(seconds))
        text.append(f"  {each:.2g} s a step, {duration((steps - step) * each)} left")
    best = max((row for row in tests if row["miou"] is not None), key=lambda row: row["miou"], default=None)
    if best is not None:
        text.append(f"  best mIoU {100 * best['miou']:.2f} % at step {best['step']}")
    return text
