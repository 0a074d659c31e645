"""Time and memory, measured so that they can be compared: in turns, medians, beside what the machine itself can do."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

SIDE = 2048  # of the matrices whose product tells the machine's rate: large enough for the best of it
SAMPLE = 0.005  # seconds between two looks at the memory


def in_turns(parts: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each part in `repeats` rounds, after one round that is not counted.

    A round runs every part once, so that a machine whose speed drifts drifts for all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(repeats + 1):
        for name, function in parts.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The median of each part."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def matrix_product(device: str = "cpu") -> Callable[[], object]:
    """A product of two square fp32 matrices, to be timed among other parts."""
    left, right = torch.randn(2, SIDE, SIDE, device=device)
    return lambda: left @ right


def matrix_rate(seconds: float) -> float:
    """GFLOP/s of that product; a multiply-add is one, as in `count_gflops`."""
    return SIDE**3 / seconds / 1e9


def peak_memory(function: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """MB by which memory grows at most while the function runs: a GPU's, or the process's."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    give_back()
    before, peak, done = resident(), resident(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return (max(peak, resident()) - before) / 2**20


def give_back() -> None:
    """Hand freed memory back to the system, where the C library can: kept, it would hide what is taken next."""
    with suppress(AttributeError, OSError, TypeError):  # no GNU C library
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def processor(device: str | torch.device = "cpu") -> str:
    """The name of the CPU, and of the GPU if that is the device."""
    names = [platform.processor() or platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")][:1] or names
    except OSError:  # no Linux
        pass
    names[0] += f", {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if torch.device(device).type == "cuda":
        names.append(torch.cuda.get_device_name())
    return "; ".join(names)
