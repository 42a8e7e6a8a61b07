"""The few shapes that the report's figures are made of, as SVG text. Everything that is text is escaped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float]


@dataclass
class Chart:
    """A drawing with a plot area inside margins, in units of which one is a CSS pixel at its smallest size.

    Attributes:
        label: What it shows, for screen readers.
        points: How many data were drawn; a figure without any is a mistake.
    """

    label: str
    width: float = 320
    height: float = 200
    left: float = 40
    right: float = 10
    top: float = 10
    bottom: float = 30
    points: int = 0
    _parts: list[str] = field(default_factory=list)

    def x(self, low: float, high: float) -> Callable[[float], float]:
        """The horizontal scale from data to drawing."""
        return _scale(low, high, self.left, self.width - self.right)

    def y(self, low: float, high: float) -> Callable[[float], float]:
        """The vertical scale from data to drawing, upwards."""
        return _scale(low, high, self.height - self.bottom, self.top)

    def line(self, a: Point, b: Point, kind: str, style: str = "") -> None:
        """A straight line of CSS class `kind`."""
        (x1, y1), (x2, y2) = a, b
        self._parts.append(
            f'<line class="{kind}"{_style(style)} x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
        )

    def path(self, points: Sequence[Point], kind: str, style: str = "", *, closed: bool = False) -> None:
        """A curve through `points`, which count as data."""
        self.points += len(points)
        steps = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
        self._parts.append(f'<path class="{kind}"{_style(style)} d="{steps}{" Z" if closed else ""}"/>')

    def dot(self, at: Point, kind: str, style: str = "", *, radius: float = 4, title: str = "") -> None:
        """A point, which counts as one of data; `title` shows when it is pointed at."""
        self.points += 1
        hover = f"<title>{escape(title)}</title>" if title else ""
        self._parts.append(
            f'<circle class="{kind}"{_style(style)} cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:g}">{hover}</circle>'
        )

    def bar(self, a: Point, b: Point, kind: str, style: str = "", *, title: str = "") -> None:
        """A rectangle between two corners, which counts as one of data."""
        self.points += 1
        x, y = min(a[0], b[0]), min(a[1], b[1])
        hover = f"<title>{escape(title)}</title>" if title else ""
        self._parts.append(
            f'<rect class="{kind}"{_style(style)} x="{x:.1f}" y="{y:.1f}" width="{abs(a[0] - b[0]):.1f}" '
            f'height="{abs(a[1] - b[1]):.1f}" rx="2">{hover}</rect>'
        )

    def text(self, at: Point, text: str, anchor: str = "start", kind: str = "tick", style: str = "") -> None:
        """Text whose start, middle or end is at a point."""
        self._parts.append(
            f'<text class="{kind}"{_style(style)} x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
        )

    def x_axis(self, scale: Callable[[float], float], ticks: Sequence[float], title: str = "") -> None:
        """Numbers below the plot area, and what they are."""
        base = self.height - self.bottom
        for tick in ticks:
            self.line((scale(tick), self.top), (scale(tick), base), "grid")
            self.text((scale(tick), base + 13), short(tick), "middle")
        if title:
            self.text(((self.left + self.width - self.right) / 2, self.height - 3), title, "middle", "axis")

    def y_axis(self, scale: Callable[[float], float], ticks: Sequence[float]) -> None:
        """Numbers left of the plot area."""
        for tick in ticks:
            self.line((self.left, scale(tick)), (self.width - self.right, scale(tick)), "grid")
            self.text((self.left - 6, scale(tick) + 3.5), short(tick), "end")

    def __str__(self) -> str:
        label = escape(self.label, quote=True)
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{label}">'
            + "".join(self._parts)
            + "</svg>"
        )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between `low` and `high`, `most` at most (or one more)."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round((first + k) * step, 12) for k in range(int((high - first * step) / step + 1e-9) + 1)]


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """The range of `values` with some room, never empty."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(low) * share or 1.0
    return low - room, high + room


def short(value: float) -> str:
    """A number for an axis."""
    if value and (abs(value) >= 10_000 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}".replace("-", "−")


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _style(style: str) -> str:
    return f' style="{style}"' if style else ""
