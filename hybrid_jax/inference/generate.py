"""Prompts in, new tokens out: prefill, then one compiled loop of decode steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax.inference import sampling as sampling_lib
from hybrid_jax.inference import steps
from hybrid_jax.model import Model
from hybrid_jax.model.parallel.placement import Placement

# Capacities and prompt widths are rounded up to this, so that near lengths share a program.
_ROUND = 64


def generate(
    model: Model,
    tokens_BT,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    prompt_lengths=None,
    placement: Placement | None = None,
) -> jax.Array:
    """New tokens int32 [B, max_new_tokens] after the prompts int [B, T].

    Rows are right-padded; `prompt_lengths` [B] are their real tokens (default: all T). Temperature
    0 is greedy. After `eos_id` a row is filled with it; decoding stops when all rows have ended.
    With a `placement` the model's parameters live where it stores them (`Placement.place`).
    Raises ValueError for empty prompts, token ids outside the vocabulary and impossible sizes.
    """
    # The keys of JAX hold 32 bits: a larger seed would draw what another one draws.
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed must be in [0, 2**32); got {seed}.")
    sampling = sampling_lib.Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens_BT, lengths_B = _checked(model, tokens_BT, prompt_lengths, max_new_tokens, eos_id)
    B, T = tokens_BT.shape
    width = -(-T // _ROUND) * _ROUND if (lengths_B != T).any() or T > 1 else T
    if max_new_tokens == 0:
        return jnp.zeros((B, 0), jnp.int32)
    tokens_BT = np.pad(tokens_BT, ((0, 0), (0, width - T)))
    capacity = -(-(width + max_new_tokens) // _ROUND) * _ROUND
    state = model.initial_state(B, capacity, placement)
    logits_BW, state = steps.prefill(model, tokens_BT, lengths_B, state, placement=placement)
    out_BT, _ = decode(
        model, logits_BW, state, sampling, max_new_tokens, jax.random.key(seed), eos_id, placement
    )
    return out_BT


def decode(
    model: Model,
    logits_BW,
    state,
    sampling: sampling_lib.Sampling,
    max_new_tokens: int,
    key,
    eos_id: int | None = None,
    placement: Placement | None = None,
):
    """(new tokens int32 [B, max_new_tokens], state) after a `prefill`; `state` is given up.

    `state` must have room for them. The last token is drawn and not yet fed.
    """
    loop = _decode_loop(model.config, placement, sampling, max_new_tokens)
    _, params = nnx.split(model)
    return loop(params, logits_BW, state, key, jnp.int32(-1 if eos_id is None else eos_id))


@functools.lru_cache
def _decode_loop(config, placement, sampling, max_new_tokens):
    """A compiled (params, logits_BW, state, key, eos_id) -> (out_BT, state).

    Draws, writes and steps until every row has ended. `eos_id` -1: none ends.
    """
    step = steps.make_decode_step(config, placement, sampling)
    run = functools.partial(_run_loop, step, sampling, max_new_tokens)
    return jax.jit(run, donate_argnames="state")


def _run_loop(decode_step, sampling, max_new_tokens, params, logits_BW, state, key, eos_id):
    B = logits_BW.shape[0]

    def key_of(step):
        return jax.random.fold_in(key, step)

    def body(carry):
        step, token_B, ended_B, out_BT, state = carry
        token_B, state = decode_step(params, token_B, state, key_of(step))
        token_B = jnp.where(ended_B, eos_id, token_B)
        out_BT = jax.lax.dynamic_update_slice(out_BT, token_B[:, None], (0, step))
        return step + 1, token_B, ended_B | (token_B == eos_id), out_BT, state

    def unfinished(carry):
        step, _, ended_B, _, _ = carry
        return (step < max_new_tokens) & ~jnp.all(ended_B)

    token_B = sampling_lib.next_token(logits_BW, sampling, key_of(0))
    # Rows that end early keep eos in every place that the loop no longer writes.
    out_BT = jnp.full((B, max_new_tokens), eos_id, jnp.int32).at[:, 0].set(token_B)
    carry = (jnp.int32(1), token_B, token_B == eos_id, out_BT, state)
    _, _, _, out_BT, state = jax.lax.while_loop(unfinished, body, carry)
    # The state goes back too: only so can its donated memory be used in place.
    return out_BT, state


def _checked(model: Model, tokens_BT, prompt_lengths, max_new_tokens: int, eos_id):
    tokens_BT = np.asarray(tokens_BT)
    if tokens_BT.ndim != 2 or tokens_BT.dtype.kind not in "iu" or 0 in tokens_BT.shape:
        raise ValueError(
            "tokens_BT must be an integer array [batch, time] with at least one row and one token; "
            f"got {tokens_BT.dtype} {tokens_BT.shape}."
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be >= 0; got {max_new_tokens}.")
    vocab = model.config.vocab_size
    B, T = tokens_BT.shape
    lengths_B = np.full((B,), T) if prompt_lengths is None else np.asarray(prompt_lengths)
    if lengths_B.shape != (B,) or lengths_B.min() < 1 or lengths_B.max() > T:
        raise ValueError(
            f"prompt_lengths must be [{B}] numbers between 1 and {T}; got {lengths_B.tolist()}."
        )
    real_BT = np.arange(T)[None, :] < lengths_B[:, None]
    outside = tokens_BT[real_BT & ((tokens_BT < 0) | (tokens_BT >= vocab))]
    if outside.size:
        raise ValueError(
            f"Token ids must be below vocab_size={vocab} and not negative; got {int(outside[0])}."
        )
    if eos_id is not None and not 0 <= eos_id < vocab:
        raise ValueError(f"eos_id must be in [0, {vocab}) or None; got {eos_id}.")
    return tokens_BT.astype(np.int32), lengths_B.astype(np.int32)
