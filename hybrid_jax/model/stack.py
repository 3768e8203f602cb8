"""The layers in order, scanned twice: over the repeats of the pattern, and over each run in it.

An 80-layer program so compiles one body for each run of the pattern: two for Text-01. Parameters
are always stacked; whether the forward pass loops over them is `ModelConfig.scan_layers`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax.config.model import ModelConfig
from hybrid_jax.model import lowrank, quantized, remat
from hybrid_jax.model.context import Context
from hybrid_jax.model.layer import LayerModule
from hybrid_jax.model.mixers.table import MIXERS
from hybrid_jax.model.parallel.placement import ROWS
from hybrid_jax.model.params import Initialiser


class Stack(nnx.Module):
    """Owns the layers, one module a run with parameters stacked [repeats, count, ...]."""

    def __init__(self, init: Initialiser, config: ModelConfig):
        self.config = config
        self.runs = nnx.List(
            [
                LayerModule(
                    init.stack(config.repeats, run.count),
                    run.layer,
                    config.hidden_dim,
                    config.norm_eps,
                )
                for run in config.pattern
            ]
        )

    def __call__(self, x_BTD, context: Context):
        """(x after the last layer, statistics of the routers stacked over layers or None)."""
        bodies = [self._training_body(run, context) for run in self.runs]
        params = [nnx.split(run)[1] for run in self.runs]

        scan = functools.partial(_scan, unroll=not self.config.scan_layers)

        def pattern(x_BTD, inputs):
            routings = []
            for body, xs in zip(bodies, inputs, strict=True):
                x_BTD, routing = scan(body, x_BTD, xs)
                routings.append(routing)
            return x_BTD, tuple(routings)

        inputs = tuple(zip(params, self._layer_data(), strict=True))
        x_BTD, routings = scan(pattern, x_BTD, inputs)
        return x_BTD, _in_layer_order(routings)

    def decode(self, x_BTD, context: Context, entries):
        """(x after the last layer, the new entries of the decode state, routing or None)."""
        lead = [(self.config.repeats, run.count) for run in self.config.pattern]
        indices = tuple(jnp.arange(n * c, dtype=jnp.int32).reshape(n, c) for n, c in lead)
        # Decoding reads weights far more often than once: corrections are added before. Quantised
        # weights stay so: widened here they would take the memory that they are to save.
        whole = tuple(_flatten_lead(lowrank.merge(nnx.split(run)[1])) for run in self.runs)
        memory = tuple(_flatten_lead(entry) for entry in entries)

        def pattern(carry, inputs):
            x_BTD, memory = carry
            routings = []
            for r, (run, params) in enumerate(zip(self.runs, whole, strict=True)):
                body = _decode_body(run, params, context)
                (x_BTD, updated), routing = _scan(body, (x_BTD, memory[r]), inputs[r])
                memory = memory[:r] + (updated,) + memory[r + 1 :]
                routings.append(routing)
            return (x_BTD, memory), tuple(routings)

        inputs = tuple(zip(indices, self._layer_data(), strict=True))
        (x_BTD, memory), routings = _scan(pattern, (x_BTD, memory), inputs)
        entries = tuple(
            jax.tree.map(lambda leaf, n=n, c=c: leaf.reshape(n, c, *leaf.shape[1:]), entry)
            for (n, c), entry in zip(lead, memory, strict=True)
        )
        return x_BTD, entries, _in_layer_order(routings)

    def each_layer(self, x_BTD, context: Context):
        """x after every layer, as a list: unrolled, for comparison with other implementations."""
        out = []
        data = self._layer_data()
        for n in range(self.config.repeats):
            for run, run_data in zip(self.runs, data, strict=True):
                graphdef, params = nnx.split(run)
                for c in range(jax.tree.leaves(params)[0].shape[1]):
                    at = jax.tree.map(lambda leaf: leaf[n, c], (params, run_data))  # noqa: B023
                    layer = nnx.merge(graphdef, self._with_plain_experts(at[0]))
                    x_BTD, _, _ = layer(x_BTD, context, at[1], None)
                    out.append(x_BTD)
        return out

    def _training_body(self, run: LayerModule, context: Context):
        graphdef, _ = nnx.split(run)

        def body(x_BTD, inputs):
            params, layer_data = inputs
            if context.placement is not None:
                params = context.placement.gather(params)
                x_BTD = context.placement.constrain(x_BTD, *ROWS, None)
            layer = nnx.merge(graphdef, self._with_plain_experts(params))
            x_BTD, _, routing = layer(x_BTD, context, layer_data, None)
            return x_BTD, routing

        if self.config.remat == "none":
            return body
        return jax.checkpoint(body, policy=remat.KEEP[self.config.remat], prevent_cse=False)

    def _with_plain_experts(self, params):
        """One layer's parameters with arrays for experts, as grouped products take them."""
        dtype = self.config.dtypes.compute
        return quantized.widen_experts(lowrank.merge_experts(params), dtype)

    def _layer_data(self):
        """For each run what differs from layer to layer, [repeats, count, ...] or None."""
        counts = [run.count for run in self.config.pattern]
        num_layers = self.config.num_layers
        data = []
        for r, run in enumerate(self.config.pattern):
            first = sum(counts[:r])
            rows = [
                [
                    MIXERS[type(run.layer.mixer)].layer_data(
                        run.layer.mixer, n * sum(counts) + first + c, num_layers
                    )
                    for c in range(run.count)
                ]
                for n in range(self.config.repeats)
            ]
            data.append(None if rows[0][0] is None else jnp.asarray(np.array(rows)))
        return tuple(data)


