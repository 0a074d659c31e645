"""The study of medical systems, cut short: its tables hold what was measured."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[1] / "examples" / "medical_study.py"


@pytest.mark.slow
def test_the_study_tabulates_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nibabel")
    table = tmp_path / "study.md"
    words = [
        "--out",
        str(tmp_path / "out"),
        "--steps",
        "1",
        "--organ_steps",
        "1",
        "--seeds",
        "1",
        "--table",
        str(table),
    ]
    monkeypatch.setattr(sys, "argv", ["medical_study.py", *words])
    runpy.run_path(str(STUDY), run_name="__main__")
    text = table.read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip().endswith(text.strip())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    supervised = next(row for row in rows if row[0] == "supervised alone")
    scores = json.loads((tmp_path / "out" / "organs" / "supervised_seed0" / "scores.json").read_text())
    assert supervised[2] == f"{100 * scores['medpy']['dice']:.2f}"
    assert supervised[6] == f"{100 * scores['transunet']['dice']:.2f}"
    for title in ("DuAT", "plain FPN"):
        rates, test = (row for row in rows if row[0] == title)
        found = [json.loads(path.read_text()) for path in sorted((tmp_path / "out" / "polyps").glob(
            f"{title.replace(' ', '_')}_lr*/scores.json"
        ))]  # fmt: skip
        assert max(map(float, rates[1:])) == pytest.approx(100 * max(one["val"]["mdice"] for one in found), abs=0.006)
        assert re.fullmatch(r"\d+\.\d\d", test[3])
    started = len(list((tmp_path / "out").rglob("scores.json")))
    runpy.run_path(str(STUDY), run_name="__main__")  # nothing is trained twice
    assert len(list((tmp_path / "out").rglob("scores.json"))) == started == 8
