"""The Python snippets of the guides run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SNIPPETS = [
    pytest.param(code, id=f"{guide.stem}-{number}")
    for guide in sorted((ROOT / "docs").glob("*.md"))
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", guide.read_text(encoding="utf-8"), re.M | re.S))
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets_of_the_guides_run(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<guide>", "exec"), {})
    assert capsys.readouterr().out.strip()  # every snippet shows something


def test_links_of_the_readme_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
