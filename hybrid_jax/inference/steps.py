"""The two moves of inference: take a chunk, take a token. Functions of model and state, compiled.

With a placement all arrays live on its mesh: `hybrid_jax.inference.shapes` says where.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax.config.model import ModelConfig
from hybrid_jax.inference.sampling import GREEDY, Sampling, next_token
from hybrid_jax.model import DecodeState, Model, abstract
from hybrid_jax.model.parallel.placement import Placement
from sharding import Logical

PREFILL_CHUNK = 2048


def prefill_chunk(
    model: Model, tokens_BT, lengths_B, state: DecodeState, placement: Placement | None = None
):
    """Continue every row by its first `lengths_B` of T tokens: (last_logits_BW, state).

    Chunks in any split equal the whole. `lengths_B` (int32 [B], or None for all T) may be 0: such a
    row keeps its state and its logits are unspecified. The caller makes sure that T more tokens
    fit the capacity of every row, padding included.
    """
    T = tokens_BT.shape[1]
    segment_ids_BT = None
    if lengths_B is not None:
        index_1T = jnp.arange(T, dtype=jnp.int32)[None, :]
        segment_ids_BT = (index_1T < lengths_B[:, None]).astype(jnp.int32)
    hidden = model.hidden(tokens_BT, segment_ids_BT, state=state, placement=placement)
    if lengths_B is None:
        last_BD = hidden.x_BTD[:, -1]
    else:
        last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
        last_BD = jnp.take_along_axis(hidden.x_BTD, last_B11, axis=1)[:, 0]
    return _logits(model, last_BD, placement), hidden.state


def decode_step(model: Model, token_B, state: DecodeState, placement: Placement | None = None):
    """Continue every row by one token: (logits_BW, state)."""
    hidden = model.hidden(token_B[:, None], state=state, placement=placement)
    return _logits(model, hidden.x_BTD[:, 0], placement), hidden.state


def _logits(model: Model, x_BD, placement: Placement | None):
    logits_BW = model.logits(x_BD)
    if placement is None:
        return logits_BW
    rows = placement.for_decoding(x_BD.shape[0])
    return rows.constrain(logits_BW, Logical.BATCH, Logical.VOCAB)


@functools.cache
def make_prefill_step(config: ModelConfig, placement: Placement | None = None) -> Callable:
    """A compiled `prefill_chunk`: (params, tokens_BT, lengths_B, state) -> (logits_BW, state).

    `params` is what `flax.nnx.split` makes of the model; the old state is given up. Compiled once
    for each shape. The same function for the same arguments; `.lower` takes abstract ones.
    """
    graphdef, _ = nnx.split(abstract(config))

    def prefill_step(params, tokens_BT, lengths_B, state: DecodeState):
        model = nnx.merge(graphdef, params)
        return prefill_chunk(model, tokens_BT, lengths_B, state, placement)

    return jax.jit(prefill_step, donate_argnames="state")


@functools.cache
def make_decode_step(
    config: ModelConfig, placement: Placement | None = None, sampling: Sampling = GREEDY
) -> Callable:
    """A compiled step: (params, token_B, state, key) -> (next_token_B, state).

    Takes one token a row and draws the next: with the key as `sampling.next_token` does, without it
    if greedy. Otherwise as `make_prefill_step`.
    """
    graphdef, _ = nnx.split(abstract(config))

    def step(params, token_B, state: DecodeState, key):
        logits_BW, state = decode_step(nnx.merge(graphdef, params), token_B, state, placement)
        return next_token(logits_BW, sampling, key), state

    return jax.jit(step, donate_argnames="state")


def prefill(
    model: Model,
    tokens_BT,
    lengths_B,
    state: DecodeState,
    chunk: int = PREFILL_CHUNK,
    placement: Placement | None = None,
):
    """Run right-padded prompts through the model in chunks: (last_logits_BW, state).

    `lengths_B` int32 [B] are the real tokens of each row. Logits are those of each row's last real
    token. Compiled once for each shape of a chunk. The state is donated: use the one returned.
    """
    tokens_BT, lengths_B = np.asarray(tokens_BT), np.asarray(lengths_B)
    B, T = tokens_BT.shape
    if lengths_B.shape != (B,) or lengths_B.min() < 1 or lengths_B.max() > T:
        raise ValueError(
            f"lengths must be [{B}] numbers between 1 and {T}, the real tokens of each prompt; "
            f"got {lengths_B.tolist()}."
        )
    step = make_prefill_step(model.config, placement)
    _, params = nnx.split(model)
    last_logits_BW = None
    for start in range(0, int(lengths_B.max()), chunk):
        part_BT = tokens_BT[:, start : start + chunk]
        width = part_BT.shape[1]
        real_B = np.clip(lengths_B - start, 0, width).astype(np.int32)
        # Without padding the kernels need no segments, which is the faster program.
        given_B = None if (real_B == width).all() else jnp.asarray(real_B)
        logits_BW, state = step(params, jnp.asarray(part_BT), given_B, state)
        if last_logits_BW is None:
            last_logits_BW = logits_BW
        else:
            last_logits_BW = jnp.where((real_B > 0)[:, None], logits_BW, last_logits_BW)
    return last_logits_BW, state
