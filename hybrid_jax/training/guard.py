"""Inside the compiled update: an update that is not sound leaves everything as it was."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Limits(NamedTuple):
    """What the loss and the gradient norm of a step may not exceed; float32 scalars."""

    loss: jax.typing.ArrayLike
    gradient_norm: jax.typing.ArrayLike


NO_LIMITS = Limits(np.float32(np.inf), np.float32(np.inf))


def is_sound(loss: jax.Array, gradient_norm: jax.Array, limits: Limits) -> jax.Array:
    """Whether both are numbers within the limits; a bool scalar.

    The norm of a gradient with a single NaN or infinity in it is none, so this sees every element.
    """
    within = (loss <= limits.loss) & (gradient_norm <= limits.gradient_norm)
    return within & jnp.isfinite(loss) & jnp.isfinite(gradient_norm)


def choose(sound: jax.Array, new, old):
    """The tree `new` if sound, else `old`, bit for bit."""
    return jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, old)
