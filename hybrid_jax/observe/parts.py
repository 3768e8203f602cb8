"""The picture of a checkpoint: how many bytes each part of the model takes, in all and by layer."""

import pathlib
from collections.abc import Sequence

_COLORS = {
    "experts": "#1f4e8c",
    "lightning attention": "#c4501b",
    "softmax attention": "#e8a33d",
    "embedding": "#5b8c5a",
    "head": "#93b88f",
    "router": "#7a5195",
    "norms": "#b8b8b8",
    "vision": "#4db6ac",
    "derived": "#8c6d5a",
    "unknown": "#d62728",
}


def draw_parts(parts: Sequence[tuple[str, int | None, int]], path, *, title: str) -> None:
    """Write a PNG of bytes by part: left in all, right by layer.

    `parts` are (name, layer or None, bytes). Raises ValueError if there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    totals: dict[str, int] = {}
    for name, _, count in parts:
        totals[name] = totals.get(name, 0) + count
    if not sum(totals.values()):
        raise ValueError("There is nothing to draw: no tensor has a known size.")
    names = sorted(totals, key=lambda name: -totals[name])
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    scale, unit = _unit(max(totals.values()))
    colors = [_COLORS.get(name, "#555555") for name in names]
    bars = left.barh(names, [totals[name] / scale for name in names], color=colors)
    whole = sum(totals.values())
    labels = [f" {_amount(totals[name])}, {totals[name] / whole:.1%}" for name in names]
    left.bar_label(bars, labels, fontsize=8)
    left.invert_yaxis()
    left.margins(x=0.38)
    left.set(xlabel=unit, title=f"{_amount(whole)} in all")
    _by_layer(right, parts, names)
    for axes in (left, right):
        axes.grid(axis="x" if axes is left else "y", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(pathlib.Path(path), dpi=130, format="png")


def _by_layer(axes, parts, names) -> None:
    """Stacked bars, a layer each; parts outside the layers are on the left picture only."""
    layers = sorted({layer for _, layer, _ in parts if layer is not None})
    sums: dict[tuple[str, int], int] = {}
    for name, layer, count in parts:
        if layer is not None:
            sums[name, layer] = sums.get((name, layer), 0) + count
    totals = [sum(sums.get((name, layer), 0) for name in names) for layer in layers]
    scale, unit = _unit(max(totals, default=1))
    below = [0.0] * len(layers)
    for name in names:
        heights = [sums.get((name, layer), 0) / scale for layer in layers]
        if any(heights):
            color = _COLORS.get(name, "#555555")
            axes.bar(layers, heights, bottom=below, color=color, width=0.85, label=name)
            below = [a + b for a, b in zip(below, heights)]
    axes.margins(y=0.05)
    axes.set(xlabel="layer", ylabel=unit, title="by layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if layers:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _unit(count: float) -> tuple[float, str]:
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            return scale, unit
    return 1.0, "bytes"


def _amount(count: float) -> str:
    scale, unit = _unit(count)
    return f"{count / scale:.3g} {unit}"
