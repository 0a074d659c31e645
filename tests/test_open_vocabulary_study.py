"""The study of unseen words, cut short: that it runs, goes on where it ended, and what its rules of naming do."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from segvit.text.checkpoint import find_clip

STUDY = Path(__file__).parent.parent / "examples" / "open_vocabulary_study.py"


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return runpy.run_path(str(STUDY))


def test_it_runs_offline_and_goes_on_where_it_ended(
    study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["study", "--out", str(tmp_path), "--quick", "--seeds", "1"])
    study["main"]()
    assert "ZegCLIP, seed 0: step 2 of 2" in capsys.readouterr().out
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ZegCLIP |")]
    assert [len(row) for row in rows] == [6, 6]  # calibrated, and with the paper's bias
    assert all(0 <= float(cell) <= 100 for row in rows for cell in row[2:5])
    assert (tmp_path / "seed_0.png").stat().st_size > 1000
    assert find_clip(None, str(tmp_path / "clip.safetensors")).vision.patch_size == 8
    study["main"]()
    assert "step" not in capsys.readouterr().out.partition("#")[0]
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == page
    monkeypatch.setattr(sys, "argv", ["study", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        study["main"]()
    assert "another length" in capsys.readouterr().err


def test_naming_by_the_nearest_word_and_by_the_mixture(study: dict[str, Any]) -> None:
    """Words are texture plus shape; a pixel is half "plain square", half "dotted circle"."""
    names, seen, unseen = study["NAMES"], study["SEEN"], study["UNSEEN"]
    parts = sorted({word for name in names for word in name.split()})
    words = torch.stack([sum(torch.eye(len(parts))[parts.index(word)] for word in name.split()) for name in names])
    words = torch.nn.functional.normalize(words, dim=-1)
    chances = torch.zeros(1, len(seen), 1, 1)
    chances[0, [seen.index(names.index(name)) for name in ("plain square", "dotted circle")]] = 0.5
    mixture = study["mixture_names"](chances, words)[0, :, 0, 0]
    best = {names[i] for i in range(len(names)) if mixture[i] > mixture.max() - 1e-6}
    assert best == {"plain square", "dotted circle", "plain circle", "dotted square"}
    nearest = study["nearest_names"](chances, words)[0, :, 0, 0]
    assert nearest[names.index("plain square")] == 0.5
    for number in unseen:
        near = {seen[i] for i in range(len(seen)) if words[number] @ words[seen[i]] > 0.49}
        expected = {0.0, 0.25} if near & {names.index("plain square"), names.index("dotted circle")} else {0.0}
        assert round(nearest[number].item(), 4) in expected


def test_bias_and_group_winners(study: dict[str, Any]) -> None:
    seen, unseen = study["SEEN"], study["UNSEEN"]
    scores = torch.zeros(1, len(study["NAMES"]), 1, 2)
    scores[0, seen[3], 0] = torch.tensor([0.6, 0.6])
    scores[0, unseen[1], 0] = torch.tensor([0.55, 0.2])
    found = study["ranked"](scores)
    assert found.labels(0.0).tolist() == [[[seen[3], seen[3]]]]
    assert found.labels(0.1).tolist() == [[[unseen[1], seen[3]]]]


def test_withheld_labels_are_ignored_by_the_closed_set(study: dict[str, Any]) -> None:
    masks = np.arange(21, dtype=np.uint8)[None]
    table = study["only_seen"](study["Scenes"](masks, masks)).masks[0]
    assert (table == 255).nonzero()[0].tolist() == sorted(study["UNSEEN"])
    assert sorted(set(table.tolist()) - {255}) == list(range(16))
