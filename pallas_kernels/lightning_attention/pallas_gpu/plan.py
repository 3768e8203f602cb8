"""How a Hopper block of threads shares out a head: its warpgroups and its shared memory."""

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.lightning_attention.pallas_gpu.versions import swizzled_tiles

# Rows of a warpgroup's matrix product, and the columns in which a swizzled tile is cut.
TILE = 64
STAGES = 2  # chunks in shared memory: one being computed, one on its way


def chunk_size(key_dim: int) -> int:
    """Tokens a chunk."""
    return key_dim


@dataclasses.dataclass(frozen=True)
class Plan:
    length: int
    key_dim: int
    reverse: bool
    has_segments: bool
    rounds_weights: bool
    """Whether a decayed score is rounded once, or what that leaves out is multiplied too."""
    is_interpreted: bool

    def __post_init__(self):
        # What is left out lies in one place: of scores a group reads its own rows, of what is
        # written all.
        assert self.rounds_weights or self.rounds_written

    @property
    def rounds_written(self) -> bool:
        """The same for decayed values. What they sum up to, forward, has few signs to cancel; the
        sum that dk and dv are made of has as much rounding in it as they have themselves."""
        return not self.reverse

    @property
    def groups(self) -> int:
        """Warpgroups that compute; each holds 64 of the state's rows and 64 of a chunk's."""
        return self.key_dim // TILE

    @property
    def chunk(self) -> int:
        return chunk_size(self.key_dim)

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)


class Shared(NamedTuple):
    """What lies in shared memory."""

    q: Any
    k: Any
    v: Any
    tokens: Any  # of `Segments`, or None
    powers: Any  # of `Powers`, or None
    diagonal: Any
    tables_loaded: Any
    written: Any  # values decayed to the end of the chunk
    state: Any  # the state before the chunk, rounded
    out: Any  # outputs on their way; before that, what rounding left out of another factor
    loaded: Any  # barriers, one a stage
    consumed: Any
    written_ready: Any
    published_read: Any


def scratch(plan: Plan) -> Shared:
    swizzled = swizzled_tiles(64)

    def tiles(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=swizzled)

    chunk, groups = plan.chunk, plan.groups
    if plan.has_segments:
        tokens = plgpu.SMEM((STAGES, 2, chunk), jnp.float32)
        powers = diagonal = tables_loaded = None
    else:
        swizzled_floats = swizzled_tiles(32)
        tokens, powers = None, plgpu.SMEM((3 * chunk,), jnp.float32)
        diagonal = plgpu.SMEM((TILE, TILE), jnp.float32, transforms=swizzled_floats)
        tables_loaded = plgpu.Barrier(num_arrivals=4)
    return Shared(
        q=tiles(STAGES, chunk, plan.key_dim),
        k=tiles(STAGES, chunk, plan.key_dim),
        v=tiles(STAGES, chunk, TILE),
        tokens=tokens,
        powers=powers,
        diagonal=diagonal,
        tables_loaded=tables_loaded,
        written=tiles(chunk, TILE),
        state=tiles(plan.key_dim, TILE),
        out=tiles(chunk, TILE),
        loaded=plgpu.Barrier(num_arrivals=4 if plan.has_segments else 3, num_barriers=STAGES),
        consumed=plgpu.Barrier(num_arrivals=groups, num_barriers=STAGES),
        written_ready=plgpu.Barrier(num_arrivals=groups),
        published_read=plgpu.Barrier(num_arrivals=groups),
    )
