"""The picture of a plan: where the time of a step goes, and what fills a device."""

import pathlib

GIB = 2**30
_IDEAL = "the model's FLOPs at peak rate"
_COLORS = {
    _IDEAL: "#2f6db5",
    "products and kernels below peak rate": "#8fb3dc",
    "elementwise and copies": "#c9b458",
    "recomputation": "#9a9a9a",
}
_WAITING = ("#c4501b", "#dd8452", "#e8b196", "#f0d2c2")


def draw(reports: list[dict], path) -> None:
    """Write a PNG with one bar a report. ValueError if none of them has a predicted time."""
    # Figure, not pyplot: no global state, no display, and pyplot costs a second to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [report for report in reports if report["step_seconds"] is not None]
    if not timed:
        raise ValueError("There is nothing to draw: no plan has a predicted time.")
    figure = Figure(figsize=(11, 2.4 + 0.75 * len(timed)), layout="constrained")
    FigureCanvasAgg(figure)
    time_axes, memory_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    _times(time_axes, timed)
    _memory(memory_axes, timed)
    figure.savefig(pathlib.Path(path), dpi=130, format="png")


def label(report: dict) -> str:
    """A plan in two short lines."""
    return f"{report['preset']}, {report['step']}\n{report['target']}: {report['mesh']}"


def _times(axes, reports) -> None:
    colors = dict(_COLORS)
    for row, report in enumerate(reports):
        left = 0.0
        for each in report["causes"]:
            cause = each["cause"]
            new = cause not in colors
            if new:
                colors[cause] = _WAITING[(len(colors) - len(_COLORS)) % len(_WAITING)]
            axes.barh(row, each["share"], left=left, color=colors[cause], edgecolor="white")
            if each["share"] > 0.05:
                dark = colors[cause] in (_COLORS[_IDEAL], _WAITING[0])
                axes.text(
                    left + each["share"] / 2, row, f"{each['share']:.0%}", ha="center", va="center",
                    color="white" if dark else "black",
                )  # fmt: skip
            left += each["share"]
        axes.text(1.01, row, f"{report['step_seconds']:.3g} s", va="center")
    axes.set(xlim=(0, 1.12), xlabel="share of the predicted step", xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_yticks(range(len(reports)), [label(report) for report in reports])
    shown = {each["cause"] for report in reports for each in report["causes"]}
    _finish(axes, {cause: color for cause, color in colors.items() if cause in shown}, len(reports))


def _memory(axes, reports) -> None:
    shades = {
        "arguments": "#2f6db5",
        "temporaries": "#8fb3dc",
        "outputs": "#c9b458",
        "code": "#999",
    }
    for row, report in enumerate(reports):
        left = 0.0
        for name, size in report["memory"].items():
            axes.barh(row, size / GIB, left=left, color=shades[name], edgecolor="white")
            left += size / GIB
        budget = report["budget_bytes_per_device"] / GIB
        axes.plot([budget, budget], [row - 0.45, row + 0.45], color="#c4501b", linewidth=2)
        verdict = "fits" if report["fits"] else "does not fit"
        axes.text(max(left, budget) * 1.02, row, verdict, va="center")
    axes.set(xlabel="GiB a device (line: what may be used)", yticks=[])
    axes.margins(x=0.2)
    _finish(axes, shades, len(reports))


def _finish(axes, colors: dict[str, str], num_rows: int) -> None:
    """The first plan on top, and what the colors mean half an inch below."""
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    handles = [axes.barh(0, 0, color=color, label=name) for name, color in colors.items()]
    below = -0.5 / (1 + 0.75 * num_rows)
    axes.legend(
        handles=handles, frameon=False, loc="upper left", bbox_to_anchor=(0, below), ncols=2
    )
