"""How much memory may still be taken, as the operating system and a container's limit have it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

UNIFIED = ("memory.max", "memory.current", "inactive_file")  # files and key of control groups, version 2
LEGACY = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")  # and of version 1


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken without swapping; None where the system does not say.

    The least of the kernel's estimate and what the limits of the control groups (containers, batch jobs) leave.
    `root` is where /proc and /sys are.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # no such function, no such name
            return None
    return min([free, *_left_by_groups(root)])


def _left_by_groups(root: Path) -> Iterator[int]:
    """What each control group above this process, and the container's own, leaves."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            left = _left(folder, *(LEGACY if controllers else UNIFIED))
            if left is not None:
                yield left


def _left(folder: Path, limit_file: str, used_file: str, cache_key: str) -> int | None:
    """Limit minus use of one group; file pages that are just kept around do not count as used."""
    try:
        limit = int((folder / limit_file).read_text())
        used = int((folder / used_file).read_text())
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group here, or no limit ("max")
        return None
    return max(0, limit - used + int(counts.get(cache_key, 0)))
