"""A checkpoint directory as a model, and a model as a checkpoint directory."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np

from hybrid_jax import model as models
from hybrid_jax.checkpoint import decay_tables, hf_config, leaves, loading, saving
from hybrid_jax.checkpoint import sidecars as sidecars_lib
from hybrid_jax.checkpoint.conversion import dump_json
from hybrid_jax.checkpoint.convert import check_format
from hybrid_jax.checkpoint.formats import folders
from hybrid_jax.checkpoint.formats.orbax import OrbaxLayout
from hybrid_jax.checkpoint.formats.protocol import TAGS, RangedSource, TensorInfo
from hybrid_jax.checkpoint.formats.safetensors_writer import SHARD_BYTES, SafetensorsLayout
from hybrid_jax.checkpoint.hf_config.native import BLOCK_SIZE
from hybrid_jax.checkpoint.names import minimax, tree
from hybrid_jax.checkpoint.opened import open_checkpoint
from hybrid_jax.checkpoint.quantization import QuantizingReader
from hybrid_jax.checkpoint.sidecars import CONFIG_JSON, CONFIG_YAML
from hybrid_jax.config import model as model_lib
from hybrid_jax.config import text
from hybrid_jax.model.parallel.placement import Placement
from hybrid_jax.model.quantized import is_quantized
from sharding import processes


def load(
    path,
    dtype: str = "float32",
    *,
    quantize: str | None = None,
    placement: Placement | None = None,
    check_finite: bool = True,
) -> models.Model:
    """The model in a directory of any supported format, with `dtype` parameters and computation.

    Args:
        path: Hugging Face directory (released names, transformers' `minimax`, M2; FP8 is
            multiplied with its scales), Orbax as `save` and `convert` write it, or a training run,
            whose newest good checkpoint is taken. A Hugging Face directory may be in object
            storage: `s3://...`, `gs://...` or what else fsspec knows.
        dtype: `float32` or `bfloat16`; routers and their biases are float32 always.
        quantize: `int8` or `fp8`: hold the weights of layers in eight bits with scales, to generate
            and to evaluate (`hybrid_jax.model.quantized`). They are quantised as they are read, a
            tensor at a time; FP8 of a checkpoint is kept.
        placement: Devices that the parameters are split over, also of several processes, all of
            which must call; None for the first device. Each process reads what its devices hold:
            of safetensors those bytes, from Orbax the tensors they are in.
        check_finite: Refuse NaN and infinite weights.

    Raises:
        ValueError: naming the file, field or tensor that is wrong; or dims that do not divide.
            What one process refuses, all refuse.
    """
    found: list[models.Model] = []

    def read() -> None:
        found.append(_load(path, dtype, quantize, placement, check_finite))

    if placement is not None and placement.mesh.is_multi_process:
        processes.all_pass(read)
    else:
        read()
    return found.pop()


def _load(path, dtype: str, quantize: str | None, placement, check_finite: bool) -> models.Model:
    dtypes = model_lib.Dtypes(parameters=dtype, compute=dtype)
    with open_checkpoint(path) as checkpoint:
        config = dataclasses.replace(checkpoint.config, dtypes=dtypes)
        where = {} if placement is None else leaves.shardings(config, placement)

        def read(leaf: str, shape, leaf_dtype: np.dtype) -> jax.Array:
            return loading.load(
                checkpoint, leaf, shape, leaf_dtype, where.get(leaf), check_finite=check_finite
            )

        if quantize is None:
            model = leaves.fill(config, read)
        else:
            reader = QuantizingReader(checkpoint, quantize, placement, check_finite)
            model = leaves.fill(config, reader)
        if isinstance(checkpoint.source, RangedSource):
            checkpoint.source.check_unchanged()
        return model


def save(
    model: models.Model,
    path,
    format: str = "hf-original",
    *,
    sidecars=None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model to a new directory that appears whole at the end, or not at all.

    With it comes the manifest of what was written. All processes of a computation call this at
    once; each writes parts that its devices hold, about as many bytes as the others, and no leaf is
    replicated or brought together.

    Args:
        model: Any model, however it lies on devices; formats but `orbax` take those that the
            published family can express.
        path: The directory; an existing one that is not empty is a ValueError unless `overwrite`.
        format: `hf-original` (released names and config.json), `hf` (as transformers writes it,
            with decay tables), `hf-vl-01` (the language part of VL-01: released names behind
            `language_model.`), or `orbax` (names of our own and config.yaml; takes every model).
        sidecars: A directory whose tokenizer, generation config and chat template travel along.
        overwrite: Replace what is there, once the new directory is complete.
        shard_bytes: Largest safetensors file, unless one tensor is larger.

    Raises:
        ValueError: the format cannot hold this model; OSError: the directory cannot be written.
    """
    check_format(format)
    values, contents = _contents(model, format, shard_bytes)

    def prepare(directory: pathlib.Path) -> None:
        if sidecars is not None:
            sidecars_lib.copy(folders.at(sidecars), directory)
        if format == "orbax":
            text.write_yaml(model.config, directory / CONFIG_YAML)
        else:
            dump_json(directory / CONFIG_JSON, values)

    saving.save(contents, path, prepare, overwrite=overwrite)


def _contents(model: models.Model, format: str, shard_bytes: int) -> tuple[dict, saving.Contents]:
    """(config.json, tensors and where each comes from)."""
    config, arrays = model.config, leaves.arrays(model)
    if is_quantized(arrays):
        raise ValueError(
            "This model's weights were quantised when it was loaded, and what was rounded away is "
            "lost: copy or convert the checkpoint it came from instead."
        )
    values: dict = {}
    tables: dict = {}
    if format == "orbax":
        rules = tree.rules(config, {name: array.shape for name, array in arrays.items()})
    else:
        values = hf_config.write(config, format, config.dtypes.parameters)
        rules = minimax.rules(config, prefix=hf_config.prefix(format))
        tables = decay_tables.infos(config, BLOCK_SIZE) if format == "hf" else {}
    infos = [
        TensorInfo(rule.name, TAGS[np.dtype(arrays[rule.leaf].dtype)], rule.shape) for rule in rules
    ]
    infos += [info for info, _ in tables.values()]
    layout = (
        OrbaxLayout(infos, vocabulary="tree")
        if format == "orbax"
        else SafetensorsLayout(infos, shard_bytes=shard_bytes)
    )
    computed = {
        name: functools.partial(decay_tables.table, name, config, layer_idx, info.shape)
        for name, (info, layer_idx) in tables.items()
    }
    return values, saving.Contents(layout, {rule.name: rule for rule in rules}, arrays, computed)
