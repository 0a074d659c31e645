"""The report of a run: one HTML file that explains itself, with no script and nothing loaded from elsewhere.

Shapes    H W pixels, K classes.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segvit.contracts import Classes
from segvit.engine.charts import Series, curves, grouped, heat_map
from segvit.files import write_text
from segvit.inference.prediction import colorize

MAX_HEAT = 30  # classes; a larger heat map has cells too small to read
SIDE = 400  # pixels of the long side of embedded pictures
PIXELATED = 200  # pixels; smaller pictures are enlarged by the browser and shall keep hard edges

STYLE = """
:root { color-scheme: light dark; --paper: #f7f7f5; --card: #fff; --ink: #1c2026; --soft: #667080; --line: #e3e5ea;
  --right: #2f6fde; --wrong: #e2542f; --strong: #fff; --bar: #2f6fde;
  --hue0: #2f6fde; --hue1: #e07b1f; --hue2: #1f9d76; --hue3: #b0479b; --hue4: #8a6d1d; --hue5: #5b5bd0; --hue6: #c73a4b;
  --hue7: #4d8796; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1c2026; --ink: #e7e9ec; --soft: #98a1af;
  --line: #2e343c; --right: #5b95f5; --wrong: #f0764f; --strong: #10131a; --bar: #5b95f5;
  --hue0: #74a8fb; --hue1: #f2a359; --hue2: #4fc79f; --hue3: #dd86cb; --hue4: #d0b155; --hue5: #9a9af5; --hue6: #f27684;
  --hue7: #82bdcc; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1160px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 30px; line-height: 1.2; font-weight: 650; letter-spacing: -.02em; margin: 0 0 24px;
  overflow-wrap: anywhere; }
h2 { font-size: 19px; font-weight: 650; letter-spacing: -.01em; margin: 44px 0 4px; }
p { margin: 0 0 14px; color: var(--soft); max-width: 78ch; }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px; }
.scroll { overflow-x: auto; }
.grid { display: grid; gap: 16px; margin: 14px 0 0;
  grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
.tiles { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); margin: 0; }
.tile b { display: block; font-size: 32px; line-height: 1.15; font-weight: 650; letter-spacing: -.02em; }
.tile small { font-size: 16px; font-weight: 500; color: var(--soft); }
.tile span { color: var(--soft); font-size: 14px; }
.notes { margin: 16px 0 0; border-left: 4px solid var(--wrong); padding: 12px 18px 12px 34px; }
figure { margin: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 16px; margin-bottom: 8px; }
figcaption b { font-weight: 600; margin-right: auto; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 14px; color: var(--soft); font-size: 13px; }
.key i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px; vertical-align: middle;
  background: var(--hue); }
svg { display: block; width: 100%; height: auto; font-size: 12px; }
svg text { fill: var(--soft); }
svg .rule { stroke: var(--line); } svg .axis { stroke: var(--soft); stroke-opacity: .5; }
svg .line { fill: none; stroke: var(--hue); stroke-width: 1.8; stroke-linejoin: round; }
svg .faint { stroke-width: 1; stroke-opacity: .28; }
svg circle { fill: var(--hue); } svg .best { fill: none; stroke: var(--ink); stroke-width: 1.6; }
svg .note { fill: var(--ink); font-weight: 600; }
.hue0 { --hue: var(--hue0); } .hue1 { --hue: var(--hue1); } .hue2 { --hue: var(--hue2); } .hue3 { --hue: var(--hue3); }
.hue4 { --hue: var(--hue4); } .hue5 { --hue: var(--hue5); } .hue6 { --hue: var(--hue6); } .hue7 { --hue: var(--hue7); }
.heat { margin: 0 auto; } .heat .right { fill: var(--right); } .heat .wrong { fill: var(--wrong); }
.heat .frame { fill: none; stroke: var(--line); } .heat .value { fill: var(--ink); font-size: 11px; }
.heat .value.strong { fill: var(--strong); }
table { border-collapse: collapse; width: 100%; min-width: 640px; }
th { font-weight: 500; font-size: 13px; color: var(--soft); }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr:last-child td { border-bottom: 0; }
td:first-child { white-space: normal; overflow-wrap: break-word; min-width: 10em; }
td.wide { width: 30%; }
.bar { display: flex; align-items: center; gap: 12px; }
.bar i { flex: 1; height: 8px; border-radius: 4px; background: var(--line); overflow: hidden; }
.bar i b { display: block; height: 100%; border-radius: 4px; background: var(--bar); }
.bar span { min-width: 46px; }
.wrongs .bar i b { background: var(--wrong); }
.swatch { display: inline-block; width: 13px; height: 13px; border-radius: 4px; margin-right: 9px; vertical-align: -1px;
  border: 1px solid rgba(128, 128, 128, .55); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 14px; margin: 6px 0 14px; }
