"""The model: tokens to embeddings, through the layers, a norm, and the output head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax.config.model import ModelConfig
from hybrid_jax.model import params
from hybrid_jax.model import state as states
from hybrid_jax.model.context import Context, segment_positions
from hybrid_jax.model.embedding import Embedding, Head, shift_half
from hybrid_jax.model.ffn.router import Routing
from hybrid_jax.model.norm import RmsNorm
from hybrid_jax.model.parallel import placed
from hybrid_jax.model.stack import Stack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hidden:
    """What the layers make of the tokens."""

    x_BTD: jax.Array
    """After the final norm, in the dtype of the computation."""
    state: states.DecodeState | None
    """The decode state after these tokens, if one was given."""
    routing: Routing | None
    """Statistics of every router, stacked over layers; None for a dense model."""


class Model(nnx.Module):
    """A language model of the family; owns every parameter as `nnx.Param`."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        init = params.Initialiser(
            *(key, config.dtypes.parameters, config.initializer_range),
            deep_gain=config.initialization.gain(config.num_layers),
        )
        self.config = config
        self.embedding = Embedding(init, config.vocab_size, config.hidden_dim)
        self.stack = Stack(init, config)
        self.norm = RmsNorm(init, config.hidden_dim, config.norm_eps)
        if not config.tie_embeddings:
            self.head = Head(init, config.vocab_size, config.hidden_dim)

    def __call__(self, tokens_BT, segment_ids=None, positions=None) -> jax.Array:
        """Logits float32 [B, T, vocab] for int tokens [B, T].

        `segment_ids` int32 [B, T]: tokens see only earlier tokens of the same id; 0 is padding,
        where logits are finite and unspecified. `positions` count from 0 in each segment, unless
        given. Compiled once for each shape. Raises ValueError for ids outside the vocabulary, in
        padding too, unless they are traced.
        """
        inputs = _checked(tokens_BT, segment_ids, positions, self.config.vocab_size)
        return _logits(*nnx.split(self), *inputs)

    def hidden(
        self, tokens_BT, segment_ids=None, positions=None, state=None, placement=None
    ) -> Hidden:
        """The output of the final norm, continuing `state` if one is given.

        `placement` says how parameters, activations and the state are split over devices.

        With a state, every row is one sequence: `segment_ids` may only say which of its tokens are
        real (1) and which are right padding (0), and the caller makes sure that T more tokens fit
        the capacity of every row. With both, `placement` is taken as `Placement.for_decoding` says.
        """
        tokens_BT, context = self._context(tokens_BT, segment_ids, positions, state)
        if placement is not None and state is not None:
            placement = placement.for_decoding(tokens_BT.shape[0])
        context = dataclasses.replace(context, placement=placement)
        x_BTD = self._embed(tokens_BT, context, state)
        if state is None:
            x_BTD, routing = self.stack(x_BTD, context)
        else:
            x_BTD, entries, routing = self.stack.decode(x_BTD, context, state.entries)
            state = _advance(state, entries, tokens_BT, context.segment_ids_BT)
            state = states.constrain(self.config, state, placement)
        return Hidden(self.norm(x_BTD), state, routing)

    def logits(self, x_BTD) -> jax.Array:
        """The head, in float32 whatever the model computes in."""
        kernel_DW = self.head_kernel()
        if x_BTD.dtype != kernel_DW.dtype:
            x_BTD, kernel_DW = x_BTD.astype(jnp.float32), kernel_DW.astype(jnp.float32)
        # Products of two bfloat16 numbers are exact in float32: no need for a copy of the matrix.
        return jnp.einsum("...d,dw->...w", x_BTD, kernel_DW, preferred_element_type=jnp.float32)

    def head_kernel(self) -> jax.Array:
        """The output matrix [D, W] as it is stored; the embedding table's transpose if tied."""
        if self.config.tie_embeddings:
            return self.embedding.table[...].T
        return self.head.kernel[...]

    def trace(self, tokens_BT, segment_ids=None, positions=None) -> list[jax.Array]:
        """x [B, T, D] after every layer, unrolled, for comparison with other implementations."""
        tokens_BT, context = self._context(tokens_BT, segment_ids, positions, None)
        return self.stack.each_layer(self._embed(tokens_BT, context, None), context)

    def initial_state(self, batch: int, capacity: int, placement=None) -> states.DecodeState:
        """An empty decode state for `batch` rows of at most `capacity` tokens."""
        return states.initial_state(self.config, batch, capacity, placement)

    def _context(self, tokens_BT, segment_ids, positions, state):
        tokens_BT, segment_ids, positions = _checked(
            tokens_BT, segment_ids, positions, self.config.vocab_size
        )
        B, T = tokens_BT.shape
        if positions is None and segment_ids is not None and state is None:
            positions = segment_positions(segment_ids)
        elif positions is None:
            positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, :], (B, T))
            if state is not None:
                positions = positions + state.lengths_B[:, None]
        lengths_B = None if state is None else state.lengths_B
        return tokens_BT, Context(positions, segment_ids, lengths_B)

    def _embed(self, tokens_BT, context: Context, state):
        dtype = jnp.dtype(self.config.dtypes.compute)

        def embed(tokens_BT):
            if context.placement is None:
                return self.embedding(tokens_BT, dtype)
            table_WD = self.embedding.table[...]
            return placed.look_up(context.placement, table_WD, tokens_BT, dtype)

        x_BTD = embed(tokens_BT)
        if not self.config.shift_embeddings:
            return x_BTD
        before_BD = jnp.zeros_like(x_BTD[:, 0])
        if state is not None:
            known_B1 = (state.last_token_B >= 0)[:, None]
            last_B1 = jnp.maximum(state.last_token_B, 0)[:, None]
            before_BD = jnp.where(known_B1, embed(last_B1)[:, 0], before_BD)
        return shift_half(x_BTD, context.segment_ids_BT, before_BD)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, tokens_BT, segment_ids_BT, positions_BT) -> jax.Array:
    """The whole forward pass as one program: op by op, a first call takes half a minute."""
    model = nnx.merge(graphdef, params)
    return model.logits(model.hidden(tokens_BT, segment_ids_BT, positions_BT).x_BTD)


