"""The picture of a data set: how long its documents are."""

import pathlib


def draw_lengths(lengths: dict, path, *, title: str = "") -> None:
    """Write a PNG of the shares of documents and of tokens by document length.

    `lengths` is that entry of a prepared source's dataset.json: `edges` in tokens, and `documents`
    and `tokens` between each two of them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    edges = lengths["edges"]
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    series = (("documents", "#9db8d9", -0.2), ("tokens", "#1f4e8c", 0.2))
    for name, color, offset in series:
        counts = lengths[name]
        total = sum(counts) or 1
        shares = [100 * count / total for count in counts]
        places = [idx + offset for idx in range(len(counts))]
        axes.bar(places, shares, width=0.4, color=color, label=f"{name} ({total:,})")
    marks = [_short(edge) for edge in edges]
    axes.set_xticks([idx - 0.5 for idx in range(len(edges))], marks)
    axes.set(xlabel="tokens in a document", ylabel="share (%)", title=title)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(pathlib.Path(path), dpi=130, format="png")


def _short(count: int) -> str:
    """1024 as 1Ki."""
    for power, unit in ((30, "Gi"), (20, "Mi"), (10, "Ki")):
        if count >= 1 << power:
            return f"{count >> power}{unit}"
    return str(count)
