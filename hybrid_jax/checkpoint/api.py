"""A checkpoint directory as a model, and a model as a checkpoint directory."""

import dataclasses
import functools
import pathlib

import numpy as np

from hybrid_jax import model as models
from hybrid_jax.checkpoint import atomic, decay_tables, digests, hf_config, leaves, manifest
from hybrid_jax.checkpoint import sidecars as sidecars_lib
from hybrid_jax.checkpoint.conversion import dump_json
from hybrid_jax.checkpoint.convert import check_format
from hybrid_jax.checkpoint.formats.orbax import OrbaxLayout
from hybrid_jax.checkpoint.formats.protocol import TAGS, Layout, TensorInfo
from hybrid_jax.checkpoint.formats.safetensors_writer import SafetensorsLayout
from hybrid_jax.checkpoint.hf_config.native import BLOCK_SIZE
from hybrid_jax.checkpoint.names import minimax, tree
from hybrid_jax.checkpoint.opened import open_checkpoint
from hybrid_jax.checkpoint.sidecars import CONFIG_JSON, CONFIG_YAML
from hybrid_jax.config import model as model_lib
from hybrid_jax.config import text


def load(path, dtype: str = "float32", *, check_finite: bool = True) -> models.Model:
    """The model in a directory of any supported format, with `dtype` parameters and computation.

    Args:
        path: Hugging Face directory (released names, transformers' `minimax`, M2; FP8 is
            multiplied with its scales), Orbax as `save` and `convert` write it, or a training run,
            whose newest good checkpoint is taken.
        dtype: `float32` or `bfloat16`; routers and their biases are float32 always.
        check_finite: Refuse NaN and infinite weights.

    Raises:
        ValueError: naming the file, field or tensor that is wrong.
    """
    dtypes = model_lib.Dtypes(parameters=dtype, compute=dtype)
    with open_checkpoint(path) as checkpoint:
        config = dataclasses.replace(checkpoint.config, dtypes=dtypes)

        def read(leaf: str, shape, leaf_dtype: np.dtype) -> np.ndarray:
            return checkpoint.read_leaf(leaf, shape, leaf_dtype, check_finite)

        return leaves.fill(config, read)


def save(
    model: models.Model,
    path,
    format: str = "hf-original",
    *,
    sidecars=None,
    overwrite: bool = False,
) -> None:
    """Write a model to a new directory that appears whole at the end, or not at all.

    Args:
        model: Any model; `hf` and `hf-original` take those that the published family can express.
        path: The directory; an existing one that is not empty is a ValueError unless `overwrite`.
        format: `hf-original` (released names and config.json), `hf` (as transformers writes it,
            with decay tables), or `orbax` (names of our own and config.yaml; takes every model).
        sidecars: A directory whose tokenizer, generation config and chat template travel along.
        overwrite: Replace what is there, once the new directory is complete.

    Raises:
        ValueError: the format cannot hold this model; OSError: the directory cannot be written.
    """
    config, arrays = model.config, leaves.arrays(model)
    check_format(format)
    values: dict = {}
    if format == "orbax":
        rules = tree.rules(config, {name: array.shape for name, array in arrays.items()})
        tables = {}
    else:
        values = hf_config.write(config, format, config.dtypes.parameters)
        rules = minimax.rules(config)
        tables = decay_tables.infos(config, BLOCK_SIZE) if format == "hf" else {}
    infos = [
        TensorInfo(rule.name, TAGS[np.dtype(arrays[rule.leaf].dtype)], rule.shape) for rule in rules
    ]
    infos += [info for info, _ in tables.values()]
    makers = {rule.name: _block_of(rule, arrays) for rule in rules} | {
        name: functools.partial(decay_tables.table, name, config, layer_idx, info.shape)
        for name, (info, layer_idx) in tables.items()
    }
    with atomic.new_directory(path, overwrite=overwrite) as draft:
        if sidecars is not None:
            sidecars_lib.copy(sidecars_lib.find(sidecars), draft)
        layout: Layout
        if format == "orbax":
            text.write_yaml(config, draft / CONFIG_YAML)
            layout = OrbaxLayout(infos, vocabulary="tree")
        else:
            dump_json(draft / CONFIG_JSON, values)
            layout = SafetensorsLayout(infos)
        files: dict[str, tuple[int, str]] = {}
        described: dict[str, digests.Array] = {}
        for unit in layout.units:
            made = (makers[info.name]() for info in unit.infos)
            written = layout.write(draft, unit.number, made)
            files |= written.files
            described |= written.arrays
        layout.finish(draft, described)
        manifest.write(draft, described, files, name=pathlib.Path(path).name)


def _block_of(rule, arrays):
    # One block at a time from the device, never a whole stack.
    return lambda: rule.from_block(np.asarray(arrays[rule.leaf][rule.slices()]))