def build(config: ModelConfig, seed: int = 0) -> Model:
    """A model with random parameters."""
    graphdef, _ = nnx.split(abstract(config))
    # One compiled program instead of one for every shape.
    draw = jax.jit(lambda key: nnx.split(Model(config, key))[1])
    return nnx.merge(graphdef, draw(jax.random.key(seed)))


def abstract(config: ModelConfig) -> Model:
    """A model whose parameters are shapes and dtypes only; allocates nothing at any size."""
    return nnx.eval_shape(lambda: Model(config, jax.random.key(0)))


def _advance(old: states.DecodeState, entries, tokens_BT, segment_ids_BT) -> states.DecodeState:
    B, T = tokens_BT.shape
    if segment_ids_BT is None:
        count_B = jnp.full((B,), T, jnp.int32)
    else:
        count_B = jnp.sum((segment_ids_BT != 0).astype(jnp.int32), axis=1)
    last_B1 = jnp.take_along_axis(tokens_BT, jnp.maximum(count_B - 1, 0)[:, None], axis=1)
    last_B = jnp.where(count_B > 0, last_B1[:, 0].astype(jnp.int32), old.last_token_B)
    return states.DecodeState(entries, old.lengths_B + count_B, last_B)


def _checked(tokens_BT, segment_ids, positions, vocab_size: int):
    """The three as int32 arrays of one shape [B, T] (the last two may be None), or ValueError."""
    given_BT = tokens_BT
    tokens_BT = jnp.asarray(tokens_BT)
    if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise ValueError(
            "tokens_BT must be an integer array of shape [batch, time]; got "
            f"{tokens_BT.dtype} {tokens_BT.shape}."
        )
    if 0 in tokens_BT.shape:
        raise ValueError(
            f"tokens_BT must hold at least one row and one token; got shape {tokens_BT.shape}."
        )
    # As given, for JAX cuts 64 bits to 32: 2**32 + 1 would pass as 1.
    _check_ids(given_BT if isinstance(given_BT, np.ndarray) else tokens_BT, vocab_size)
    checked = [tokens_BT.astype(jnp.int32)]
    for name, value in (("segment_ids", segment_ids), ("positions", positions)):
        value = None if value is None else jnp.asarray(value)
        if value is not None:
            if value.shape != tokens_BT.shape or not jnp.issubdtype(value.dtype, jnp.integer):
                raise ValueError(
                    f"{name} must be an integer array of shape {tokens_BT.shape} like tokens_BT; "
                    f"got {value.dtype} {value.shape}."
                )
            value = value.astype(jnp.int32)
        checked.append(value)
    return tuple(checked)


def _check_ids(ids_BT, vocab_size: int) -> None:
    """ValueError for an id outside the vocabulary, which would silently be some other token."""
    if isinstance(ids_BT, jax.core.Tracer) or not getattr(ids_BT, "is_fully_addressable", True):
        return
    ids_BT = np.asarray(ids_BT)
    lowest, highest = int(ids_BT.min()), int(ids_BT.max())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"Token ids must be below vocab_size={vocab_size} and not negative; got "
            f"{lowest if lowest < 0 else highest}. Use the tokenizer the model was made for."
        )