def _decode_body(run: LayerModule, params, context: Context):
    """One layer of a run whose parameters and state stay stacked in place.

    Nothing is scanned over but an index: the state is written where it lies, and experts, by far
    the most of the parameters, are read only where a token goes. (A scan over them copies all.)
    """
    graphdef, _ = nnx.split(run)
    whole_stack = getattr(type(run.ffn), "whole_stack", ())

    def pick(path, leaf, idx):
        if path[0].key == "ffn" and path[1].key in whole_stack:
            # [layers, experts, ...] as it lies; the context says which layer this is.
            return leaf
        return jax.lax.dynamic_index_in_dim(leaf, idx, keepdims=False)

    def body(carry, inputs):
        x_BTD, memory = carry
        idx, layer_data = inputs
        if context.placement is not None:
            x_BTD = context.placement.constrain(x_BTD, *ROWS, None)
        own = jax.tree_util.tree_map_with_path(lambda path, leaf: pick(path, leaf, idx), params)
        here = dataclasses.replace(context, layer_idx=idx)
        layer = nnx.merge(graphdef, own)
        if layer.mixer.whole_state:
            x_BTD, memory, routing = layer(x_BTD, here, layer_data, memory)
            return (x_BTD, memory), routing
        state = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, idx, keepdims=False), memory
        )
        x_BTD, state, routing = layer(x_BTD, here, layer_data, state)
        memory = jax.tree.map(
            lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, idx, 0), memory, state
        )
        return (x_BTD, memory), routing

    return body


def _scan(body, carry, xs, unroll=False):
    """jax.lax.scan, without a loop where there is but one step."""
    length = jax.tree.leaves(xs)[0].shape[0]
    if length > 1:
        return jax.lax.scan(body, carry, xs, unroll=unroll)
    carry, out = body(carry, jax.tree.map(lambda leaf: leaf[0], xs))
    return carry, jax.tree.map(lambda leaf: leaf[None], out)


def _flatten_lead(tree):
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def _in_layer_order(routings):
    """Statistics of each run [repeats, count, ...] as one [layers, ...], dense layers left out."""
    routings = [routing for routing in routings if routing is not None]
    if not routings:
        return None

    def join(*leaves):
        joined = jnp.concatenate(leaves, axis=1)
        return joined.reshape(-1, *joined.shape[2:])

    return jax.tree.map(join, *routings)
