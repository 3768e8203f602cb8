"""What bench_gpu checks before it times: against the recurrence, and plain XLA at full length."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import lightning_attention, lightning_decode, lightning_decode_slots
from scripts import bench_gpu_ours as ours

# Relative RMS error of sums of products of numbers rounded to 8 bits: 2e-3 where nothing is wrong.
_ALLOWED = 4e-3
_HEAD_SIZES = ((128, 128), (64, 64), (128, 64), (64, 128))


def compare(what: str, found, expected, allowed: float = _ALLOWED) -> None:
    """End the run unless the relative RMS error is allowed."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    scale = np.sqrt(np.mean(expected**2))
    error = np.sqrt(np.mean((found - expected) ** 2)) / max(scale, 1e-30)
    if not error <= allowed:
        sys.exit(f"WRONG: {what}: relative RMS error {error:.2e}, allowed {allowed:.0e}")


def contract() -> None:
    """Packed rows with padding that holds NaN, all results and gradients; then one decode step."""
    ids = np.repeat([[0, 3, 0, 4, 5, 6, 0]], [7, 60, 9, 190, 1, 53, 30], axis=1)
    run = jax.jit(_results, static_argnames="implementation")
    for key_dim, value_dim in _HEAD_SIZES:
        draw = np.random.default_rng(0)
        shapes = (key_dim, key_dim, value_dim, value_dim)
        long = [
            jnp.asarray(draw.standard_normal((1, ids.size, 2, n)) + 0.5, jnp.bfloat16)
            for n in shapes
        ]
        initial, dfinal = (
            draw.standard_normal((1, 2, key_dim, value_dim)).astype(np.float32) for _ in range(2)
        )
        decay = np.asarray([-0.917, -1e-5], np.float32)
        states = (decay, initial, ids)
        q, k, v, dout = (x.astype(jnp.float32) for x in long)
        expected = run(q, k, v, *states, dout, dfinal, implementation="reference")
        is_real = (ids != 0)[:, :, None, None]
        qkv = [jnp.where(is_real, x, jnp.nan) for x in long[:3]]
        found = run(*qkv, *states, long[3], dfinal, implementation=ours.IMPLEMENTATION)
        for name, x in found.items():
            compare(f"K={key_dim} V={value_dim} {name}", x, expected[name])
    _decode()
    print("Contract: every result equals the recurrence, token by token in float32.")


def _results(q, k, v, decay, initial, ids, dout, dfinal, *, implementation):
    def attend(q, k, v, initial):
        return lightning_attention(
            q, k, v, decay, initial_state=initial, segment_ids=ids, implementation=implementation
        )

    (out, final), pullback = jax.vjp(attend, q, k, v, initial)
    names = ("out", "final", "dq", "dk", "dv", "dinitial")
    return dict(zip(names, (out, final, *pullback((dout, dfinal))), strict=True))


def _decode() -> None:
    draw = np.random.default_rng(1)
    q, k, v = (jnp.asarray(draw.standard_normal((3, 4, 128)), jnp.bfloat16) for _ in range(3))
    pool = draw.standard_normal((5, 4, 128, 128)).astype(np.float32)
    decay, slots = np.linspace(-0.9, 0, 4).astype(np.float32), np.asarray([3, -1, 0], np.int32)
    found, new = lightning_decode_slots(
        q, k, v, decay, jnp.asarray(pool), slots, implementation=ours.IMPLEMENTATION
    )
    for row, slot in enumerate(slots):
        if slot < 0:
            continue
        out, state = lightning_decode(
            q[row][None], k[row][None], v[row][None], decay, pool[slot][None],
            implementation="xla",
        )  # fmt: skip
        compare("decode", found[row], out[0])
        compare("decode's state", new[slot], state[0], 1e-5)
    compare("an unused slot", new[1], pool[1], 0.0)
    compare("a row without slot", found[1], np.zeros_like(found[1], np.float32), 0.0)


def against_xla(line, inputs: ours.Inputs) -> None:
    """The first and the last head of the line's own inputs, all their tokens."""
    if line.mode == "decode":
        return
    heads = np.asarray([0, line.heads - 1])
    part = ours.Inputs(
        *(x[:, :, heads] for x in inputs[:4]), inputs.log_decay[heads], inputs.state[:, heads],
        inputs.bounds,
    )  # fmt: skip
    names = ["out", "final state", "dq", "dk", "dv", "dstate"]
    if line.mode != "forward+backward":
        names = names[:2]

    def run(inputs, implementation):
        if len(names) == 2:
            return ours.attend(inputs, inputs.state, implementation)
        return ours.gradients(inputs, inputs.state, inputs.state, implementation)

    def results(inputs, implementation):
        function = functools.partial(run, implementation=implementation)
        return ours.jitted(function, inputs.bounds)(tuple(inputs[:6]))

    # All heads of ours, as they are timed; XLA would take minutes for them.
    found = results(inputs, ours.IMPLEMENTATION)
    with jax.default_matmul_precision("highest"):
        expected = results(part, "xla")
    for name, x, y in zip(names, found, expected, strict=True):
        dim = 1 if "state" in name else 2
        compare(f"{line.mode} {line.name} {name}", jnp.take(x, heads, axis=dim), y)
