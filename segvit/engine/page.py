"""The bricks of every HTML page we write: one file that explains itself, with no script and nothing from elsewhere."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segvit.contracts import Classes
from segvit.files import write_text

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
h3 { font-size: 15px; font-weight: 600; margin: 18px 0 8px; }
.verdict { border-left: 4px solid var(--right); margin-top: 16px; max-width: none; }
.verdict.bad { border-left-color: var(--wrong); }
.finding { display: grid; grid-template-columns: 90px 1fr; gap: 2px 16px; padding: 10px 0; border-top: 1px solid
  var(--line); } .finding:first-child { border-top: 0; } .finding b { font-weight: 600; }
.finding.error b { color: var(--wrong); }
.finding small { grid-column: 2; color: var(--soft); overflow-wrap: anywhere; }
pre { margin: 14px 0 0; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-x: auto; }
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
svg .ideal { stroke: var(--soft); stroke-dasharray: 3 4; } svg .block { fill: var(--bar); fill-opacity: .8; }
svg .link { stroke: var(--soft); stroke-opacity: .45; stroke-width: 2; } svg .name { fill: var(--ink); }
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
td.wide, td:has(> .bar) { width: 30%; }
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


def write_page(path: str | Path, title: str, sections: Sequence[str]) -> None:
    """Write a page of the given sections, atomically; empty ones are left out."""
    write_text(path, PAGE.substitute(title=escape(title), style=STYLE, body="\n".join(filter(None, sections))))


def percent(fraction: float | None, digits: int = 2) -> str:
    """A number without its sign; an en dash where the value is undefined."""
    return "&#8211;" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.{digits}f}"


def swatch(index: int, classes: Classes) -> str:
    """A small square in the colour of a class."""
    red, green, blue = classes.palette[index]
    return f'<i class="swatch" style="background:rgb({red},{green},{blue})"></i>'


def bar(fraction: float | None, digits: int = 2) -> str:
    """A horizontal bar with its number in percent."""
    known = fraction if fraction is not None and math.isfinite(fraction) else 0.0
    filled = f'<i><b style="width:{100 * known:.1f}%"></b></i>'
    return f'<div class="bar">{filled}<span>{percent(fraction, digits)}</span></div>'


def embedded(pixels: NDArray[np.uint8], flat: bool) -> str:
    """A data address: PNG for flat colours, which JPEG would smear; JPEG for photographs."""
    picture = Image.fromarray(pixels)
    if max(picture.size) > SIDE:
        scale = SIDE / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.NEAREST if flat else Image.Resampling.BOX)
    file, kind = io.BytesIO(), "png" if flat or max(picture.size) < PIXELATED else "jpeg"
    picture.save(file, kind, quality=85)  # PNG has no quality and does not mind
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def facts(rows: Sequence[tuple[str, str]], title: str = "How it was made") -> str:
    """A section of names and values."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    return f'<h2>{escape(title)}</h2><dl class="card">{items}</dl>' if items else ""


def notes(lines: Sequence[str]) -> str:
    """A card of remarks."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="card notes">{items}</ul>' if items else ""


def tiles(cells: Sequence[tuple[str, str, str]]) -> str:
    """Large figures in a row: (figure, unit, what it is); figure and unit are HTML."""
    shown = "".join(
        f'<div class="card tile"><b>{figure} <small>{unit}</small></b><span>{escape(text)}</span></div>'
        for figure, unit, text in cells
    )
    return f'<div class="grid tiles">{shown}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "") -> str:
    """A table in a card; cells are HTML, the first column is to the left."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="card scroll {kind}"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def views(title: str, remark: str, cells: Sequence[tuple[str, NDArray[np.uint8], bool]]) -> str:
    """Pictures side by side: (text, pixels (H, W, 3), whether the colours are flat)."""
    shown = "".join(
        f'<div><img class="{"hard" if max(pixels.shape[:2]) < PIXELATED else "soft"}" alt="{escape(text)}" '
        f'src="{embedded(pixels, flat)}"><small>{escape(text)}</small></div>'
        for text, pixels, flat in cells
    )
    return f'<div class="views"><h3>{escape(title)}<span>{escape(remark)}</span></h3>{shown}</div>'
