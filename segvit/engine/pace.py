"""How long a run will take, said once its first steps are timed."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

SKIPPED, TIMED = 1, 5  # the first step is slow: memory is allocated, workers start


class Pace:
    """Hands rows on and, after the first steps, says how long the rest of the `steps` will take."""

    def __init__(self, report: Callable[[dict[str, Any]], None], message: Callable[[str], None], *, steps: int) -> None:
        self.report, self.message, self.steps = report, message, steps
        self.seconds: list[float] = []

    def __call__(self, row: dict[str, Any]) -> None:
        self.report(row)
        if len(self.seconds) == SKIPPED + TIMED:
            return
        self.seconds.append(row["seconds"])
        left = self.steps - row["step"]
        if len(self.seconds) == SKIPPED + TIMED and left > 0:
            each = median(self.seconds[SKIPPED:])
            whole = duration(left * each)
            self.message(f"{each:.2g} s a step: about {whole} for the {left} steps left; validations come on top")


def duration(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3 h 5 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
