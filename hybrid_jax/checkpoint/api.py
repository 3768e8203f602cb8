"""A checkpoint directory as a model, and a model as a checkpoint directory."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from hybrid_jax import model as models
from hybrid_jax.checkpoint import contents as contents_lib
from hybrid_jax.checkpoint import leaves, loading, saving
from hybrid_jax.checkpoint.convert import check_format
from hybrid_jax.checkpoint.formats import folders
from hybrid_jax.checkpoint.formats.protocol import RangedSource
from hybrid_jax.checkpoint.formats.safetensors_writer import SHARD_BYTES
from hybrid_jax.checkpoint.opened import open_checkpoint
from hybrid_jax.checkpoint.quantization import QuantizingReader
from hybrid_jax.config import model as model_lib
from hybrid_jax.model.parallel.placement import Placement
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
    dtype: str | None = None,
    *,
    sidecars=None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    note: Callable[[str], None] = lambda said: None,
) -> None:
    """Write a model to a new directory that appears whole at the end, or not at all.

    With it comes the manifest of what was written. All processes of a computation call this at
    once; each writes parts that its devices hold, about as many bytes as the others, and no leaf is
    replicated or brought together.

    Killed or out of disk, the same call goes on from `.NAME.draft` beside `path`, by as many
    processes with the same devices. What is finished is kept if it has the values of this model,
    and is written again otherwise.

    Args:
        model: Any model, however it lies on devices; formats but `orbax` take those that the
            published family can express.
        path: The directory; an existing one that is not empty is a ValueError unless `overwrite`.
        format: `hf-original` (released names and config.json), `hf` (as transformers writes it,
            with decay tables), `hf-vl-01` (the language part of VL-01: released names behind
            `language_model.`), or `orbax` (names of our own and config.yaml; takes every model).
        dtype: As of `convert`; None keeps what the model has. `fp8` needs a process that holds all
            of a matrix, for each.
        sidecars: A directory whose tokenizer, generation config and chat template travel along.
        overwrite: Replace what is there, once the new directory is complete.
        shard_bytes: Largest safetensors file, unless one tensor is larger.
        note: Called with sentences about work that is there already, or stays.

    Raises:
        ValueError: the format cannot hold this model, or an unfinished directory of other contents
            is in the way; OSError: the directory cannot be written, or somebody is writing it.
    """
    check_format(format)
    contents = contents_lib.of(model, format, dtype, shard_bytes)
    travelling = None if sidecars is None else folders.at(sidecars)
    saving.save(contents, path, travelling, note, overwrite=overwrite)
