"""How much lightning attention in bfloat16 loses for every slope of MiniMax-Text-01.

Errors against float64 for each head of each lightning layer, in units of the error that rounding
the exact result to bfloat16 makes: 1.00 is as good as bfloat16 can be. Kernels of a chip that is
not here are interpreted on the CPU. Exit code 1 if a head is above its limit.
"""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from hybrid_jax.config import layers, presets
from hybrid_jax.model import decay
from pallas_kernels import lightning_attention

RESULTS = ("out", "dq", "dk", "dv")
# Scores of few tokens are rounded once more than the result, which shows where decay is fast.
FAST, FAST_LIMIT, SLOW_LIMIT, GRADIENT_LIMIT = 0.05, 1.45, 1.1, 1.6


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure the rounding errors of lightning attention in bfloat16, slope by slope."""

    implementation: str = "pallas_tpu"
    """Which kernel; interpreted unless this machine has its chip."""
    length: int = 1024
    """Tokens of the row."""
    layers: tuple[int, ...] = ()
    """Layers to measure; all lightning layers of Text-01 if none is named."""
    out: pathlib.Path | None = None
    """Folder for rounding.png and rounding.json."""


def limits(slopes_H: np.ndarray) -> dict[str, np.ndarray]:
    """The most that each result of each head may lose."""
    forward = np.where(slopes_H > FAST, FAST_LIMIT, SLOW_LIMIT)
    return {"out": forward} | dict.fromkeys(RESULTS[1:], np.full(slopes_H.shape, GRADIENT_LIMIT))


def exact(q_TK, k_TK, v_TV, dout_TV, slope: float) -> tuple[np.ndarray, ...]:
    """Results of one head in float64: the recurrence written out as a sum over all pairs."""
    q_TK, k_TK, v_TV, dout_TV = (np.asarray(x, np.float64) for x in (q_TK, k_TK, v_TV, dout_TV))
    T = len(q_TK)
    age_TS = np.arange(T)[:, None] - np.arange(T)[None, :]
    decay_TS = np.where(age_TS >= 0, np.exp(-slope * np.maximum(age_TS, 0)), 0)
    weights_TS = (q_TK @ k_TK.T) * decay_TS
    dweights_TS = (dout_TV @ v_TV.T) * decay_TS
    return weights_TS @ v_TV, dweights_TS @ k_TK, dweights_TS.T @ q_TK, weights_TS.T @ dout_TV


def error(found, exact) -> float:
    """RMS error of an array, in units of the RMS error of rounding the exact one."""
    rounded = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64)
    ours, least = (np.asarray(x, np.float64) - exact for x in (found, rounded))
    return float(np.sqrt(np.mean(ours**2) / np.mean(least**2)))


def measure(run, slopes_H: np.ndarray, length: int, size: int, seed: int) -> dict[str, np.ndarray]:
    """Errors [H] of each result, for inputs as a layer makes them: silu of normal numbers."""
    draw = np.random.default_rng(seed)
    shape = (1, length, len(slopes_H), size)
    q, k, v = (jax.nn.silu(draw.standard_normal(shape, np.float32)) for _ in range(3))
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, draw.standard_normal(shape))]
    found = run(*arrays, -slopes_H.astype(np.float32))
    per_head = []
    for head, slope in enumerate(slopes_H):
        results = exact(*(np.asarray(x)[0, :, head] for x in arrays), slope)
        per_head.append([error(x[0, :, head], y) for x, y in zip(found, results, strict=True)])
    return dict(zip(RESULTS, np.asarray(per_head).T, strict=True))


def runner(implementation: str):
    """All results of the kernel: (q, k, v, dout, log_decay) to (out, dq, dk, dv)."""
    chip = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}.get(implementation)
    interpret = chip is not None and jax.default_backend() != chip

    @jax.jit
    def run(q, k, v, dout, log_decay):
        def attend(q, k, v):
            return lightning_attention(
                q, k, v, log_decay, implementation=implementation, interpret=interpret
            )[0]

        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(dout)

    return run


def lightning_layers() -> list[int]:
    """Of MiniMax-Text-01, by absolute index."""
    found = presets.get("minimax-text-01").layers
    return [i for i, x in enumerate(found) if isinstance(x.mixer, layers.LightningAttention)]


def table(records: list[dict]) -> str:
    """Markdown: the worst head of each layer."""
    lines = [
        f"| layer | slopes | out, slope > {FAST} | out, others | dq | dk | dv |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        slopes, found = np.asarray(record["slopes"]), record["errors"]
        out, is_fast = np.asarray(found["out"]), slopes > FAST
        cells = [f"{x.max():.2f}" if x.size else "" for x in (out[is_fast], out[~is_fast])]
        cells += [f"{max(found[name]):.2f}" for name in RESULTS[1:]]
        span = f"{slopes.max():.3g} to {slopes.min():.2g}"
        lines.append(f"| {record['layer']} | {span} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(records: list[dict], path: pathlib.Path, title: str) -> None:
    """A PNG: error over slope, a point a head and layer, for each result."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    slopes = np.concatenate([record["slopes"] for record in records])
    for name, color in zip(RESULTS, ("#1f4e8c", "#c4501b", "#4d8c4a", "#8c6bb1"), strict=True):
        found = np.concatenate([record["errors"][name] for record in records])
        axes.plot(slopes, found, ".", markersize=2.5, color=color, alpha=0.6, label=name)
    ends = np.asarray([slopes.min(), FAST, FAST, slopes.max()])
    axes.plot(ends, [SLOW_LIMIT] * 2 + [FAST_LIMIT] * 2, color="#1f4e8c", label="limit of out")
    axes.plot(ends[[0, 3]], [GRADIENT_LIMIT] * 2, "--", color="#555555", label="of gradients")
    axes.set(xscale="log", xlabel="slope (decay a token)", title=title)
    axes.set_ylabel("RMS error / that of rounding the exact result")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside right upper", markerscale=4)
    figure.savefig(path, dpi=130, format="png")


def main(args: Args) -> int:
    """Measure, print the table, write the files; 1 if a head is above its limit."""
    text_01 = presets.get("minimax-text-01")
    mixer = text_01.layers[0].mixer
    run, records, wrong = runner(args.implementation), [], []
    for layer in track(args.layers or lightning_layers(), "layers", console=Console(stderr=True)):
        slopes_H = -decay.log_decay(mixer.num_heads, layer, text_01.num_layers)
        found = measure(run, slopes_H, args.length, mixer.head_dim, seed=layer)
        for name, allowed_H in limits(slopes_H).items():
            for head in np.flatnonzero(found[name] > allowed_H):
                wrong.append(f"layer {layer}, head {head}, {name}: {found[name][head]:.3f}")
        errors_of = {name: [round(float(x), 4) for x in found[name]] for name in RESULTS}
        records.append({"layer": layer, "slopes": slopes_H.tolist(), "errors": errors_of})
    print(table(records))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        title = f"{args.implementation}, {args.length} tokens, heads of {mixer.head_dim}"
        draw(records, args.out / "rounding.png", title)
        (args.out / "rounding.json").write_text(json.dumps(records) + "\n")
    for line in wrong:
        print(f"above its limit: {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
