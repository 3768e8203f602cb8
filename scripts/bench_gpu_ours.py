"""Our side of bench_gpu: programs that run an operation again and again, one after the other."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import lightning_attention, lightning_decode_slots

IMPLEMENTATION = "pallas_gpu"
# Long enough that starting the program, some 0.1 ms, does not count.
_SECONDS = 0.2


class Inputs(NamedTuple):
    """What every mode is made of, on the GPU."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    dout: jax.Array
    log_decay: jax.Array
    state: jax.Array
    bounds: np.ndarray | None
    """First tokens of the packed sequences, and the end of the last."""

    @property
    def segment_ids(self) -> jax.Array | None:
        if self.bounds is None:
            return None
        ids = np.repeat(np.arange(1, len(self.bounds)), np.diff(self.bounds))
        return jnp.asarray(ids[None], jnp.int32)


def attend(inputs: Inputs, state, implementation: str):
    """Out and final state."""
    return lightning_attention(
        inputs.q, inputs.k, inputs.v, inputs.log_decay, initial_state=state,
        segment_ids=inputs.segment_ids, implementation=implementation,
    )  # fmt: skip


def gradients(inputs: Inputs, state, dstate, implementation: str):
    """Out and final state, then the gradients of q, k, v and the state."""

    def of(q, k, v, state):
        return attend(inputs._replace(q=q, k=k, v=v), state, implementation)

    results, pullback = jax.vjp(of, inputs.q, inputs.k, inputs.v, state)
    return *results, *pullback((inputs.dout, dstate))


def _forward_step(inputs, carry):
    # The state carries: a run waits for the one before, at no cost in memory traffic.
    return attend(inputs, carry[1], IMPLEMENTATION)


def _gradient_step(inputs, carry):
    # Through both states, so that neither direction is the same in every run.
    out, state, dq, dk, dv, dstate = gradients(inputs, carry[1], carry[-1], IMPLEMENTATION)
    return out, state, dq, dk, dv, dstate


def _decode_step(inputs, carry):
    slots = jnp.arange(inputs.q.shape[0], dtype=jnp.int32)
    q, k, v = (x[:, 0] for x in inputs[:3])
    return lightning_decode_slots(
        q, k, v, inputs.log_decay, carry[1], slots, implementation=IMPLEMENTATION
    )


_STEPS: dict[str, Callable[..., Any]] = {
    "forward": _forward_step,
    "packed": _forward_step,
    "forward+backward": _gradient_step,
    "decode": _decode_step,
}


def jitted(function: Callable[..., Any], bounds: np.ndarray | None) -> Callable[..., Any]:
    """`function(inputs, ...)` compiled as a function of the arrays of `inputs`, which are large."""
    return jax.jit(lambda arrays, *rest: function(Inputs(*arrays, bounds), *rest))


def _repeat(mode: str, inputs: Inputs, count):
    """The results of the last of `count` runs."""
    out = inputs.v[:, 0] if mode == "decode" else inputs.v
    carry = (out, inputs.state)
    if mode == "forward+backward":
        carry += (inputs.q, inputs.k, inputs.v, inputs.state)
    return lax.fori_loop(0, count, lambda _, carry: _STEPS[mode](inputs, carry), carry)


def timer(line, inputs: Inputs) -> Callable[[], float]:
    """A function that returns the milliseconds of one run, compiled and warm."""
    compiled = jitted(functools.partial(_repeat, line.mode), inputs.bounds)
    program = functools.partial(compiled, tuple(inputs[:6]))
    _elapsed(program, 1)
    count = max(3, min(10_000, int(_SECONDS / (_elapsed(program, 3) / 3))))
    _elapsed(program, count)
    return lambda: _elapsed(program, count) / count * 1e3


def lower(line):
    """The program of a line, lowered for CUDA with no GPU at hand."""
    shape = (line.batch, line.length, line.heads, 128)
    tensor = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    state = jax.ShapeDtypeStruct((line.batch, line.heads, 128, 128), jnp.float32)
    decay = jax.ShapeDtypeStruct((line.heads,), jnp.float32)
    program = jitted(functools.partial(_repeat, line.mode), line.bounds)
    arrays = (tensor, tensor, tensor, tensor, decay, state)
    traced = program.trace(arrays, jax.ShapeDtypeStruct((), jnp.int32))
    return traced.lower(lowering_platforms=("cuda",))


def _elapsed(program, count: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(jnp.int32(count)))
    return time.perf_counter() - start
