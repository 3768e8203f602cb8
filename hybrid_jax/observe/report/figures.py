"""Curves as SVG that stands inline in a page: text stays text, sizes follow the window."""

import dataclasses
import io
import math
import re
from typing import Any

from hybrid_jax.observe.curve import running_mean
from hybrid_jax.observe.report.recorded import Curve

# Colours that stay apart for colour-blind readers (Okabe and Ito); the run's own in every figure.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
# Inches, at which text of ten points is readable on a telephone too.
_WIDTH, _HEIGHT = 5.2, 3.0
# More points than pixels only make the page heavy.
MAX_POINTS = 800
# Of which a legend still helps.
_MAX_LABELS = 8


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve of a figure."""

    curve: Curve
    label: str
    colour: str
    is_measured_seldom: bool = False
    """Drawn with a mark at each point."""
    is_noisy: bool = False
    """Drawn thin, with its running mean over it."""
    dashes: str = "-"


def colour_of(run: int) -> str:
    """The colour of the run with this number."""
    return COLOURS[run % len(COLOURS)]


def shades(count: int) -> list[str]:
    """Colours for a series that has an order, as layers do: from dark to light."""
    import matplotlib
    from matplotlib.colors import to_hex

    scale = matplotlib.colormaps["viridis"]
    return [to_hex(scale(0.85 * idx / max(1, count - 1))) for idx in range(count)]


def draw(
    name: str,
    lines: list[Line],
    *,
    ylabel: str,
    is_logarithmic: bool = False,
    marks: list[int] | None = None,
) -> str:
    """The lines over steps as an <svg> element; `marks` are steps to be pointed at."""
    # Figure, not pyplot: no global state, no display.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for line in lines:
            _draw_line(axes, line)
        if marks:
            axes.plot(marks, [0.015] * len(marks), "|", color="#b00020", markersize=9,
                      transform=axes.get_xaxis_transform(), label="update skipped")  # fmt: skip
        axes.set(xlabel="step", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        values = [value for line in lines for value in line.curve[1]]
        # Within a power of ten a logarithmic axis would have hardly a number on it.
        if is_logarithmic and min(values) > 0 and max(values) >= 10 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.yaxis.set_major_formatter(lambda value, _: _short(value))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        _legend(figure, axes)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(written.getvalue())


def draw_lengths(lines: list[Line]) -> str:
    """Shares of all tokens (%) by the length of their document, which doubles from step to step."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "lengths", "text.parse_math": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for line in lines:
            style: Any = {"color": line.colour, "linestyle": line.dashes, "linewidth": 1.4}
            axes.step(*line.curve, where="post", label=line.label, **style)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))
        axes.set(xlabel="tokens in a document", ylabel="share of all tokens (%)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        _legend(figure, axes)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(written.getvalue())


def thinned(curve: Curve) -> Curve:
    """At most `MAX_POINTS` points: means of as many neighbours each."""
    steps, values = curve
    size = math.ceil(len(steps) / MAX_POINTS)
    if size <= 1:
        return curve
    cuts = range(0, len(steps), size)
    mean = lambda numbers: sum(numbers) / len(numbers)
    return (
        [steps[min(cut + size, len(steps)) - 1] for cut in cuts],
        [mean(values[cut : cut + size]) for cut in cuts],
    )


def _draw_line(axes, line: Line) -> None:
    steps, values = thinned(line.curve)
    style = {"color": line.colour, "linestyle": line.dashes}
    if line.is_measured_seldom or len(steps) == 1:
        axes.plot(steps, values, "o", markersize=4, label=line.label, **style)
    elif line.is_noisy:
        axes.plot(steps, values, linewidth=0.7, alpha=0.4, **style)
        axes.plot(steps, running_mean(values), linewidth=1.7, label=line.label, **style)
    else:
        axes.plot(steps, values, linewidth=1.4, label=line.label, **style)


def _legend(figure, axes) -> None:
    """Above the curves, where it hides none."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > _MAX_LABELS:
        # Of many, which are shaded in order, the ends say enough.
        handles, labels = [handles[0], handles[-1]], [labels[0], f"... {labels[-1]}"]
    if len(handles) < 2:
        return
    short = [label if len(label) < 48 else f"{label[:22]} ... {label[-22:]}" for label in labels]
    # Room of its own, or many runs would leave the curves none.
    figure.set_size_inches(_WIDTH, _HEIGHT + 0.16 * len(labels))
    figure.legend(handles, short, frameon=False, fontsize="small", loc="outside upper left")


def _short(value: float) -> str:
    """12000 as 12k, 3400000 as 3.4M; small numbers as they are."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.6g}{unit}"
    return f"{value:.6g}"


def _inline(svg: str) -> str:
    """The element alone, as wide as its place; the view box keeps the proportions."""
    element = svg[svg.index("<svg") :]
    head, rest = element.split(">", 1)
    head = re.sub(r' (width|height|xmlns:xlink|version)="[^"]*"', "", head)
    return f'{head} xmlns:xlink="http://www.w3.org/1999/xlink" role="img">{rest}'
