"""The page around the figures: a summary, what happened, and what differs between runs."""

import html
import statistics

from hybrid_jax.observe.report import figures, panels, recorded
from hybrid_jax.observe.report.recorded import Recorded

# A table with more rows is not read.
_MAX_EVENTS = 200
_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1500px; padding: 1rem; background: #fff; color: #1b1b1b;
  font: 15px/1.45 system-ui, "Segoe UI", "DejaVu Sans", Verdana, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .5rem; }
h3 { font-size: .95rem; margin: 0 0 .2rem; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
figure { margin: 0; padding: .6rem; border: 1px solid #ddd; border-radius: 6px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: "DejaVu Sans", Verdana, sans-serif !important; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #e4e4e4; overflow-wrap: anywhere; min-width: 4rem; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .4em;
  border-radius: 2px; }
pre { overflow-x: auto; font-size: .8rem; }
"""


def render(runs: list[Recorded]) -> str:
    """The whole page. Raises ValueError if there is no run, or one without a step."""
    if not runs:
        raise ValueError("There is no run to report on; name at least one.")
    for run in runs:
        if not run.records:
            raise ValueError(f"{run.name} has recorded no step yet; there is nothing to draw.")
    title = "Training report: " + ", ".join(run.name for run in runs)
    drawn = "".join(
        f"<figure><h3>{_text(name)}</h3>{svg}</figure>" for name, svg in panels.draw(runs)
    )
    parts = [
        f"<h1>{_text(title)}</h1>",
        _summary(runs),
        f'<h2>Figures</h2><div class="figures">{drawn}</div>',
        _events(runs),
        _differences(runs),
        _configurations(runs),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _text(value) -> str:
    return html.escape(str(value))


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in row) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _number(value: float | None, form: str) -> str:
    return f'<td class="number">{"-" if value is None else format(value, form)}</td>'


def _named(runs: list[Recorded], number: int) -> str:
    colour = figures.colour_of(number)
    return f'<span class="swatch" style="background:{colour}"></span>{_text(runs[number].name)}'


def _summary(runs: list[Recorded]) -> str:
    rows = []
    for number, run in enumerate(runs):
        losses, heldout = recorded.curve(run, "loss")[1], recorded.curve(run, "heldout_loss")[1]
        speeds, uses = recorded.curve(run, "tokens_per_second")[1], recorded.curve(run, "mfu")[1]
        most = recorded.curve(run, "peak_memory_bytes")[1]
        # Over the last steps, for one alone says little.
        last = losses[-max(1, len(losses) // 50) :]
        rows.append(
            [
                f"<td>{_named(runs, number)}</td>",
                _number(run.records[-1]["step"], ",d"),
                _number(sum(recorded.curve(run, "tokens")[1]), ",.0f"),
                _number(statistics.fmean(last) if last else None, ".4f"),
                _number(heldout[-1] if heldout else None, ".4f"),
                _number(statistics.median(speeds) if speeds else None, ",.0f"),
                _number(statistics.median(uses) if uses else None, ".1%"),
                _number(max(most) / 1e9 if most else None, ".2f"),
                _number(sum(bool(record.get("skipped")) for record in run.records), "d"),
            ]
        )
    head = ["run", "steps", "tokens", "loss (mean of the last)", "held-out loss"]
    head += ["tokens/s (median)", "MFU (median)", "memory (GB)", "skipped updates"]
    return _table(head, rows)


def _events(runs: list[Recorded]) -> str:
    rows: list[tuple[int, int, str]] = []
    for number, run in enumerate(runs):
        rows += [(step, number, text) for step, text in _happened(run)]
    if not rows:
        return "<h2>Events</h2><p>None: no update was skipped, no checkpoint failed.</p>"
    rows.sort(key=lambda row: row[:2])
    cells = [
        [_number(step, ",d"), _named(runs, number), _text(text)]
        for step, number, text in rows[:_MAX_EVENTS]
    ]
    more = len(rows) - len(cells)
    after = f"<p>... and {more} more, in metrics.jsonl.</p>" if more else ""
    return f"<h2>Events</h2>{_table(['step', 'run', 'event'], cells)}{after}"


def _happened(run: Recorded):
    """(step, what) of a run."""
    for before, start in zip([None, *run.starts], run.starts):
        if before is None:
            continue
        old, new = before["environment"], start["environment"]
        changed = [
            f"{name}: {old.get(name, 'unknown')} -> {new.get(name, 'unknown')}"
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
        ]
        also = f"; changed: {', '.join(changed)}" if changed else ""
        yield start["step"], f"resumed after this step{also}"
    for record in run.records:
        step = record["step"]
        if record.get("skipped"):
            numbers = [record.get("loss"), record.get("gradient_norm")]
            if all(map(recorded.is_number, numbers)):
                why = f"a spike: loss {numbers[0]:.4g}, gradient norm {numbers[1]:.4g}"
            else:
                why = "the loss or the gradient was no number"
            yield step, f"update skipped, {why}"
        if "rewound_to" in record:
            yield step, f"parameters went back to those of step {record['rewound_to']}"
        if "checkpoint_failed" in record:
            yield step, f"the checkpoint of step {record['checkpoint_failed']} was not written"


def _differences(runs: list[Recorded]) -> str:
    if len(runs) == 1:
        return ""
    paths = dict.fromkeys(path for run in runs for path in run.config)
    rows = []
    for path in paths:
        values = [run.config.get(path, "absent") for run in runs]
        if len(set(values)) > 1:
            rows.append([_text(path), *map(_text, values)])
    head = ["field", *(_named(runs, number) for number in range(len(runs)))]
    body = _table(head, rows) if rows else "<p>None.</p>"
    return f"<h2>Differences of the configurations</h2>{body}"


def _configurations(runs: list[Recorded]) -> str:
    parts = []
    for number, run in enumerate(runs):
        lines = "\n".join(f"{path} = {value}" for path, value in run.config.items())
        parts.append(
            f"<details><summary>{_named(runs, number)}</summary>"
            f"<pre>{_text(lines or 'not known')}</pre></details>"
        )
    return f"<h2>Configurations</h2>{''.join(parts)}"
