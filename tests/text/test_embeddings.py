"""Class embeddings: ensembling, synonyms, the cache, and lists that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from segvit.contracts import UserError
from segvit.text import embeddings
from segvit.text.embeddings import class_embeddings
from segvit.text.tokenize import tokenize
from segvit.text.tower import TextTower, text_tower
from tests.text.clips import clip_file

NAMES = ["road", "traffic light", "sky"]


@pytest.fixture
def tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextTower:
    monkeypatch.setenv("SEGVIT_CACHE", str(tmp_path / "cache"))
    return text_tower(None, weights=str(clip_file(tmp_path / "clip.safetensors"))).eval()


@torch.no_grad()
def test_normalise_mean_normalise(tower: TextTower) -> None:
    templates = ["a {}", "one more {} in a long sentence"]
    found = class_embeddings(tower, NAMES, templates=templates, cache=False)
    each = [F.normalize(tower(tokenize([t.replace("{}", n) for n in NAMES])), dim=-1) for t in templates]
    torch.testing.assert_close(found, F.normalize(torch.stack(each).mean(0), dim=-1), rtol=1e-5, atol=1e-6)
    assert not found.requires_grad


@torch.no_grad()
def test_synonyms_are_averaged(tower: TextTower) -> None:
    road, street, both = (
        class_embeddings(tower, [name], cache=False)[0] for name in ("road", "street", ["road", "street"])
    )
    torch.testing.assert_close(both, F.normalize(road + street, dim=-1), rtol=1e-5, atol=1e-6)


def test_the_cache_is_by_content(tower: TextTower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    compute = embeddings.embed_sentences

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return compute(*arguments)

    monkeypatch.setattr(embeddings, "embed_sentences", counted)
    first = class_embeddings(tower, NAMES)
    assert torch.equal(class_embeddings(tower, NAMES), first)
    assert len(calls) == 1
    [file] = (tmp_path / "cache" / "text").iterdir()
    file.write_bytes(file.read_bytes()[:20])  # damaged: computed again
    assert torch.equal(class_embeddings(tower, NAMES), first)
    assert len(calls) == 2
    class_embeddings(tower, NAMES, templates="zegclip_voc")
    with torch.no_grad():
        tower.ln_final.bias[0] += 1e-6
    assert not torch.equal(class_embeddings(tower, NAMES), first)
    assert len(calls) == 4


@pytest.mark.parametrize(("names", "message"), [
    ([], "empty"), (["road", " "], "class 1 has an empty name"), ([["a"], []], "class 1 has an empty name"),
    (["Road", "sky", "road"], "names two classes, 0 and 2"), ([["car", "bus"], ["van", "bus"]], "names two classes"),
])  # fmt: skip
def test_wrong_lists(names: list[Any], message: str, tower: TextTower) -> None:
    with pytest.raises(UserError, match=message):
        class_embeddings(tower, names)
