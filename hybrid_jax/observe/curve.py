"""The picture of a run: training and held-out loss by tokens seen."""

import pathlib


def draw_losses(records: list[dict], path, *, title: str = "", unigram_entropy=None) -> None:
    """Write a PNG of `loss` (thin, with its running mean) and `heldout_loss` over steps.

    `records` are those of metrics.jsonl. `unigram_entropy` in nats draws the line that a model
    without context cannot pass. Raises ValueError if there is nothing to draw.
    """
    # Figure, not pyplot: no global state, no display, and pyplot costs a second to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    heldout = [(r["step"], r["heldout_loss"]) for r in records if r.get("heldout_loss") is not None]
    if not train:
        raise ValueError("There is no loss to draw: the metrics hold no step with a finite loss.")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = zip(*train)
    axes.plot(steps, losses, color="#9db8d9", linewidth=0.8, label="training, each step")
    axes.plot(steps, running_mean(losses), color="#1f4e8c", linewidth=1.8, label="training, mean")
    if heldout:
        axes.plot(*zip(*heldout), "o-", color="#c4501b", markersize=5, label="held out")
        step, loss = heldout[-1]
        axes.annotate(
            f"{loss:.3f}",
            (step, loss),
            (0, -16),
            textcoords="offset points",
            ha="center",
            color="#c4501b",
            weight="bold",
        )
    if unigram_entropy is not None:
        axes.axhline(
            unigram_entropy,
            color="#555555",
            linestyle="--",
            linewidth=1.2,
            label=f"unigram entropy of the held-out tokens, {unigram_entropy:.3f}",
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(pathlib.Path(path), dpi=130, format="png")


def running_mean(losses) -> list[float]:
    """Exponential mean over a twentieth of the run; over less at first, where loss falls fast."""
    means: list[float] = []
    for idx, loss in enumerate(losses):
        window = max(1.0, min(len(losses) / 20, idx / 4))
        before = means[-1] if means else loss
        means.append(before + (loss - before) / window)
    return means
