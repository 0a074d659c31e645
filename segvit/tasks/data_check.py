"""The dataset doctor as commands offer it: check, init, and the refusal of `train`."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segvit.contracts import UserError
from segvit.data.dataset import DESCRIPTIONS, holds_volumes
from segvit.data.doctor.balance import class_table
from segvit.data.doctor.diagnose import diagnose
from segvit.data.doctor.survey import survey
from segvit.data.doctor.tables import Diagnosis, Survey
from segvit.data.formats.convert import Kind, convert
from segvit.files import write_json, write_text
from segvit.tasks.console import aligned, progress_bar
from segvit.tasks.data_report import value_table, write_data_report

FEW_VALUES = 24  # rows of the printed table; the report has more


@dataclass(frozen=True)
class Checked:
    """What a check found: for machines, for people, and for whoever decides."""

    report: dict[str, Any]
    text: str
    survey: Survey
    diagnosis: Diagnosis


@dataclass(frozen=True)
class Written:
    """What a command wrote."""

    report: dict[str, Any]
    text: str


def examine(source: str | Path, *, leaks: bool = True, remember: bool = True, workers: int | None = None) -> Checked:
    """Survey and diagnose a dataset: `.diagnosis.findings`, worst first, and `.diagnosis.proposal`, the YAML to paste.

    `leaks` looks for the same pictures in train and val, `remember` keeps what was read for the next time; nothing else
    is written. Raises UserError where there is nothing to read.
    """
    if holds_volumes(source):
        raise UserError(f"{source}: holds volumes, which are checked as they are read; use train and val at once")
    with progress_bar("reading") as progress:
        found = survey(
            source, hashes=leaks, workers=workers, remember=remember,
            progress=lambda _, done, total: progress(done, total),
        )  # fmt: skip
    diagnosis = diagnose(found)
    return Checked(_report(found, diagnosis), _text(found, diagnosis), found, diagnosis)


def check_data(
    source: str, *, out: str, leaks: bool = True, remember: bool = True, workers: int | None = None
) -> Checked:
    """Examine a dataset and write report.json and index.html to `out`."""
    checked = examine(source, leaks=leaks, remember=remember, workers=workers)
    folder = Path(out)
    write_json(folder / "report.json", checked.report)
    write_data_report(folder / "index.html", checked.survey, checked.diagnosis)
    text = f"{checked.text}\n\nreport: {folder / 'index.html'}"
    return Checked(checked.report, text, checked.survey, checked.diagnosis)


def refuse_bad_data(source: str) -> Checked:
    """Examine the data of a training run. Raises UserError with the doctor's first error."""
    checked = examine(source, leaks=False)
    errors = [finding for finding in checked.diagnosis.findings if finding.severity == "error"]
    if errors:
        others = f"; {len(errors) - 1} more errors" if len(errors) > 1 else ""
        raise UserError(f"{errors[0].sentence}{others} (segvit data check {source} shows all and the YAML to paste)")
    return checked


