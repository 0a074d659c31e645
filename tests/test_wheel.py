"""What is built installs and runs: a wheel, a clean environment, another folder."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.tasks.tiny import DATA, write_recipe

ROOT = Path(__file__).parent.parent
UV = Path(sys.executable).with_name("uv")

pytestmark = pytest.mark.slow


def call(*arguments, where):
    """Run a command away from the checkout; returns what it wrote to stdout."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTEST_CURRENT_TEST")
    settings = {key: value for key, value in os.environ.items() if key not in hidden}
    settings |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, arguments)), cwd=where, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that no build folder appears in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("segvit", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(source, folder / "source" / name)
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ".", where=folder / "source")
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"segvit", wheel.name.rsplit("-py3", 1)[0] + ".dist-info"}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "segvit").rglob("*.py")} | {"segvit/py.typed"}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "segvit").rglob("*.yaml")}
    assert {name for name in names if name.startswith("segvit/")} == expected


def test_it_installs_and_trains_elsewhere(wheel, tmp_path):
    if not UV.exists():
        pytest.skip("uv is not installed beside this Python")
    there = tmp_path / "elsewhere"
    there.mkdir()
    call(UV, "venv", "--python", sys.executable, tmp_path / "venv", where=there)
    python, segvit = tmp_path / "venv" / "bin" / "python", tmp_path / "venv" / "bin" / "segvit"
    pinned = ROOT / "requirements.txt"  # the tested set, which is in uv's cache where `make install` was run
    call(UV, "pip", "install", "--python", python, "--constraint", pinned, wheel, where=there)
    where = call(python, "-c", "import segvit; print(segvit.__file__)", where=there).strip()
    assert Path(where).is_relative_to(tmp_path / "venv")
    assert "  predict " in call(segvit, "--help", where=there)
    assert "segvit_vit_tiny" in call(segvit, "models", "list", where=there)
    recipe = write_recipe(there / "recipe.yaml", steps=3)
    call(segvit, "train", "--config", recipe, "--out", "run", where=there)
    report = json.loads(call(segvit, "val", "run", "--workers", 0, "--json", where=there))
    assert report["data"] == DATA
