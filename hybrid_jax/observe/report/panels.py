"""Which figures a report has: what is known by name, and whatever else a run has recorded."""

import dataclasses

from hybrid_jax.observe.report import figures, recorded
from hybrid_jax.observe.report.figures import Line
from hybrid_jax.observe.report.recorded import Recorded


@dataclasses.dataclass(frozen=True)
class Panel:
    """One figure: a metric of all runs."""

    title: str
    name: str
    ylabel: str
    is_logarithmic: bool = False
    is_noisy: bool = True
    scale: float = 1.0


# In the order of the page. A figure without data is left out.
PANELS = (
    Panel("Learning rate", "learning_rate", "learning rate", is_noisy=False),
    Panel("Throughput", "tokens_per_second", "tokens per second"),
    Panel("Use of the devices", "mfu", "MFU (% of bfloat16 peak)", scale=100),
    Panel("Peak memory", "peak_memory_bytes", "memory (GB)", is_noisy=False, scale=1e-9),
    Panel("Gradient norm", "gradient_norm", "norm before clipping", is_logarithmic=True),
    Panel("Update norm", "update_norm", "norm of the change", is_logarithmic=True),
    Panel("Parameter norm", "parameter_norm", "norm of the parameters", is_noisy=False),
    Panel("Router load entropy", "expert_load_entropy", "of an even load (least even layer)"),
    Panel("Busiest expert", "expert_load_max", "load relative to the mean"),
    Panel("Idlest expert", "expert_load_min", "load relative to the mean"),
    Panel("Dropped choices", "expert_dropped_fraction", "share of all choices"),
)
LISTS = (
    Panel("Loss by source", "loss_by_source", "loss (nats per token)"),
    Panel("Held-out loss by source", "heldout_loss_by_source", "loss (nats per token)"),
    Panel("Loss by position", "loss_by_position", "loss (nats per token)"),
    Panel("Memories of lightning layers", "state_norms", "root mean square"),
)
# Drawn with the loss, told as events, or the same in other words.
_ELSEWHERE = {
    *("step", "loss", "heldout_loss", "skipped", "tokens", "seconds"),
    *("rewound_to", "checkpoint_failed"),
}


def draw(runs: list[Recorded]) -> list[tuple[str, str]]:
    """(title, <svg>) of every figure that these runs have data for."""
    drawn = [("Loss", _loss(runs))]
    known = {panel.name for panel in (*PANELS, *LISTS)} | _ELSEWHERE
    others = [
        Panel(name.replace("_", " ").capitalize(), name, name.replace("_", " "))
        for name in recorded.names(runs, float)
        if name not in known
    ]
    other_lists = [
        Panel(name.replace("_", " ").capitalize(), name, name.replace("_", " "))
        for name in recorded.names(runs, list)
        if name not in known
    ]
    for panel in (*PANELS, *others):
        lines = [
            Line(
                (steps, [value * panel.scale for value in values]),
                run.name,
                figures.colour_of(number),
                is_noisy=panel.is_noisy,
            )
            for number, run in enumerate(runs)
            for steps, values in [recorded.curve(run, panel.name)]
            if steps
        ]
        drawn += _figure(panel, lines)
    for panel in (*LISTS, *other_lists):
        drawn += _figure(panel, _list_lines(panel, runs))
    return drawn + _lengths(runs)


def _figure(panel: Panel, lines: list[Line]) -> list[tuple[str, str]]:
    if not lines:
        return []
    svg = figures.draw(panel.name, lines, ylabel=panel.ylabel, is_logarithmic=panel.is_logarithmic)
    return [(panel.title, svg)]


def _loss(runs: list[Recorded]) -> str:
    lines, marks = [], []
    for number, run in enumerate(runs):
        colour = figures.colour_of(number)
        of = f"{run.name}, " if len(runs) > 1 else ""
        training, heldout = recorded.curve(run, "loss"), recorded.curve(run, "heldout_loss")
        if training[0]:
            lines.append(Line(training, f"{of}training (mean)", colour, is_noisy=True))
        if heldout[0]:
            lines.append(
                Line(heldout, f"{of}held out", colour, is_measured_seldom=True, dashes="--")
            )
        marks += [record["step"] for record in run.records if record.get("skipped")]
    # More would be a bar.
    return figures.draw("loss", lines, ylabel="loss (nats per token)", marks=marks[:500])


def _list_lines(panel: Panel, runs: list[Recorded]) -> list[Line]:
    """An element of a list has its shade, a run its dashes."""
    dashes = ("-", "--", ":", "-.")
    lines = []
    for number, run in enumerate(runs):
        found = recorded.curves(run, panel.name)
        of = f"{run.name}, " if len(runs) > 1 else ""
        for idx, (line, shade) in enumerate(zip(found, figures.shades(len(found)), strict=True)):
            label = _element(panel, run, idx)
            if line[0]:
                lines.append(Line(line, of + label, shade, dashes=dashes[number % len(dashes)]))
    return lines


def _lengths(runs: list[Recorded]) -> list[tuple[str, str]]:
    """How long the documents are, where that is known."""
    lines = []
    for number, run in enumerate(runs):
        of = f"{run.name}, " if len(runs) > 1 else ""
        for idx, (source, lengths) in enumerate(run.lengths.items()):
            total = sum(lengths["tokens"]) or 1
            shares = [100 * tokens / total for tokens in lengths["tokens"]]
            colour = figures.colour_of(number if len(runs) > 1 else idx)
            dashes = ("-", "--", ":", "-.")[idx % 4 if len(runs) > 1 else 0]
            line = Line((lengths["edges"][:-1], shares), of + source, colour, dashes=dashes)
            lines.append(line)
    return [("Document lengths", figures.draw_lengths(lines))] if lines else []


def _element(panel: Panel, run: Recorded, idx: int) -> str:
    if panel.name.endswith("_by_source") and idx < len(run.sources):
        return run.sources[idx]
    if panel.name.endswith("_by_position"):
        # As `training.breakdown` cuts them: to 128 tokens, then each twice as long.
        first = 0 if idx == 0 else 64 << idx
        return f"{first:,}-{(128 << idx) - 1:,}"
    if panel.name == "state_norms" and idx < len(run.layers):
        return f"layer {run.layers[idx]}"
    return str(idx)