def init_data(path: str, *, overwrite: bool = False) -> Written:
    """Write the dataset.yaml that the doctor proposes for a folder; an old one is kept beside it."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; give the one that holds images and masks")
    target = folder / DESCRIPTIONS[0]
    old = next((folder / name for name in DESCRIPTIONS if (folder / name).is_file()), None)
    if old is not None and not overwrite:
        raise UserError(f"{old} is there already; look at it with segvit data check {path}, or pass --overwrite")
    checked = examine(path, leaks=True)
    if checked.diagnosis.proposal is None:
        if not checked.diagnosis.healthy:
            raise UserError(next(f.sentence for f in checked.diagnosis.findings if f.severity == "error"))
        report = checked.report | {"written": None}
        return Written(report, f"{checked.text}\n\n{path} trains as it is; nothing was written")
    if old is not None:
        os.replace(old, old.with_name(f"{old.name}.bak"))
    write_text(target, checked.diagnosis.proposal)
    report = checked.report | {"written": str(target)}
    return Written(report, f"{checked.diagnosis.proposal.rstrip()}\n\n{target} written; next: segvit data check {path}")


def convert_data(
    source: str, *, out: str, kind: Kind, images: str | None, background: str | None, overwrite: bool
) -> Written:
    """Convert annotations to the plain layout and say what came of it."""
    with progress_bar("converting") as progress:
        result = convert(
            source, out, kind=kind, images=images, background=background, overwrite=overwrite, progress=progress
        )
    counts = ", ".join(f"{count:,} {split}" for split, count in result.images.items())
    lines = [
        f"{out}: {counts} images from {result.kind.replace('_', ' ')}, {len(result.classes)} classes: "
        + ", ".join(result.classes.names[:12]) + (", ..." if len(result.classes) > 12 else ""),
        *(f"note: {note}: {count:,}" for note, count in result.notes.items()),
        f"next: segvit data check {out}",
    ]  # fmt: skip
    report = {
        "out": out, "kind": result.kind, "images": result.images, "classes": list(result.classes.names),
        "notes": result.notes,
    }  # fmt: skip
    return Written(report, "\n".join(lines))


def _report(found: Survey, diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything as JSON."""
    splits = {}
    for split in found.splits:
        sizes = Counter(f"{pair.image.size[1]}x{pair.image.size[0]}" for pair in split.pairs if pair.image.size)
        modes = Counter(f"{pair.mask.format} {pair.mask.mode}" for pair in split.pairs if pair.mask.size)
        splits[split.name] = {
            "images": split.images, "masks": split.masks, "pairs": len(split.pairs),
            "images_alone": list(split.images_alone), "masks_alone": list(split.masks_alone),
            "sizes": dict(sizes.most_common()), "modes": dict(modes.most_common()),
        }  # fmt: skip
    values = [
        {"value": value.text, "coloured": value.coloured, "id": value.id, "pixels": value.pixels, "masks": value.masks}
        for value in value_table(found)
    ]
    return {
        "source": str(found.source), "healthy": diagnosis.healthy, "splits": splits, "values": values,
        "classes": [row.to_json() for row in class_table(found)],
        "findings": [asdict(finding) for finding in diagnosis.findings], "proposal": diagnosis.proposal,
        "seconds": found.seconds,
    }  # fmt: skip


def _text(found: Survey, diagnosis: Diagnosis) -> str:
    """The same for people, the verdict last, where a terminal shows it."""
    head = ("split", "pairs", "images alone", "masks alone", "sizes", "masks")
    rows = [head]
    for split in found.splits:
        sizes = Counter(pair.image.size for pair in split.pairs if pair.image.size)
        kinds = Counter(f"{pair.mask.format} {pair.mask.mode}" for pair in split.pairs if pair.mask.size)
        rows.append((
            split.name, f"{len(split.pairs):,}", f"{len(split.images_alone):,}", f"{len(split.masks_alone):,}",
            _few([f"{width}x{height}" for (height, width), _ in sizes.most_common()]),
            _few([kind for kind, _ in kinds.most_common()]),
        ))  # fmt: skip
    parts = [aligned(rows)]
    values = value_table(found)
    if values:
        total = sum(value.pixels for value in values)
        classes = found.classes
        cells = [("value", "class", "% of pixels", "masks")]
        for value in values[:FEW_VALUES]:
            name = "in no class" if classes is not None else "-"
            if value.id is not None:
                name = "ignored" if classes is None or value.id >= len(classes) else classes.names[value.id]
            cells.append((value.text, name, f"{100 * value.pixels / total:.3f}", f"{value.masks:,}"))
        more = f"\n... {len(values) - FEW_VALUES:,} more values" if len(values) > FEW_VALUES else ""
        parts.append(aligned(cells) + more)
    if diagnosis.findings:
        parts.append("\n".join(f"{finding.severity}: {finding.sentence}" for finding in diagnosis.findings))
    if diagnosis.proposal is not None:
        parts.append(f"the YAML to paste into dataset.yaml:\n\n{diagnosis.proposal.rstrip()}")
    parts.append("ready to train" if diagnosis.healthy else "training would go wrong: see the errors above")
    return "\n\n".join(parts)


def _few(words: list[str]) -> str:
    return ", ".join(words[:3]) + (f" + {len(words) - 3} more" if len(words) > 3 else "")
