"""The Python snippets of the guides run as they stand, and guides told in commands from top to bottom."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from segvit.cli import main
from segvit.tasks.catalogue import model_info
from segvit.zoo import MODELS

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.M | re.S)
Steps = list[tuple[str, str]]  # kind and content


def steps(guide: Path) -> Steps:
    return BLOCK.findall(guide.read_text(encoding="utf-8"))


def is_story(guide: Path) -> bool:
    """Whether the guide is told in commands, so that its steps build on each other."""
    return any(kind == "console" for kind, _ in steps(guide))


SNIPPETS = [
    pytest.param(code, id=f"{guide.stem}-{number}")
    for guide in GUIDES if not is_story(guide)
    for number, (_, code) in enumerate(steps(guide))
]  # fmt: skip
STORIES = [pytest.param(steps(guide), id=guide.stem) for guide in GUIDES if is_story(guide)]


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets_of_the_guides_run(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<guide>", "exec"), {})
    assert capsys.readouterr().out.strip()  # every snippet shows something


@pytest.mark.parametrize("story", STORIES)
def test_guides_told_in_commands_run_from_top_to_bottom(
    story: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEGVIT_CACHE", str(tmp_path / "cache"))
    for kind, content in story:
        if kind == "python":
            exec(compile(content, "<guide>", "exec"), {})
            assert capsys.readouterr().out.strip()
            continue
        for line in content.splitlines():
            expected = int(match[1]) if (match := re.search(r"# exit code (\d)", line)) else 0
            assert exit_code(line.removeprefix("$ segvit ")) == expected, line
            assert capsys.readouterr().out.strip() or " train " in line, line


def exit_code(line: str) -> int:
    try:
        main(shlex.split(line, comments=True))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_links_of_the_readme_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def expanded(pattern: str) -> set[str]:
    """`a_{b,c}` as a_b and a_c."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return {pattern}
    return {name for part in match[1].split(",") for name in expanded(pattern.replace(match[0], part, 1))}


def test_the_tables_of_systems_name_every_model() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("## Systems")[1].split("\n\nGFLOPs")[0]
    guide = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").split("## Comparing")[0]
    for text, column in ((readme, 2), (guide, 1)):
        cells = [line.split("|")[column] for line in text.splitlines() if line.startswith("|")]
        named = {name for cell in cells for code in re.findall(r"`([^`]+)`", cell) for name in expanded(code)}
        assert named == set(MODELS)


ROWS = [
    [cell.strip() for cell in line.split("|")]
    for line in (ROOT / "docs" / "models.md").read_text(encoding="utf-8").split("## Comparing")[0].splitlines()
    if line.startswith("| `")
]


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=[row[1] for row in ROWS])
def test_the_counts_of_the_guide_to_models(row: list[str]) -> None:
    names = sorted(name for code in re.findall(r"`([^`]+)`", row[1]) for name in expanded(code))
    counted = next(
        name for end in ("vit_base", "small", "v2_b2", "23_slim", "") for name in names if name.endswith(end)
    )
    info = model_info(counted, None)
    assert [f"{info['parameters'] / 1e6:.1f}", f"{info['gflops']:.1f}"] == row[-4:-2]
