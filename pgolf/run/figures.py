"""The drawings of a run's report, as SVG elements to put into an HTML page.

Every drawing comes in two widths, WIDE and NARROW (CSS pixels at scale 1), so that its letters keep their size on a
telephone; the page shows one of them. Colours are CSS variables of the page (`--ink`, `--mlp`, ...), so that one
drawing serves light and dark. Equal input gives equal bytes: no dates, fixed identifiers.
"""

import io
import itertools
import re
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

WIDE, NARROW = 720, 340
FONT = 12.0
LETTER = 6.7  # average width of a letter at FONT, CSS pixels; system fonts are a little narrower
MEGABYTE = 1_000_000

# matplotlib knows no CSS variables: it draws with these stand-ins, which `_svg` then replaces by var(--name).
VARIABLES = (
    "ink", "muted", "line", "track", "on", "accent", "warm", "bad",
    "embedding", "attention", "mlp", "control", "container", "code", "other",
)  # fmt: skip
STAND_INS = {name: f"#0f0f{number:02x}" for number, name in enumerate(VARIABLES, start=1)}
_STYLE: dict[Any, Any] = {
    "font.size": FONT,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": STAND_INS["ink"],
    "axes.edgecolor": STAND_INS["line"],
    "axes.labelcolor": STAND_INS["muted"],
    "xtick.color": STAND_INS["line"],
    "ytick.color": STAND_INS["line"],
    "xtick.labelcolor": STAND_INS["muted"],
    "ytick.labelcolor": STAND_INS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "hatch.linewidth": 1.5,
}


def plain(text: object) -> str:
    """`text` without characters that XML forbids or that cannot be seen."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in str(text))


def role_colour(role: str) -> str:
    """The page's CSS variable for a role of bytes; roles unknown here share one."""
    return role if role in VARIABLES else "other"


