"""The pictures of evaluations: loss by context, recall by pairs, heat maps by length and depth."""

import math
import pathlib

_BLUE, _RED = "#1f4e8c", "#c4501b"


def draw_perplexity(report: dict, path, *, title: str) -> None:
    """Write a PNG: loss by length of the context, and by position in the longest."""
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2, sharey=True)
    left.plot(
        [each["length"] for each in report["lengths"]],
        [each["nats"] for each in report["lengths"]],
        "o-", color=_RED,
    )  # fmt: skip
    left.set(xlabel="longest context (tokens)", ylabel="loss (nats per token)", title=title)
    longest = max(each["length"] for each in report["lengths"])
    right.plot(
        [each["last"] for each in report["positions"]],
        [each["nats"] for each in report["positions"]],
        "o-", color=_BLUE,
    )  # fmt: skip
    right.set(xlabel="tokens seen", title=f"within windows of {longest:,} tokens")
    for axes in (left, right):
        _finish(axes)
    _save(figure, path)


def draw_recall(report: dict, path, *, title: str) -> None:
    """Write a PNG: share of the questions answered by pairs, and by distance to the pair."""
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2, sharey=True)
    pairs = [each["pairs"] for each in report["pairs"]]
    left.plot(pairs, [each["recall"] for each in report["pairs"]], "o-", color=_BLUE)
    chance = [each["chance"] for each in report["pairs"]]
    left.plot(pairs, chance, "--", color="#555555", label="one of the row's values at random")
    left.set(xlabel="pairs", ylabel="questions answered", title=title, ylim=(-0.03, 1.03))
    left.legend(frameon=False)
    for idx, each in enumerate(report["pairs"]):
        shade = 0.3 + 0.7 * (idx + 1) / len(pairs)
        right.plot(
            [d["last"] for d in each["distances"]],
            [d["recall"] for d in each["distances"]],
            "o-", color=_BLUE, alpha=shade, markersize=4, label=f"{each['pairs']} pairs",
        )  # fmt: skip
    right.set(xlabel="tokens back to the pair")
    right.legend(frameon=False)
    for axes in (left, right):
        _finish(axes)
    _save(figure, path)


def draw_grid(cells: list[dict], path, *, row: str, columns: tuple[str, ...], title: str) -> None:
    """Write a PNG with one heat map a score in `columns`: length to the right, `row` downwards."""
    lengths = sorted({cell["length"] for cell in cells})
    rows = sorted({cell[row] for cell in cells})
    found = {(cell[row], cell["length"]): cell for cell in cells}
    width = 2.2 + 0.8 * len(lengths)
    figure = _figure(max(5.0, width * len(columns)), 1.8 + 0.5 * len(rows))
    for axes, score in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns):
        values = [[found[name, length][score] for length in lengths] for name in rows]
        # From red (0) to green (1); a log-probability has the color of its probability.
        shares = [[_share(score, value) for value in line] for line in values]
        axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                dark = not 0.15 < shares[y][x] < 0.85
                axes.text(
                    x, y, f"{value:.2f}", ha="center", va="center", fontsize=9,
                    color="white" if dark else "black",
                )  # fmt: skip
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(rows)), [f"{name:g}" for name in rows])
        axes.set(xlabel="length (tokens)", ylabel=row, title=_LABELS[score])
    figure.suptitle(title)
    _save(figure, path)


_LABELS = {
    "exact": "greedy answers right",
    "forced": "answer likeliest throughout",
    "tokens": "answer tokens likeliest",
    "logprob": "log-probability of an answer token",
}


def _share(score: str, value: float) -> float:
    return math.exp(value) if score == "logprob" else value


def _figure(width: float, height: float):
    # Figure, not pyplot: no global state, no display, and pyplot costs a second to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(axes) -> None:
    """A logarithmic axis of lengths, written out."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure, path) -> None:
    figure.savefig(pathlib.Path(path), dpi=130, format="png")
