"""The two moves of inference, as pure functions of model and state: take a chunk, take a token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax.model import DecodeState, Model

PREFILL_CHUNK = 2048


def prefill_chunk(model: Model, tokens_BT, lengths_B, state: DecodeState):
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
    hidden = model.hidden(tokens_BT, segment_ids_BT, state=state)
    if lengths_B is None:
        last_BD = hidden.x_BTD[:, -1]
    else:
        last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
        last_BD = jnp.take_along_axis(hidden.x_BTD, last_B11, axis=1)[:, 0]
    return model.logits(last_BD), hidden.state


def decode_step(model: Model, token_B, state: DecodeState):
    """Continue every row by one token: (logits_BW, state)."""
    hidden = model.hidden(token_B[:, None], state=state)
    return model.logits(hidden.x_BTD[:, 0]), hidden.state


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _jitted_chunk(graphdef, params, tokens_BT, lengths_B, state):
    return prefill_chunk(nnx.merge(graphdef, params), tokens_BT, lengths_B, state)


def prefill(model: Model, tokens_BT, lengths_B, state: DecodeState, chunk: int = PREFILL_CHUNK):
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
    graphdef, params = nnx.split(model)
    last_logits_BW = None
    for start in range(0, int(lengths_B.max()), chunk):
        part_BT = tokens_BT[:, start : start + chunk]
        width = part_BT.shape[1]
        real_B = np.clip(lengths_B - start, 0, width).astype(np.int32)
        # Without padding the kernels need no segments, which is the faster program.
        given_B = None if (real_B == width).all() else jnp.asarray(real_B)
        logits_BW, state = _jitted_chunk(graphdef, params, jnp.asarray(part_BT), given_B, state)
        if last_logits_BW is None:
            last_logits_BW = logits_BW
        else:
            last_logits_BW = jnp.where((real_B > 0)[:, None], logits_BW, last_logits_BW)
    return last_logits_BW, state
