"""The pictures of `evidence.py`: recall by pairs, losses, beyond the training length, speed."""

import pathlib

COLORS = {"softmax": "#2f6db5", "lightning": "#c4501b", "hybrid": "#3a8f5c"}


def draw_runs(runs: list[dict], out: pathlib.Path) -> None:
    """Write recall.png, loss.png and length.png; one thin line a seed."""
    figure, axes = _axes("pairs in the row", "questions answered")
    _lines(axes, runs, [[(p["pairs"], p["recall"]) for p in r["pairs"]] for r in runs])
    chance = [(p["pairs"], p["chance"]) for p in runs[0]["pairs"]]
    axes.plot(*zip(*chance, strict=True), ":", color="#555555", label="one of the row's values")
    _finish(figure, axes, out / "recall.png", "Associative recall at the training length")

    figure, axes = _axes("step", "loss (nats per question)", log=False)
    _lines(axes, runs, [list(enumerate(_smooth(each["losses"]), 1)) for each in runs], marker="")
    _finish(figure, axes, out / "loss.png", "Training loss, running mean of 25 steps")

    figure, (left, right) = _axes("length (tokens)", "questions answered", columns=2)
    _lines(left, runs, [[(p["length"], p["recall"]) for p in r["lengths"]] for r in runs])
    lengths = sorted({cell["length"] for cell in runs[0]["needles"]})
    _lines(right, runs, [[(n, needle_share(r, n)) for n in lengths] for r in runs])
    left.set_title(f"{runs[0]['lengths'][0]['pairs']} pairs", fontsize=10)
    right.set(ylabel="needles found", title="one needle in filler, mean over depths")
    right.title.set_fontsize(10)
    trained = runs[0]["settings"]["length"]
    for axes in (left, right):
        axes.axvline(trained, color="#999999", linewidth=0.8, linestyle="--")
    _finish(figure, left, out / "length.png", f"Trained at {trained} tokens, asked beyond", right)


def draw_rates(rates: dict[str, list[dict]], out: pathlib.Path) -> None:
    """Write speed.png."""
    figure, axes = _axes("length (tokens)", "tokens a second, one update")
    points = [[(p["length"], p["tokens_per_second"]) for p in own] for own in rates.values()]
    _lines(axes, [{"variant": variant} for variant in rates], points, ceiling=None)
    axes.set_yscale("log")
    _finish(figure, axes, out / "speed.png", "Speed of an update against length")


def needle_share(run: dict, length: int) -> float:
    """Needles found at a length, over all depths."""
    found = [cell["exact"] for cell in run["needles"] if cell["length"] == length]
    return sum(found) / len(found)


def _lines(axes, runs, points, marker: str = "o", ceiling: float | None = 1.03) -> None:
    shown = set()
    for each, own in zip(runs, points, strict=True):
        name = each["variant"]
        axes.plot(
            *zip(*own, strict=True), marker=marker, markersize=4, linewidth=1.3, alpha=0.75,
            color=COLORS[name], label=None if name in shown else name,
        )  # fmt: skip
        shown.add(name)
    if ceiling is not None and marker:
        axes.set_ylim(-0.03, ceiling)


def _axes(x: str, y: str, log: bool = True, columns: int = 1):
    # Figure, not pyplot: no global state and no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 4), layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(1, columns, squeeze=False)[0]
    for axes in every:
        axes.set(xlabel=x, ylabel=y)
        if log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure, every[0] if columns == 1 else every


def _finish(figure, axes, path: pathlib.Path, title: str, *more) -> None:
    for each in (axes, *more):
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130, format="png")


def _smooth(values: list[float]) -> list[float]:
    """Mean of the last 25."""
    return [
        sum(values[max(0, i - 24) : i + 1]) / len(values[max(0, i - 24) : i + 1])
        for i in range(len(values))
    ]


def draw_maps(maps: dict[str, list[dict]], file: pathlib.Path) -> None:
    """Write the maps of needles beside one another: length to the right, depth downwards."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(maps), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, cells) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items()):
        lengths = sorted({cell["length"] for cell in cells})
        depths = sorted({cell["depth"] for cell in cells})
        found = {(cell["depth"], cell["length"]): cell["exact"] for cell in cells}
        shares = [[found[depth, length] for length in lengths] for depth in depths]
        axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for y, line in enumerate(shares):
            for x, share in enumerate(line):
                axes.text(x, y, f"{share:.2f}", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes.set(xlabel="length (tokens)", ylabel="depth", title=name)
    figure.savefig(file, dpi=130, format="png")
