"""The demo, cut short: what it writes and how it ends. `make demo` itself trains long enough to be judged."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


def test_the_demo_leaves_overlays_and_a_report_and_ends_with_its_miou(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path / "demo"), "--steps", "3"])
    runpy.run_path(str(DEMO), run_name="__main__")
    lines = capsys.readouterr().out.strip().splitlines()
    assert re.fullmatch(r"mIoU 0\.\d{4}", lines[-1])
    baseline = float(lines[-2].rpartition(" ")[2])
    assert 0.3 < baseline < 0.6  # colour alone helps and does not solve it
    overlays = list((tmp_path / "demo" / "predictions").glob("*_overlay.png"))
    assert len(overlays) == 8
    report = (tmp_path / "demo" / "report" / "index.html").read_text(encoding="utf-8")
    assert "<svg" in report
    assert "http://" not in report.replace("http://www.w3.org/2000/svg", "")
