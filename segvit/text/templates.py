"""Sentences that class names are put into, by the name of who uses them; `{}` is the class.

Source    the released code of ZegCLIP, zsseg and DPT; "imagenet" is CLIP's list of 80, which open_clip brings along.
"""

from __future__ import annotations

from collections.abc import Sequence

from segvit.contracts import UserError
from segvit.text.architecture import open_clip_library

SIZES = ("", "small ", "medium ", "large ")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "photo": ("a photo of a {}.",),
    "zegclip_voc": ("a photo of a {}",),
    "zegclip_coco": (
        *(f"a photo of a {size}{{}}." for size in SIZES),
        *(f"This is a photo of a {size}{{}}." for size in SIZES),
        "a {} in the scene.", "a photo of a {} in the scene.", "There is a {} in the scene.",
        "There is the {} in the scene.", "This is a {} in the scene.", "This is the {} in the scene.",
        "This is one {} in the scene.",
    ),
    "zsseg": ("a sculpture of a {}.",),
    "vild": (
        "a photo of a {}.", "This is a photo of a {}", "There is a {} in the scene", "There is the {} in the scene",
        "a photo of a {} in the scene",
        *(f"a photo of a {size}{{}}." for size in SIZES[1:]),
        *(f"This is a photo of a {size}{{}}." for size in SIZES[1:]),
        *(f"There is a {size}{{}} in the scene." for size in SIZES[1:]),
    ),
    "driving": ("a photo of a {} seen from a driving car.",),
    "pets": ("a photo of a {}, a type of pet.",),
    "flowers": ("a photo of a {}, a type of flower.",),
    "aircraft": ("a photo of a {}, a type of aircraft.",),
    "texture": ("{} texture.",),
    "satellite": ("a centered satellite photo of {}.",),
    "food": ("a photo of {}, a type of food.",),
    "action": ("a photo of a person doing {}.",),
}  # fmt: skip


def find_templates(wanted: str | Sequence[str]) -> tuple[str, ...]:
    """The templates of that name, a single template, or several.

    Raises UserError for an unknown name, none at all, and a template without exactly one `{}`.
    """
    if isinstance(wanted, str) and wanted in TEMPLATES:
        return TEMPLATES[wanted]
    if wanted == "imagenet":
        return tuple(fill("{}") for fill in open_clip_library().OPENAI_IMAGENET_TEMPLATES)
    templates = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    for template in templates or ("",):
        if template.count("{}") != 1:
            raise UserError(
                f"{template!r} is neither a template with one {{}} for the class nor one of "
                f"{', '.join(TEMPLATES)}, imagenet"
            )
    return templates


def fill(template: str, name: str) -> str:
    """The template with the class name in it."""
    return template.replace("{}", name)
