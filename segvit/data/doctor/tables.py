"""What the dataset doctor writes down: one record a file, gathered by split, and the findings drawn from them.

Shapes    sizes are (height, width); a colour is the code red * 65536 + green * 256 + blue.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from segvit.contracts import Classes, Color, Size
from segvit.data.decode import LabelRule
from segvit.data.description import Description

Severity = Literal["error", "warning", "note"]  # training would go wrong; something to look at; good to know


@dataclass(frozen=True)
class MaskFile:
    """One mask as it is stored, before any label rule."""

    path: str  # below the root
    size: Size | None = None  # None where the file cannot be read
    mode: str = ""  # Pillow's: L, P, I;16, RGB ...
    format: str = ""  # PNG, JPEG, TIFF ...
    coloured: bool = False  # whether `values` are colour codes; grey RGB files count as numbers
    values: dict[int, int] = field(default_factory=dict)  # raw value -> pixels; the most frequent MAX_VALUES of them
    distinct: int = 0  # how many values there are, also where `values` was cut off
    palette: dict[int, Color] = field(default_factory=dict)  # of a palette PNG: the colour of each value that occurs
    error: str = ""  # why it cannot be read


@dataclass(frozen=True)
class ImageFile:
    """One image's header; its pixels are only read for the perceptual hash."""

    path: str  # below the root
    size: Size | None = None  # after the EXIF turn, as training sees it; None where the file cannot be read
    mode: str = ""
    format: str = ""
    channels: int = 0
    bits: int = 8  # a sample
    turned: bool = False  # an EXIF tag exchanges height and width
    hash: int | None = None  # 64-bit perceptual hash; None where it was not asked for
    error: str = ""


@dataclass(frozen=True)
class Pair:
    """An image with its mask."""

    stem: str  # what matched them; what `exclude:` names
    image: ImageFile
    mask: MaskFile


@dataclass(frozen=True)
class SplitSurvey:
    """All files of one split."""

    name: str
    images: str  # the entries of the description: folder or template below the root
    masks: str
    pairs: tuple[Pair, ...]
    images_alone: tuple[str, ...] = ()  # stems of images without a mask
    masks_alone: tuple[str, ...] = ()
    lines_alone: tuple[str, ...] = ()  # of the list files: lines without a file


@dataclass(frozen=True)
class Survey:
    """What lies in a dataset. `classes` and `rule` are None where nothing says yet which value is which class."""

    root: Path
    source: Path  # the YAML or the folder that was examined
    splits: tuple[SplitSurvey, ...]
    classes: Classes | None = None
    rule: LabelRule | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # "masks", "images", "hashes": time of each pass
    description: Description | None = None  # as read; None where there is none that can be read


@dataclass(frozen=True)
class Finding:
    """One thing worth saying."""

    kind: str  # a short stable name such as binary_255, one_based, jpeg_masks, leak
    severity: Severity
    sentence: str  # what was seen and what to do, in one line
    files: tuple[str, ...] = ()  # examples, below the root


@dataclass(frozen=True)
class Diagnosis:
    """The doctor's word: the findings, worst first, and the description that would make the data train."""

    findings: tuple[Finding, ...]
    proposal: str | None  # YAML text; None where the description is right as it is, or no description can help

    @property
    def healthy(self) -> bool:
        """Whether training would go well: no finding is an error."""
        return all(finding.severity != "error" for finding in self.findings)
