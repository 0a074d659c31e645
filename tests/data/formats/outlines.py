"""The exact outlines and run lengths of regions, for the exporters in the tests of this folder."""

import numpy as np
from scipy import ndimage


def loops(region: np.ndarray) -> list[list[tuple[int, int]]]:
    """The closed outlines (x, y) along the pixel edges of a region (H, W): outer ones and those of holes."""
    padded = np.pad(region, 1)
    sides = {  # the neighbour that must be out, and the side from corner to corner, the region at its right
        (-1, 0): ((0, 0), (1, 0)), (0, 1): ((1, 0), (1, 1)), (1, 0): ((1, 1), (0, 1)), (0, -1): ((0, 1), (0, 0)),
    }  # fmt: skip
    edges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for (down, right), (begin, end) in sides.items():
        neighbour = np.roll(padded, (-down, -right), (0, 1))[1:-1, 1:-1]
        for y, x in np.argwhere(region & ~neighbour).tolist():
            edges.setdefault((x + begin[0], y + begin[1]), []).append((x + end[0], y + end[1]))
    found = []
    while edges:
        start = at = next(iter(edges))
        loop = []
        while True:
            loop.append(at)
            following = edges[at].pop()
            if not edges[at]:
                del edges[at]
            at = following
            if at == start:
                break
        found.append(loop)
    return found


def keyhole(region: np.ndarray) -> list[tuple[int, int]]:
    """One polygon whose inside by the even-odd rule is the region: all loops, joined by cuts that are walked twice."""
    first, *others = loops(region)
    polygon = [*first, first[0]]
    for loop in others:
        polygon += [*loop, loop[0], first[0]]
    return polygon


def painted(ids: np.ndarray) -> list[tuple[int, list[tuple[int, int]]]]:
    """(id, outer outline) of every connected part, in an order in which painting them filled gives the map."""
    parts = []
    for index in np.unique(ids).tolist():
        components, count = ndimage.label(ids == index)
        for number in range(1, count + 1):
            filled = ndimage.binary_fill_holes(components == number)
            parts.append((int(filled.sum()), index, keyhole(filled)))
    return [(index, outline) for _, index, outline in sorted(parts, key=lambda part: -part[0])]


def runs(flat: np.ndarray) -> list[int]:
    """The run lengths of a vector of booleans, the first of False."""
    changes = np.flatnonzero(np.diff(np.r_[False, flat]))
    return np.diff(np.r_[0, changes, len(flat)]).tolist()


def coco_text(counts: list[int]) -> str:
    """COCO's text of run lengths."""
    text = ""
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        while True:
            low, value = value & 31, value >> 5
            done = value == (-1 if low & 16 else 0)
            text += chr(48 + low + (0 if done else 32))
            if done:
                break
    return text


def brush_code(values: np.ndarray, widths=(3, 4, 8, 16)) -> list[int]:
    """The packed bytes of a vector of bytes, as Label Studio writes them for RGBA images."""
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{width - 1:04b}" for width in widths)
    borders = np.flatnonzero(np.diff(values.astype(int))) + 1
    singles: list[int] = []

    def packet(flag: int, count: int) -> str:
        choice = next(place for place, width in enumerate(widths) if count <= 1 << width)
        return f"{flag}{choice:02b}{count - 1:0{widths[choice]}b}"

    for run in [*np.split(values, borders), np.empty(0)]:
        if len(run) == 1:
            singles.append(int(run[0]))
            continue
        for begin in range(0, len(singles), 100):
            part = singles[begin : begin + 100]
            bits += packet(0, len(part)) + "".join(f"{value:08b}" for value in part)
        singles = []
        for begin in range(0, len(run), 1 << widths[-1]):
            bits += packet(1, len(run[begin : begin + (1 << widths[-1])])) + f"{int(run[0]):08b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]