.views { display: grid; grid-template-columns: repeat(4, 1fr); gap: 10px; margin-bottom: 18px; }
.views h3 { grid-column: 1 / -1; margin: 0; font-size: 14px; font-weight: 600; overflow-wrap: anywhere; }
.views h3 span { color: var(--soft); font-weight: 400; margin-left: 10px; }
.views img { width: 100%; display: block; border-radius: 8px; }
.views small { color: var(--soft); } .views .hard { image-rendering: pixelated; }
@media (max-width: 640px) { .views { grid-template-columns: 1fr 1fr; } main { padding: 24px 14px; } }
dl { display: grid; grid-template-columns: minmax(110px, max-content) 1fr; gap: 7px 26px; margin: 14px 0 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
</main>
</body>
</html>
""")


class Picture(NamedTuple):
    """One evaluated image."""

    name: str
    image: NDArray[np.uint8]  # (H, W, 3)
    label: NDArray[Any]  # (H, W) class ids, with the ignore id
    prediction: NDArray[Any]  # (H, W)
    miou: float  # of this image; NaN where nothing is labelled


def write_report(
    path: str | Path,
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    history: Sequence[dict[str, Any]],
    metrics: dict[str, Any] | None,
    confusion: NDArray[np.int64] | None,
    classes: Classes,
    pictures: Sequence[Picture],
    notes: Sequence[str] = (),
) -> None:
    """Write the report to `path`, atomically. What is empty or None (a run without validation) has no section.

    `metrics` is what `Metrics.to_json` gives; `history` holds the rows of `metrics.jsonl`: training rows
    {"step", "loss", "loss_...", "lr", "grad_norm"} and validation rows {"step", "val": {"miou", "macc", "aacc"}}.
    """
    sections = [
        _headline(metrics) if metrics is not None else "",
        _notes(notes),
        _curves(history),
        _per_class(metrics, classes) if metrics is not None else "",
        _confusion(confusion, classes) if confusion is not None and confusion.any() else "",
        _pictures(pictures, classes),
        _facts(facts),
    ]
    write_text(path, PAGE.substitute(title=escape(title), style=STYLE, body="\n".join(filter(None, sections))))


def _percent(fraction: float | None, digits: int = 2) -> str:
    """A number without its sign; an en dash where the value is undefined."""
    return "&#8211;" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.{digits}f}"


def _headline(metrics: dict[str, Any]) -> str:
    """The three means and how many classes they speak of."""
    tiles = [
        ("miou", "mIoU, mean over classes"),
        ("macc", "mAcc, mean over classes"),
        ("aacc", "aAcc, of all pixels"),
    ]
    cells = [
        f'<div class="card tile"><b>{_percent(metrics[key])} <small>%</small></b><span>{text}</span></div>'
        for key, text in tiles
    ]
    count = f"{metrics['counted']} <small>of {len(metrics['classes'])}</small>"
    cells.append(f'<div class="card tile"><b>{count}</b><span>classes counted in mIoU</span></div>')
    return f'<div class="grid tiles">{"".join(cells)}</div>'


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="card notes">{items}</ul>' if items else ""


def _curves(history: Sequence[dict[str, Any]]) -> str:
    train = [row for row in history if "val" not in row]
    tests = [{"step": row["step"], **row["val"]} for row in history if "val" in row]
    terms = sorted({key for row in train for key in row if key.startswith("loss_")})
    # With one term only, the term is the total.
    losses = [("total", "loss")] + [(key.removeprefix("loss_"), key) for key in terms if len(terms) > 1]
    charts = [
        curves("Training loss", [_series(train, key, name) for name, key in losses]),
        curves("Validation mIoU", [_series(tests, "miou", "mIoU", dots=True)], unit="%"),
        curves("Learning rate", [_series(train, "lr", "learning rate", smooth=False)]),
        curves("Gradient norm", [_series(train, "grad_norm", "gradient norm")]),
    ]
    if not any(charts):
        return ""
    return f'<h2>Training</h2><div class="grid">{"".join(charts)}</div>'


def _series(rows: Sequence[dict[str, Any]], key: str, name: str, *, dots: bool = False, smooth: bool = True) -> Series:
    """The rows that have `key`; null, as JSON writes NaN, leaves a gap."""
    points = [(row["step"], math.nan if row[key] is None else row[key]) for row in rows if key in row]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return Series(name, steps, values, dots=dots, smooth=smooth)


def _swatch(index: int, classes: Classes) -> str:
    red, green, blue = classes.palette[index]
    return f'<i class="swatch" style="background:rgb({red},{green},{blue})"></i>'


def _bar(fraction: float | None, digits: int = 2) -> str:
    known = fraction if fraction is not None and math.isfinite(fraction) else 0.0
    filled = f'<i><b style="width:{100 * known:.1f}%"></b></i>'
    return f'<div class="bar">{filled}<span>{_percent(fraction, digits)}</span></div>'


def _per_class(metrics: dict[str, Any], classes: Classes) -> str:
    """Best class first; those without a value last."""
    order = sorted(metrics["classes"], key=lambda row: -1.0 if row["iou"] is None else row["iou"], reverse=True)
    rows = "".join(
        f"<tr><td>{_swatch(row['id'], classes)}{escape(row['name'])}</td>"
        f'<td class="wide">{_bar(row["iou"])}</td><td>{_percent(row["acc"])}</td><td>{_percent(row["precision"])}</td>'
        f"<td>{_percent(row['dice'])}</td><td>{_percent(row['share'])}</td></tr>"
        for row in order
    )
    return (
        "<h2>Classes</h2><p>In percent, best first. The accuracy of a class is its recall. A dash: not defined, since "
        "the class occurs in no label, or in neither labels nor predictions (then it is not counted in mIoU).</p>"
        '<div class="card scroll"><table><thead><tr><th>class</th><th>IoU</th><th>accuracy = recall</th>'
        f"<th>precision</th><th>Dice</th><th>share of pixels</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _confusion(matrix: NDArray[np.int64], classes: Classes) -> str:
    few = len(classes) <= MAX_HEAT
    chart = ""
    if few:
        chart = (
            "<p>Rows are what the pixels are, columns what they were read as, in percent of the row. Hold the pointer "
            f'over a cell for its numbers.</p><div class="card scroll">{heat_map(matrix, classes.names)}</div>'
        )
    rows = "".join(
        f"<tr><td>{_swatch(row, classes)}<b>{escape(classes.names[row])}</b> read as {_swatch(column, classes)}"
        f"<b>{escape(classes.names[column])}</b>: {_percent(share, 1)} % of {escape(classes.names[row])} pixels</td>"
        f'<td class="wide">{_bar(share, 1)}</td><td>{grouped(matrix[row, column])}</td></tr>'
        for row, column, share in top_confusions(matrix, 10 if few else 20)
    )
    table = (
        '<h2>Largest confusions</h2><p>By share of the true class.</p><div class="card scroll wrongs"><table>'
        f"<thead><tr><th>confusion</th><th>percent of the class</th><th>pixels</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )
    return (f"<h2>Confusion</h2>{chart}" if few else "") + (table if rows else "")


def top_confusions(matrix: NDArray[np.int64], count: int) -> list[tuple[int, int, float]]:
    """The (label, prediction, share of the label's pixels) of the largest shares off the diagonal."""
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    np.fill_diagonal(shares, 0)
    order = np.argsort(-shares, axis=None, kind="stable")[:count]
    cells = [divmod(int(i), len(matrix)) for i in order]
    return [(row, column, float(shares[row, column])) for row, column in cells if shares[row, column] > 0]


def _pictures(pictures: Sequence[Picture], classes: Classes) -> str:
    if not pictures:
        return ""
    worst = sorted(pictures, key=lambda one: math.inf if math.isnan(one.miou) else one.miou)
    ids = np.unique(np.concatenate([np.unique(part) for one in worst for part in (one.label, one.prediction)]))
    legend = "".join(
        f"<span>{_swatch(int(i), classes)}{escape(classes.names[i])}</span>" for i in ids if i < len(classes)
    )
    return (
        "<h2>Pictures</h2><p>The worst first. Errors are red on the grey image; black pixels of a label are ignored "
        f'and count neither way.</p><div class="legend">{legend}</div>' + "".join(_row(one, classes) for one in worst)
    )


def _row(one: Picture, classes: Classes) -> str:
    """One picture's four views."""
    known = one.label != classes.ignore_index
    wrong = known & (one.label != one.prediction)
    grey = np.repeat(one.image.mean(2, keepdims=True) * 0.6 + 60, 3, axis=2)
    grey[wrong] = grey[wrong] * 0.15 + np.array((235, 40, 40)) * 0.85
    share = wrong.sum() / max(known.sum(), 1)
    views = [
        ("image", one.image, False),
        ("label", colorize(one.label, classes), True),
        ("prediction", colorize(one.prediction, classes), True),
        (f"errors: {_percent(share, 1)} % of labelled pixels", grey.astype(np.uint8), False),
    ]
    cells = "".join(
        f'<div><img class="{"hard" if max(one.label.shape) < PIXELATED else "soft"}" alt="{text}" '
        f'src="{_embedded(pixels, flat)}"><small>{text}</small></div>'
        for text, pixels, flat in views
    )
    return f'<div class="views"><h3>{escape(one.name)}<span>mIoU {_percent(one.miou)} %</span></h3>{cells}</div>'


def _embedded(pixels: NDArray[np.uint8], flat: bool) -> str:
    """A data address: PNG for flat colours, which JPEG would smear; JPEG for photographs."""
    picture = Image.fromarray(pixels)
    if max(picture.size) > SIDE:
        scale = SIDE / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.NEAREST if flat else Image.Resampling.BOX)
    file, kind = io.BytesIO(), "png" if flat or max(picture.size) < PIXELATED else "jpeg"
    picture.save(file, kind, quality=85)  # PNG has no quality and does not mind
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return f'<h2>How it was made</h2><dl class="card">{items}</dl>' if items else ""
