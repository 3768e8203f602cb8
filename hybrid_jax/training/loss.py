"""Cross-entropy over a large vocabulary without ever storing all logits."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hybrid_jax.model.parallel import weights, words
from hybrid_jax.model.parallel.placement import ROWS, Placement
from pallas_kernels import varying
from sharding import Logical


class TokenLoss(NamedTuple):
    """The sum to minimise and what each token has of it, float32."""

    total: jax.Array
    """Sum over tokens of weighted nll plus z-loss; the only one with a gradient."""
    nll_BT: jax.Array
    """Negative log-likelihood of each target in nats, whatever its weight."""


# (log-probability of each target, weights, *more of each token) -> weights. Hashable: it is part of
# the program.
Reweigh = Callable[..., jax.Array]


def cross_entropy(
    x_BTD,
    kernel_DW,
    targets_BT,
    weights_BT,
    *more_BT,
    reweigh: Reweigh | None = None,
    z_loss: float = 0.0,
    chunk_tokens: int = 1024,
    placement: Placement | None = None,
) -> TokenLoss:
    """The sum of weights * (nll + z_loss * log_normaliser**2), and each nll, in float32.

    x_BTD [B, T, D] is the output of the final norm, kernel_DW [D, W] the output head, targets int32
    [B, T], weights float32 [B, T]; a token of weight 0 counts for nothing, whatever its target.
    With `reweigh`, the nll of a token counts by what that makes of its log-probability, its weight
    and its numbers in `more_BT`; no gradient goes through that.

    At most about `chunk_tokens` rows of logits exist at one time, and none is computed twice: the
    forward pass leaves the gradients of x and of the head behind (they are linear in the cotangent
    of the sum), so the cost is that of three matrix products, as without chunks.

    With a `placement`, tokens are split as it says and words as they rest, and no logits are
    brought together: the largest, the sums and the target's are. Devices that split words and
    tokens too bring each chunk's tokens together, and then have a chunk for each of them, of so
    many times fewer words. The sum is over all devices; each nll stays with its token.
    """
    arrays = x_BTD, kernel_DW, targets_BT, weights_BT, *more_BT
    if placement is None:
        return TokenLoss(*_cross_entropy(chunk_tokens, z_loss, reweigh, words.WHOLE, *arrays))
    kernel = weights.of(placement, kernel_DW.shape, Logical.MODEL, Logical.VOCAB)
    shared, split = placement.token_axes, words.of(kernel, 1)
    tokens = placement.spec(*ROWS)

    def local(x_BTD, kernel_DW, *tokens_BT):
        kernel_DW = kernel.whole(kernel_DW)
        total, nll_BT = _cross_entropy(
            chunk_tokens, z_loss, reweigh, split, x_BTD, kernel_DW, *tokens_BT
        )
        return jax.lax.psum(total, shared) if shared else total, nll_BT

    found = jax.shard_map(
        local,
        mesh=placement.mesh,
        in_specs=(placement.spec(*ROWS, None), kernel.spec, *[tokens] * (2 + len(more_BT))),
        out_specs=(PartitionSpec(), tokens),
    )(*arrays)
    return TokenLoss(*found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _cross_entropy(chunk_tokens, z_loss, reweigh, split, x_BTD, kernel_DW, *tokens_BT):
    """`split`, a `words.Words`, says how the vocabulary lies on devices, in shard_map."""
    kernel_f32 = kernel_DW.astype(jnp.float32)

    def one_chunk(total_sum, chunk):
        total, nll_BC, _, _ = _chunk_loss(z_loss, reweigh, split, kernel_f32, *chunk)
        return total_sum + total, nll_BC

    chunks = _split(chunk_tokens, x_BTD, *tokens_BT)
    zero, _ = varying.alike(jnp.float32(0), x_BTD)
    total, nll_NBC = _scan(one_chunk, zero, chunks)
    return total, _join(nll_NBC, x_BTD.shape[1])


def _cross_entropy_fwd(chunk_tokens, z_loss, reweigh, split, x_BTD, kernel_DW, *tokens_BT):
    kernel_f32 = kernel_DW.astype(jnp.float32)

    def one_chunk(carry, chunk):
        total_sum, dkernel_DW = carry
        x_BCD = chunk[0]
        total, nll_BC, dlogits_BCW, x_f32 = _chunk_loss(z_loss, reweigh, split, kernel_f32, *chunk)
        dx_BCD = split.add_and_return(jnp.einsum("bcw,dw->bcd", dlogits_BCW, kernel_f32))
        dkernel_DW = dkernel_DW + jnp.einsum("bcd,bcw->dw", x_f32, dlogits_BCW)
        return (total_sum + total, dkernel_DW), (nll_BC, dx_BCD.astype(x_BCD.dtype))

    chunks = _split(chunk_tokens, x_BTD, *tokens_BT)
    zero, _ = varying.alike(jnp.float32(0), x_BTD)
    start = (zero, jnp.zeros_like(kernel_f32))
    (total, dkernel_DW), of_tokens = _scan(one_chunk, start, chunks)
    nll_BT, dx_BTD = (_join(each, x_BTD.shape[1]) for each in of_tokens)
    residuals = dx_BTD, dkernel_DW.astype(kernel_DW.dtype), (None,) * len(tokens_BT)
    return (total, nll_BT), residuals


def _cross_entropy_bwd(chunk_tokens, z_loss, reweigh, split, residuals, cotangents):
    dx_BTD, dkernel_DW, of_tokens = residuals
    dtotal, _ = cotangents
    dx_BTD = dx_BTD * dtotal.astype(dx_BTD.dtype)
    dkernel_DW = dkernel_DW * dtotal.astype(dkernel_DW.dtype)
    return dx_BTD, dkernel_DW, *of_tokens


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _chunk_loss(z_loss, reweigh, split, kernel_DW, x_BCD, targets_BC, weights_BC, *more_BC):
    """(sum of loss, each nll, gradient of the first with respect to the logits, x in float32).

    The first two are of the tokens given; the others of all that meet this device's words.
    """
    x_BCD, targets_BC, weights_BC = map(split.bring, (x_BCD, targets_BC, weights_BC))
    x_BCD = x_BCD.astype(jnp.float32)
    logits_BCW = jnp.einsum("bcd,dw->bcw", x_BCD, kernel_DW)
    max_BC1 = split.max(jnp.max(logits_BCW, axis=-1, keepdims=True))
    exp_BCW = jnp.exp(logits_BCW - max_BC1)
    sum_BC1 = split.sum(jnp.sum(exp_BCW, axis=-1, keepdims=True))
    normaliser_BC = (max_BC1 + jnp.log(sum_BC1))[..., 0]
    W = logits_BCW.shape[-1]
    # Where the target lies among this device's words; it may be another's.
    here_BC1 = split.here(targets_BC, W)[..., None]
    is_here_BC1 = (here_BC1 >= 0) & (here_BC1 < W)
    picked_BC1 = jnp.take_along_axis(logits_BCW, jnp.clip(here_BC1, 0, W - 1), axis=-1)
    picked_BC = split.sum(jnp.where(is_here_BC1, picked_BC1, 0.0))[..., 0]
    nll_BC = normaliser_BC - picked_BC
    by_BC = (
        weights_BC if reweigh is None else reweigh(-nll_BC, weights_BC, *map(split.bring, more_BC))
    )
    total_BC = by_BC * nll_BC + z_loss * weights_BC * normaliser_BC**2
    total = jnp.sum(split.own(total_BC))
    scale_BC = by_BC + 2 * z_loss * weights_BC * normaliser_BC
    is_target_BCW = here_BC1 == jax.lax.broadcasted_iota(jnp.int32, logits_BCW.shape, 2)
    dlogits_BCW = exp_BCW * (scale_BC[..., None] / sum_BC1) - jnp.where(
        is_target_BCW, by_BC[..., None], 0.0
    )
    return total, split.own(nll_BC), dlogits_BCW, x_BCD


def _split(chunk_tokens, x_BTD, *tokens_BT):
    """Each array as [N, B, C, ...]: chunks of time, so that a sharded batch stays as it lies."""
    B, T, _ = x_BTD.shape
    C = min(T, max(1, chunk_tokens // B))
    pad = -T % C

    def split(array):
        array = jnp.pad(array, ((0, 0), (0, pad)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(array.reshape(B, -1, C, *array.shape[2:]), 1, 0)

    return tuple(split(array) for array in (x_BTD, *tokens_BT))


def _join(chunks, T):
    """What `_split` made of [B, T, ...]: chunks [N, B, C, ...] as they were."""
    chunks = jnp.moveaxis(chunks, 0, 1)
    B, N, C, *rest = chunks.shape
    return chunks.reshape(B, N * C, *rest)[:, :T]


def _scan(body, carry, chunks):
    """jax.lax.scan, without a loop where there is but one chunk."""
    if chunks[0].shape[0] > 1:
        return jax.lax.scan(body, carry, chunks)
    carry, out = body(carry, tuple(chunk[0] for chunk in chunks))
    return carry, jax.tree.map(lambda array: array[None], out)
