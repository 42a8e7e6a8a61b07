"""The look of all figures: matplotlib's settings, the colors, and SVG that follows the page into dark mode.

`figures` and `curves` draw with it; the page's style sheet gets its colors from `PALETTE`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

PALETTE = {
    "paper": ("#fbfaf8", "#14181e"),
    "card": ("#ffffff", "#1b2129"),
    "ink": ("#1d2430", "#e6e9ee"),
    "soft": ("#5b6472", "#98a3b1"),
    "rule": ("#e3e1dc", "#2c343f"),
    "grid": ("#ecebe6", "#262d37"),
    "accent": ("#0f6e84", "#4fc3dc"),
    "quiet": ("#a9b3bd", "#697482"),
    "best": ("#0b7285", "#4cc9e0"),
    "worst": ("#e8833a", "#f0954d"),
    "good": ("#1a7f4b", "#5ecf91"),
    "bad": ("#b3372f", "#f08a80"),
    "violet": ("#6f5bb5", "#a897f0"),
    "green": ("#3f8f4f", "#7fce8d"),
}
"""Each color in light and in dark mode. The light ones must differ: they are how `svg` knows which color is meant."""

LIGHT = {name: light for name, (light, _) in PALETTE.items()}


def mix(start: str, end: str, share: float) -> str:
    """The color at `share` (0 to 1) of the way between two colors of the palette, in light mode."""
    ends = (bytes.fromhex(LIGHT[name][1:]) for name in (start, end))
    return "#" + "".join(f"{round(a + (b - a) * round(share, 2)):02x}" for a, b in zip(*ends, strict=True))


# A mix is mixed again by the browser, from the colors of its mode.
_CSS = {
    mix(start, end, share / 100): f"color-mix(in srgb, var(--{end}) {share}%, var(--{start}))"
    for start, end in (("quiet", "accent"), ("best", "worst"))
    for share in range(101)
} | {light: f"var(--{name})" for name, light in LIGHT.items()}


def css(color: str) -> str:
    """What the page writes for a color of `PALETTE` or `mix`: a variable, so that it follows the page's mode."""
    return _CSS.get(color, color)


_STYLE: dict[Any, Any] = {
    "axes.edgecolor": "none",
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.formatter.limits": (-2, 5),
    "axes.grid": True,
    "axes.labelcolor": LIGHT["soft"],
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "font.size": 11,
    "grid.color": LIGHT["grid"],
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "report",  # the same file from the same numbers
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # a "$" in a name is a dollar sign
    "xtick.color": LIGHT["soft"],
    "xtick.major.size": 0,
    "ytick.color": LIGHT["soft"],
    "ytick.major.size": 0,
}

# What matplotlib writes into the tags of a file of its own, and what a figure inside a page needs.
_IN_TAGS = (
    (r' id="(?!m[0-9a-f]{10}")[^"]*"', ""),  # ids would repeat in the page; those of markers are hashes, and needed
    (' clip-path="[^"]*"', ""),  # refers to an id; all that is drawn lies inside its axes
    (r"font: ((?:\w+ )??)([\d.]+px) [^;\"]*", r"font-weight: \1; font-size: \2"),  # before matplotlib 3.11
    (r"font-family: [^;\"]*;?|font-weight: ;", ""),  # the page's font
    (r' transform="rotate\(-0 [^"]*"', ""),
    ("xlink:href", "href"),  # HTML knows no namespaces
    (r"(\.\d)\d+", r"\1"),  # a tenth of a pixel is enough
    (r"\s+", " "),
)


@contextmanager
def style() -> Iterator[None]:
    """Draw and save inside: matplotlib reads its settings at both times."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The browser has fonts for names that matplotlib's font cannot show.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # Names too long for the figure: it is drawn all the same.
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        yield


def new_axes(width: float, height: float) -> Axes:
    """Axes in a figure of this size, in CSS pixels at the smallest size that the page shows it in."""
    axes: Axes = Figure(figsize=(width / 72, height / 72)).add_subplot()
    axes.margins(x=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    return axes


def svg(axes: Axes, label: str) -> Markup:
    """The figure of `axes` as an SVG element for the page; `label` is what screen readers say of it."""
    file, figure = StringIO(), axes.figure
    assert isinstance(figure, Figure)
    figure.savefig(file, format="svg", metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
    text = file.getvalue()
    _, _, body = text[text.index("<svg") :].partition(">")  # without the XML header
    body = re.sub("<style.*?</style>|<clipPath.*?</clipPath>", "", body, flags=re.DOTALL)  # would hold for the page
    body = re.sub("<[^>]*>", _clean_tag, body)
    body = re.sub(r"<(g|defs)>\s*</\1>|<(g|defs)/>|\s+(?=<)", "", body)
    width, height = figure.get_size_inches() * 72
    return Markup(f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{body}')


def _clean_tag(tag: re.Match[str]) -> str:
    text = tag[0]
    for pattern, replacement in _IN_TAGS:
        text = re.sub(pattern, replacement, text)
    return re.sub("#[0-9a-f]{6}", lambda found: css(found[0]), text)
