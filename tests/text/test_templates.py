"""The templates of the papers, and what is none."""

from __future__ import annotations

import pytest

from segvit.contracts import UserError
from segvit.text.templates import TEMPLATES, fill, find_templates


def test_the_lists_have_the_papers_lengths() -> None:
    counts = {name: len(find_templates(name)) for name in ("zegclip_coco", "vild", "imagenet", "photo", "zegclip_voc")}
    assert counts == {"zegclip_coco": 15, "vild": 14, "imagenet": 80, "photo": 1, "zegclip_voc": 1}
    assert all(len(set(templates)) == len(templates) for templates in TEMPLATES.values())
    assert find_templates("zegclip_coco")[:8:7] == ("a photo of a {}.", "This is a photo of a large {}.")
    assert find_templates("zegclip_coco")[-1] == "This is one {} in the scene."
    assert find_templates("vild")[7:9] == ("a photo of a large {}.", "This is a photo of a small {}.")
    assert find_templates("imagenet")[0] == "a bad photo of a {}."


def test_own_templates() -> None:
    assert find_templates("a drone sees {}") == ("a drone sees {}",)
    assert find_templates(["{} here", "{} there"]) == ("{} here", "{} there")
    assert fill("a {} here", "{x} y") == "a {x} y here"


@pytest.mark.parametrize("wrong", ["zegclip", "{} and {}", [], ["a {}", "photo"]])
def test_what_is_none(wrong: str | list[str]) -> None:
    with pytest.raises(UserError, match="neither a template"):
        find_templates(wrong)
