"""Class lists as people write them: names, `name: synonym, synonym`, or a file with one class a line.

Rule      In one line commas part classes (`rust, bolt, cable tray`); as soon as there is a colon or a semicolon,
          semicolons do, and commas part synonyms (`rust: corrosion, oxide; bolt`). In a file lines part classes.
"""

from __future__ import annotations

import re
from pathlib import Path

from segvit.contracts import UserError

BACKGROUND = "background"
BACKGROUND_WORDS = (
    BACKGROUND, "wall", "floor", "ceiling", "building", "sky", "clouds", "ground", "road", "grass", "tree", "water",
)  # fmt: skip


def read_classes(text: str) -> list[list[str]]:
    """Every class with its synonyms, the name first, from a list or from the file that it names.

    In a file empty lines and those that begin with # are left out. Raises UserError for an empty list, a file that does
    not exist or cannot be read, and commas where it is not said what they part.
    """
    path = Path(text.strip()).expanduser()
    if _is_file(path):
        lines = [line.strip() for line in _content(path).splitlines()]
        parts = [line for line in lines if line and not line.startswith("#")]
    elif path.suffix in (".txt", ".csv", ".tsv", ".yaml", ".json") or re.match(r"[/~.]|[^,;:]*/[^,;:]*$", text.strip()):
        raise UserError(f"{text.strip()}: no such class file; give a text file with one class a line, or the names")
    else:
        parts = text.split(";" if re.search("[;:]", text) else ",") if text.strip() else []
    if not parts:
        raise UserError("the list of classes is empty; name one class or more")
    return [_names(part) for part in parts]


def background_words(classes: list[list[str]]) -> list[str]:
    """The words of a class for everything else: common backgrounds, but for those that are classes of their own."""
    taken = {same(word) for names in classes for word in names}
    return [word for word in BACKGROUND_WORDS if word not in taken]


def same(name: str) -> str:
    """What is equal for equal names: lower case, white space and underscores as one space."""
    return " ".join(name.lower().replace("_", " ").split())


def _names(part: str) -> list[str]:
    name, colon, synonyms = part.partition(":")
    if not colon and "," in name:
        raise UserError(f"{part.strip()!r} has commas but no colon; write `name: synonym, synonym`, or one class each")
    words = [name, *(synonyms.split(",") if synonyms.strip() else [])]
    return [" ".join(word.split()) for word in words]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a list too long for the name of a file
        return False


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a class file ({error}); save it as UTF-8 text") from error
