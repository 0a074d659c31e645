"""The dataset doctor's report as one HTML page: verdict, findings, the YAML to paste, values, classes and pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from segvit.contracts import Classes, Color
from segvit.data.doctor.tables import Diagnosis, Finding, MaskFile, Pair, Survey
from segvit.engine import page
from segvit.engine.charts import grouped
from segvit.palette import generate_palette

SHOWN_VALUES = 60  # rows of the table of raw values
EXAMPLES = 4  # pictures of a finding
SAMPLES = 6  # pictures of each split
THUMB = 320  # pixels of the long side


class Value(NamedTuple):
    """One raw value over all masks."""

    raw: int
    coloured: bool
    pixels: int
    masks: int
    color: Color | None  # what it looks like in the file: the colour itself, or a palette's
    id: int | None  # what the label rule makes of it; None where there is none

    @property
    def text(self) -> str:
        """The value as a person writes it."""
        return str(list(color_of(self.raw))) if self.coloured else str(self.raw)


def color_of(code: int) -> Color:
    """A colour from its code red * 65536 + green * 256 + blue."""
    return code >> 16 & 255, code >> 8 & 255, code & 255


def value_table(survey: Survey) -> list[Value]:
    """Every raw value with its pixels and masks, the most frequent first."""
    pixels: Counter[tuple[bool, int]] = Counter()
    masks: Counter[tuple[bool, int]] = Counter()
    colors: dict[tuple[bool, int], Color] = {}
    for mask in all_masks(survey):
        for raw, count in mask.values.items():
            key = (mask.coloured, raw)
            pixels[key] += count
            masks[key] += 1
            if raw in mask.palette:
                colors.setdefault(key, mask.palette[raw])
    return [
        Value(raw, coloured, count, masks[coloured, raw], color_of(raw) if coloured else colors.get((coloured, raw)),
              meaning(survey, raw, coloured))
        for (coloured, raw), count in pixels.most_common()
    ]  # fmt: skip


def meaning(survey: Survey, raw: int, coloured: bool) -> int | None:
    """The id that the present rule gives a raw value; None for an unknown value or without a rule."""
    rule = survey.rule
    if rule is None:
        return None
    if rule.table is not None:
        found = int(rule.table[raw]) if not coloured and 0 <= raw < len(rule.table) else -1
        return None if found < 0 else found
    assert rule.codes is not None
    assert rule.ids is not None
    place = np.flatnonzero(rule.codes == raw)
    return int(rule.ids[place[0]]) if coloured and len(place) else None


def all_masks(survey: Survey) -> Iterator[MaskFile]:
    """The masks of all splits that could be read."""
    return (pair.mask for split in survey.splits for pair in split.pairs if not pair.mask.error)


def write_data_report(path: Path, survey: Survey, diagnosis: Diagnosis) -> None:
    """Write the page, atomically."""
    values = value_table(survey)
    sections = [
        _verdict(survey, diagnosis),
        _findings(diagnosis.findings),
        _proposal(diagnosis),
        _examples(survey, diagnosis.findings),
        _values(values, survey.classes),
        _files(survey),
        *(_samples(survey, split.name, split.pairs) for split in survey.splits),
    ]
    page.write_page(path, f"Data check of {survey.source.name}", sections)


def _verdict(survey: Survey, diagnosis: Diagnosis) -> str:
    counts = Counter(finding.severity for finding in diagnosis.findings)
    cells = [
        (grouped(sum(len(split.pairs) for split in survey.splits)), "", "images with a mask"),
        *((grouped(len(split.pairs)), "", f"of them in {split.name}") for split in survey.splits),
        *((str(counts[kind]), "", kind if counts[kind] == 1 else f"{kind}s") for kind in ("error", "warning")),
    ]
    word = "Ready to train." if diagnosis.healthy else "Training would go wrong; the errors say why and what to do."
    bad = "" if diagnosis.healthy else "bad"
    return page.tiles(cells) + f'<p class="card verdict {bad}"><b>{word}</b></p>'


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return "<h2>Findings</h2><p>None.</p>"
    items = []
    for finding in findings:
        files = ", ".join(finding.files[:EXAMPLES]) + (" ..." if len(finding.files) > EXAMPLES else "")
        items.append(
            f'<div class="finding {finding.severity}"><b>{finding.severity}</b><span>{escape(finding.sentence)}</span>'
            f"<small>{escape(files)}</small></div>"
        )
    return f'<h2>Findings</h2><div class="card">{"".join(items)}</div>'


def _examples(survey: Survey, findings: Sequence[Finding]) -> str:
    """Pictures of the files that errors and warnings name."""
    pairs = {path: pair for split in survey.splits for pair in split.pairs for path in _names(pair)}
    shown = []
    for finding in findings:
        chosen = {pairs[name].image.path: pairs[name] for name in finding.files if name in pairs}
        if finding.severity != "note" and chosen:
            shown.append(f"<h3>{escape(finding.kind.replace('_', ' '))}</h3>")
            shown += [_view(survey, pair) for pair in list(chosen.values())[:EXAMPLES]]
    return f"<h2>Examples</h2>{''.join(shown)}" if shown else ""


def _names(pair: Pair) -> tuple[str, ...]:
    return pair.image.path, pair.mask.path, pair.stem


def _proposal(diagnosis: Diagnosis) -> str:
    if diagnosis.proposal is None:
        return ""
    text = "Put this into dataset.yaml, look at the lines with a comment, and check again."
    return f'<h2>The YAML to paste</h2><p>{text}</p><pre class="card">{escape(diagnosis.proposal)}</pre>'


def _values(values: Sequence[Value], classes: Classes | None) -> str:
    if not values:
        return ""
    total = sum(value.pixels for value in values)
    rows = []
    for value in values[:SHOWN_VALUES]:
        paint = f'<i class="swatch" style="background:rgb{value.color}"></i>' if value.color else ""
        if value.id is None:
            name = "&#8211;" if classes is None else "<b>in no class</b>"
        else:
            name = "ignored" if classes is None or value.id >= len(classes) else escape(classes.names[value.id])
        share = page.bar(value.pixels / total)
        rows.append([f"{paint}{value.text}", name, share, grouped(value.pixels), grouped(value.masks)])
    more = f" The other {len(values) - SHOWN_VALUES} are in report.json." if len(values) > SHOWN_VALUES else ""
    return (
        f"<h2>Values in the masks</h2><p>Raw, as the files hold them, the most frequent first.{more}</p>"
        + page.table(["value", "class", "percent of pixels", "pixels", "masks"], rows)
    )


def _files(survey: Survey) -> str:
    rows = []
    for split in survey.splits:
        sizes = Counter(pair.image.size for pair in split.pairs if pair.image.size)
        kinds = Counter(f"{pair.mask.format} {pair.mask.mode}" for pair in split.pairs if pair.mask.size)
        pictures = Counter(f"{pair.image.format} {pair.image.mode}" for pair in split.pairs if pair.image.size)
        wide = [f"{width}x{height}: {count:,}" for (height, width), count in sizes.most_common(4)]
        more = f", {len(sizes) - 4} more" if len(sizes) > 4 else ""
        rows.append([
            escape(split.name), grouped(len(split.pairs)), grouped(len(split.images_alone)),
            grouped(len(split.masks_alone)), escape(", ".join(wide)) + more,
            escape(", ".join(f"{kind}: {count:,}" for kind, count in pictures.most_common(3))),
            escape(", ".join(f"{kind}: {count:,}" for kind, count in kinds.most_common(3))),
        ])  # fmt: skip
    head = ["split", "pairs", "images alone", "masks alone", "sizes", "images", "masks"]
    return "<h2>Files</h2>" + page.table(head, rows)


def _samples(survey: Survey, name: str, pairs: Sequence[Pair]) -> str:
    good = [pair for pair in pairs if not pair.image.error and not pair.mask.error]
    count = min(SAMPLES, len(good))
    chosen = [good[i * len(good) // count] for i in range(count)]
    views = "".join(_view(survey, pair) for pair in chosen)
    return f"<h2>Samples of {escape(name)}</h2>{views}" if views else ""


def _view(survey: Survey, pair: Pair) -> str:
    """Image, mask and both together; what cannot be read is left out."""
    image = None if pair.image.error else thumbnail(survey.root / pair.image.path, flat=False)
    mask = None if pair.mask.error else thumbnail(survey.root / pair.mask.path, flat=True)
    cells: list[tuple[str, NDArray[np.uint8], bool]] = []
    if image is not None:
        cells.append(("image", image, False))
    if mask is not None:
        cells.append(("mask, values in colours of their own", mask, True))
    if image is not None and mask is not None and image.shape == mask.shape:
        cells.append(("both", (0.5 * image + 0.5 * mask).astype(np.uint8), False))
    remark = pair.image.error or pair.mask.error or f"{pair.mask.distinct} values"
    return page.views(pair.stem, remark, cells) if cells else ""


def thumbnail(path: Path, *, flat: bool) -> NDArray[np.uint8] | None:
    """A small RGB picture; masks get a colour a value. None for what Pillow cannot show."""
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (THUMB, THUMB))
            turned = picture if flat else ImageOps.exif_transpose(picture)
            scale = THUMB / max(turned.size)
            size = (max(1, round(turned.width * scale)), max(1, round(turned.height * scale)))
            filter_ = Image.Resampling.NEAREST if flat else Image.Resampling.BILINEAR
            small = turned.resize(size, filter_) if scale < 1 else turned.copy()
    except (OSError, SyntaxError, ValueError):
        return None
    if flat and small.mode not in ("RGB", "RGBA"):
        values = np.asarray(small).astype(np.int64)
        palette = np.array(generate_palette(256), np.uint8)
        return palette[values % 256]
    return np.asarray(small.convert("RGB"))
