"""Importing the package and asking for help stay quick, and neither loads torch."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRIES = 3
HELP = """
import runpy, sys
sys.argv = ["segvit", "--help"]
try:
    runpy.run_module("segvit", run_name="__main__")
except SystemExit as done:
    assert not done.code, done.code
assert "torch" not in sys.modules, "torch was imported"
"""


def run(*arguments: str) -> float:
    """Seconds that the interpreter takes for these arguments; it must succeed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    elapsed = time.perf_counter() - start
    assert done.returncode == 0, done.stdout + done.stderr
    return elapsed


def best(*arguments: str) -> float:
    """The quickest of a few runs: what the machine can do when nothing else is in the way."""
    return min(run(*arguments) for _ in range(TRIES))


def test_import_does_not_load_torch():
    run("-c", "import segvit, sys; assert 'torch' not in sys.modules, 'torch was imported'")


def test_import_is_quick():
    assert best("-c", "import segvit") - best("-c", "pass") < 0.5


def test_help_does_not_load_torch():
    run("-c", HELP)


def test_help_is_quick():
    assert best("-m", "segvit", "--help") < 1.0
