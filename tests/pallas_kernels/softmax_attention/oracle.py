"""Softmax attention and its gradients by formula, in numpy float64, one row and head at a time."""

from typing import Any, NamedTuple

import numpy as np


class Results(NamedTuple):
    """The output and the gradients for one cotangent."""

    out: Any
    dq: Any
    dk: Any
    dv: Any


def attention(q_BTHK, k_BSGK, v_BSGV, q_ids, kv_ids, offset, d_out) -> Results:
    """Every argument as in the op; ids and offset are given in full."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q_BTHK, k_BSGK, v_BSGV, d_out))
    batch, length, heads, key_dim = q.shape
    group = heads // k.shape[2]
    out, dq, dk, dv = np.zeros_like(d_out), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(batch):
        may_see = offset[b] + np.arange(length)[:, None] >= np.arange(k.shape[1])[None]
        may_see &= (q_ids[b][:, None] == kv_ids[b][None]) & (q_ids[b][:, None] != 0)
        for h in range(heads):
            g = h // group
            score = np.where(may_see, q[b, :, h] @ k[b, :, g].T / np.sqrt(key_dim), -np.inf)
            top = np.where(may_see.any(1), score.max(1), 0.0)[:, None]
            weight = np.exp(score - top)
            weight /= np.maximum(weight.sum(1, keepdims=True), 1e-300)
            out[b, :, h] = weight @ v[b, :, g]
            d_weight = d_out[b, :, h] @ v[b, :, g].T
            d_score = weight * (d_weight - (weight * d_weight).sum(1, keepdims=True))
            d_score /= np.sqrt(key_dim)
            dq[b, :, h] = d_score @ k[b, :, g]
            dk[b, :, g] += d_score.T @ q[b, :, h]
            dv[b, :, g] += weight.T @ d_out[b, :, h]
    return Results(out, dq, dk, dv)
