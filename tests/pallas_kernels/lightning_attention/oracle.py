"""The recurrence and its gradient in plain numpy float64, one row, token and head at a time."""

from typing import NamedTuple

import numpy as np


class Results(NamedTuple):
    """What attention returns, then the gradients of sum(out * dout) + sum(final * dfinal)."""

    out: np.ndarray
    final: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dlog_decay: np.ndarray
    dinitial: np.ndarray


def attention(q, k, v, log_decay, initial, ids, dout, dfinal) -> Results:
    """All results for every row and head; shapes as in the op."""
    q, k, v, log_decay, initial, dout, dfinal = (
        np.asarray(x, np.float64) for x in (q, k, v, log_decay, initial, dout, dfinal)
    )
    like = (v, initial, q, k, v, log_decay, initial)
    results = Results(*(np.zeros_like(x) for x in like))
    for row in range(q.shape[0]):
        tokens, resets = _real_tokens(ids[row])
        for head in range(q.shape[2]):
            one = (row, tokens, head)
            found = _one_head(
                q[one], k[one], v[one], log_decay[head], initial[row, head], resets,
                dout[one], dfinal[row, head],
            )  # fmt: skip
            for name in ("out", "dq", "dk", "dv"):
                getattr(results, name)[one] = getattr(found, name)
            results.final[row, head] = found.final
            results.dinitial[row, head] = found.dinitial
            results.dlog_decay[head] += found.dlog_decay
    return results


def _real_tokens(ids):
    """Positions of the real tokens, and for each whether the state is reset before it."""
    tokens = np.flatnonzero(ids)
    real_ids = np.asarray(ids)[tokens]
    return tokens, np.diff(real_ids, prepend=real_ids[:1]) != 0


def _one_head(q, k, v, log_decay, initial, resets, dout, dfinal) -> Results:
    decay = np.exp(log_decay)
    befores, states = [], [initial]
    for t in range(len(q)):
        befores.append(np.zeros_like(initial) if resets[t] else states[-1])
        states.append(decay * befores[t] + np.outer(k[t], v[t]))
    out = np.array([q[t] @ states[t + 1] for t in range(len(q))]).reshape(v.shape)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    dlog_decay, dstate = 0.0, dfinal
    for t in reversed(range(len(q))):
        dstate = dstate + np.outer(q[t], dout[t])
        dq[t], dk[t], dv[t] = states[t + 1] @ dout[t], dstate @ v[t], k[t] @ dstate
        dlog_decay += decay * np.sum(befores[t] * dstate)
        dstate = np.zeros_like(dstate) if resets[t] else decay * dstate
    return Results(out, states[-1], dq, dk, dv, dlog_decay, dstate)
