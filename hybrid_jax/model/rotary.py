"""Rotary positions on the leading dims of a head, in half-split pairs (i, i + rotary_dim / 2)."""

import jax.numpy as jnp


def rotate(x_BTHK, positions_BT, rotary_dim: int, theta: float):
    """Rotate the first `rotary_dim` dims of every head by its token's position; others pass.

    The angle of pair i is position * theta ** (-2 i / rotary_dim) (RoFormer, eq. 15; released
    layout of MiniMax-Text-01). Tables and rotation are float32, the result has the dtype of x.
    """
    if not rotary_dim:
        return x_BTHK
    half = rotary_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1R = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle_BT1R), jnp.sin(angle_BT1R)
    first = x_BTHK[..., :half].astype(jnp.float32)
    second = x_BTHK[..., half:rotary_dim].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    if rotary_dim == x_BTHK.shape[-1]:
        return rotated.astype(x_BTHK.dtype)
    return jnp.concatenate([rotated.astype(x_BTHK.dtype), x_BTHK[..., rotary_dim:]], axis=-1)