def _svg(figure: Figure, name: str, label: str) -> str:
    """`figure` as an SVG element: no namespaces, metadata or style sheet; identifiers start with `name`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', buffer.getvalue()))
    variable = {stand_in: f"var(--{css})" for css, stand_in in STAND_INS.items()}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            key = key.rpartition("}")[2]
            if key == "id" and value not in used:
                continue
            for identifier in used if key in ("id", "href", "clip-path", "style") else ():
                value = value.replace(identifier, f"{name}-{identifier}")
            if key == "style":
                value = re.sub(r"#0f0f[0-9a-f]{2}", lambda match: variable[match[0]], value)
            element.set(key, value)
    box = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "role": "img", "aria-label": label})
    return ElementTree.tostring(root, encoding="unicode")


def _both(name: str, label: str, draw: Callable[[int], Figure]) -> dict[str, str]:
    """{"wide": svg, "narrow": svg} of `draw(width)`."""
    drawings = {}
    for kind, width in (("wide", WIDE), ("narrow", NARROW)):
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"{name}-{kind}"}):
            drawings[kind] = _svg(draw(width), f"{name}-{kind}", label)
    return drawings


def _canvas(width: int, height: float, left: float, right: float, top: float, bottom: float) -> tuple[Figure, Axes]:
    """A figure of `width` x `height` CSS pixels with one pair of axes inside the four margins."""
    figure = Figure(figsize=(width / 72, height / 72))  # an SVG of matplotlib has 72 units an inch
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )
    axes.tick_params(length=3)
    return figure, axes


def smooth(values: Sequence[float], radius: int) -> list[float]:
    """Mean of each value and its `radius` neighbours on both sides; fewer, but as many on each side, near the ends."""
    sums = [0.0, *itertools.accumulate(values)]
    out = []
    for place in range(len(values)):
        reach = min(radius, place, len(values) - 1 - place)
        out.append((sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1))
    return out


def thin(points: Sequence[tuple[float, float]], most: int = 800) -> list[tuple[float, float]]:
    """At most `most` of `points`, evenly spaced, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def loss_curve(
    train: Sequence[tuple[float, float]], validation: Sequence[tuple[float, float]], x_label: str
) -> dict[str, str]:
    """Loss (nats per token) over training: two lists of (x, loss) in order of x, either of which may be empty."""
    radius = min(len(train) // 30, 100)
    smoothed = list(zip([x for x, _ in train], smooth([loss for _, loss in train], radius), strict=True))
    dots = len(train) == 1

    def draw(width: int) -> Figure:
        figure, axes = _canvas(width, 300 if width == WIDE else 250, 46, 12, 32, 44)
        axes.grid(axis="y", color=STAND_INS["line"], linewidth=0.7)
        axes.set_axisbelow(True)
        if train:
            axes.plot(*zip(*thin(train), strict=True), color=STAND_INS["accent"], linewidth=0.9, alpha=0.45,
                      label="train")  # fmt: skip
            axes.plot(*zip(*thin(smoothed), strict=True), color=STAND_INS["accent"], linewidth=2,
                      label="smoothed", marker="o" if dots else None, markersize=5)  # fmt: skip
        if validation:
            axes.plot(*zip(*thin(validation, 200), strict=True), color=STAND_INS["warm"], linewidth=1.2, marker="o",
                      markersize=5 if len(validation) < 40 else 3, label="validation")  # fmt: skip
        axes.set_xlim(0, 1.02 * max(x for x, _ in [*train, *validation]) or 1)
        axes.set_xlabel(x_label)
        axes.set_ylabel("loss, nats per token" if width == WIDE else "nats per token")
        axes.xaxis.set_major_locator(MaxNLocator(8 if width == WIDE else 4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.legend(
            frameon=False,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=3,
            handlelength=1.6,
            borderpad=0.2,
            columnspacing=1.2,
            handletextpad=0.6,
        )
        return figure

    last = validation[-1][1] if validation else None
    label = "Loss over training" + (f"; the last validation loss is {last:.4f}" if last is not None else "")
    return _both("loss", label, draw)


def bars(name: str, label: str, rows: Sequence[tuple[str, float, str, str]]) -> dict[str, str]:
    """Horizontal bars from zero, one for each (name, value, value as text, colour variable), first on top."""
    rows = [(plain(title)[:40], max(value, 0.0), plain(text), colour) for title, value, text, colour in rows]
    left = 14 + LETTER * max(len(title) for title, *_ in rows)
    right = 12 + LETTER * max(len(text) for _, _, text, _ in rows)

    def draw(width: int) -> Figure:
        room = min(left, 0.5 * width)
        titles = [textwrap.wrap(title, max(round((room - 14) / LETTER), 8)) for title, *_ in rows]
        height = 30 + 15 * (max(len(lines) for lines in titles) - 1)
        figure, axes = _canvas(width, height * len(rows) + 8, room, right, 4, 4)
        most = max(value for _, value, _, _ in rows) or 1.0
        for place, ((_, value, text, colour), title) in enumerate(zip(rows, titles, strict=True)):
            axes.barh(place, value, height=18 / height, color=STAND_INS[colour])
            axes.annotate(text, (value, place), xytext=(6, 0), textcoords="offset points", va="center_baseline")
            axes.annotate("\n".join(title), (0, place), xytext=(-8, 0), textcoords="offset points", ha="right",
                          va="center_baseline" if len(title) == 1 else "center", color=STAND_INS["muted"])  # fmt: skip
        axes.set_xlim(0, most)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_axis_off()
        return figure

    return _both(name, label, draw)


def byte_budget(name: str, segments: Sequence[tuple[str, int]], budget: int | None) -> dict[str, str]:
    """One bar to scale: `segments` of (role, bytes) side by side over the budget, an overrun hatched beyond it."""
    segments = [(plain(role), size) for role, size in segments if size > 0]
    total = sum(size for _, size in segments)
    end = max(total, budget or 0) or 1
    excess = 0 if budget is None else max(0, total - budget)

    def draw(width: int) -> Figure:
        figure, axes = _canvas(width, 112, 1, 1, 26, 44)
        pixels = (width - 2) / end
        if budget:
            axes.barh(0, budget, height=1, color=STAND_INS["track"])
        start = 0
        for role, size in segments:
            axes.barh(0, size, left=start, height=1, color=STAND_INS[role_colour(role)])
            if len(role) * LETTER + 10 < size * pixels:
                axes.text(start + size / 2, 0, role, ha="center", va="center_baseline", color=STAND_INS["on"])
            start += size
        if excess:
            axes.barh(0, excess, left=budget, height=1, fill=False, hatch="///", linewidth=0,
                      edgecolor=STAND_INS["bad"])  # fmt: skip
        if budget:
            colour = STAND_INS["bad" if excess else "ink"]
            axes.plot([budget, budget], [-0.5, 0.72], color=colour, linewidth=2 if excess else 1.2, clip_on=False)
            words = f"budget {budget:,}" + (f", exceeded by {excess:,}" if excess else "")
            axes.text(
                budget, 0.78, words, ha="right" if budget * pixels > width / 2 else "left", va="bottom", color=colour
            )
        if budget and (budget - total) * pixels > 40:
            axes.text((total + budget) / 2, 0, "left", ha="center", va="center_baseline", color=STAND_INS["muted"])
        axes.set_xlim(0, end)
        axes.set_ylim(-0.5, 0.5)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(8 if width == WIDE else 4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / MEGABYTE:.6g}"))
        axes.set_xlabel("MB (1,000,000 bytes)")
        return figure

    of_budget = f" of a budget of {budget:,}" if budget is not None else ""
    return _both(name, f"{total:,} bytes used{of_budget}", draw)
