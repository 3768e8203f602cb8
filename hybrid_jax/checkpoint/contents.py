"""What a model becomes in a checkpoint directory: its tensors, and what each of them is made of."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from hybrid_jax import model as models
from hybrid_jax.checkpoint import decay_tables, hf_config, leaves, pieces
from hybrid_jax.checkpoint import plan as plans
from hybrid_jax.checkpoint.boxes import Box
from hybrid_jax.checkpoint.formats.orbax import OrbaxLayout
from hybrid_jax.checkpoint.formats.protocol import TAGS, TensorInfo
from hybrid_jax.checkpoint.formats.safetensors_writer import SafetensorsLayout
from hybrid_jax.checkpoint.hf_config.native import BLOCK_SIZE
from hybrid_jax.checkpoint.names import minimax, tree
from hybrid_jax.checkpoint.names.rules import Rule
from hybrid_jax.checkpoint.sidecars import CONFIG_JSON, CONFIG_YAML
from hybrid_jax.config import text
from hybrid_jax.model.quantized import is_quantized

# What is computed is there for everybody; the first one writes it.
_OF_FIRST = (pieces.Piece(0, None),)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What is to be written."""

    config: tuple[str, str]
    """Name and text of the file that says what model it is."""
    layout: SafetensorsLayout | OrbaxLayout
    rules: Mapping[str, Rule]
    """By tensor, what it is made of; those that no rule names are computed."""
    outputs: Mapping[str, plans.Output]
    """By tensor, what becomes of that."""
    arrays: Mapping[str, jax.Array]
    """Leaves of the model."""
    tables: Mapping[str, Callable[[], np.ndarray]]
    """What is computed, by tensor."""

    def whole(self, name: str) -> np.ndarray:
        """A tensor of which this process holds all."""
        if name in self.tables:
            return self.tables[name]()
        rule = self.rules[name]
        return self.outputs[name].make(pieces.whole(rule, self.arrays[rule.leaf]), None)

    def boxes(self, name: str, mine: Sequence[pieces.Piece]) -> Iterator[tuple[Box, np.ndarray]]:
        """Pieces of a tensor that this process holds."""
        for piece in mine:
            if piece.parts is None:
                array = self.whole(name)
                yield Box.whole(array.shape), array
            else:
                rule, output = self.rules[name], self.outputs[name]
                for part in piece.parts:
                    for box, array in pieces.parts(rule, self.arrays[rule.leaf], part):
                        yield box, output.make(array, None)

    def deal(self) -> dict[str, Sequence[pieces.Piece]]:
        """Who writes what of each tensor; all processes find the same.

        ValueError if blocks would have to be made of a tensor that no process holds all of.
        """
        rules = {rule.name: rule for rule in self.rules.values()}
        dealt = pieces.deal(list(rules.values()), self.arrays)
        found: dict[str, Sequence[pieces.Piece]] = dict.fromkeys(self.tables, _OF_FIRST)
        for name, rule in self.rules.items():
            found[name] = dealt[rule.name]
            if self.outputs[name].quantized and any(piece.parts for piece in found[name]):
                raise ValueError(
                    f"No process holds all of {rule.name!r}, and FP8 blocks are made of whole "
                    "tensors. Save in bfloat16, then `hybrid-jax convert --dtype fp8`; or place "
                    "the model so that no matrix is split over processes."
                )
        return found


def of(model: models.Model, format: str, dtype: str | None, shard_bytes: int) -> Contents:
    """A model in a format and dtype of `convert`; ValueError if they cannot hold it."""
    config, arrays = model.config, leaves.arrays(model)
    if is_quantized(arrays):
        raise ValueError(
            "This model's weights were quantised when it was loaded, and what was rounded away is "
            "lost: copy or convert the checkpoint it came from instead."
        )
    if dtype not in (None, *plans.DTYPES_TO):
        raise ValueError(f"dtype must be one of {', '.join(plans.DTYPES_TO)}; got {dtype!r}.")
    stored = dtype or config.dtypes.parameters
    tables: dict = {}
    if format == "orbax":
        if dtype == plans.FP8:
            raise ValueError(plans.NO_SCALES)
        dtypes = dataclasses.replace(config.dtypes, parameters=stored)
        named = CONFIG_YAML, text.to_yaml(dataclasses.replace(config, dtypes=dtypes))
        rules = tree.rules(config, {name: array.shape for name, array in arrays.items()})
    else:
        plain = "bfloat16" if stored == plans.FP8 else stored
        values = hf_config.write(config, format, plain)
        if stored == plans.FP8:
            values = hf_config.with_fp8(values)
        named = CONFIG_JSON, hf_config.dump(values)
        rules = minimax.rules(config, prefix=hf_config.prefix(format))
        tables = decay_tables.infos(config, BLOCK_SIZE) if format == "hf" else {}
    made = [
        (rule, output)
        for rule in rules
        for output in plans.cast(
            TensorInfo(rule.name, TAGS[np.dtype(arrays[rule.leaf].dtype)], rule.shape), dtype
        )
    ]
    infos = [output.info for _, output in made] + [info for info, _ in tables.values()]
    layout = (
        OrbaxLayout(infos, vocabulary="tree")
        if format == "orbax"
        else SafetensorsLayout(infos, shard_bytes=shard_bytes)
    )
    computed = {
        name: functools.partial(decay_tables.table, name, config, layer_idx, info.shape)
        for name, (info, layer_idx) in tables.items()
    }
    by_name = {output.info.name: (rule, output) for rule, output in made}
    return Contents(
        named,
        layout,
        {name: rule for name, (rule, _) in by_name.items()},
        {name: output for name, (_, output) in by_name.items()},
        arrays,
        computed,
    )
