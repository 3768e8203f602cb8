"""A checkpoint directory as a model, and a model as a checkpoint directory."""

import dataclasses

import numpy as np

from hybrid_jax import model as models
from hybrid_jax.checkpoint import atomic, decay_tables, hf_config, leaves
from hybrid_jax.checkpoint import convert as conversion
from hybrid_jax.checkpoint import sidecars as sidecars_lib
from hybrid_jax.checkpoint.formats.orbax import OrbaxSink
from hybrid_jax.checkpoint.formats.protocol import TAGS, Sink, TensorInfo
from hybrid_jax.checkpoint.formats.safetensors_writer import SafetensorsSink
from hybrid_jax.checkpoint.hf_config.native import BLOCK_SIZE
from hybrid_jax.checkpoint.names import minimax, tree
from hybrid_jax.checkpoint.opened import open_checkpoint
from hybrid_jax.checkpoint.quantization import QuantizingReader
from hybrid_jax.checkpoint.sidecars import CONFIG_JSON, CONFIG_YAML
from hybrid_jax.config import model as model_lib
from hybrid_jax.config import text
from hybrid_jax.model.parallel.placement import Placement
from hybrid_jax.model.quantized import is_quantized


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
            whose newest good checkpoint is taken.
        dtype: `float32` or `bfloat16`; routers and their biases are float32 always.
        quantize: `int8` or `fp8`: hold the weights of layers in eight bits with scales, to generate
            and to evaluate (`hybrid_jax.model.quantized`). They are quantised as they are read, a
            tensor at a time; FP8 of a checkpoint is kept.
        placement: Devices that quantised parameters are split over; None for the first device.
        check_finite: Refuse NaN and infinite weights.

    Raises:
        ValueError: naming the file, field or tensor that is wrong.
    """
    dtypes = model_lib.Dtypes(parameters=dtype, compute=dtype)
    with open_checkpoint(path) as checkpoint:
        config = dataclasses.replace(checkpoint.config, dtypes=dtypes)

        def read(leaf: str, shape, leaf_dtype: np.dtype) -> np.ndarray:
            return checkpoint.read_leaf(leaf, shape, leaf_dtype, check_finite)

        if quantize is not None:
            reader = QuantizingReader(checkpoint, quantize, placement, check_finite)
            return leaves.fill(config, reader)
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
    conversion.check_format(format)
    if is_quantized(arrays):
        raise ValueError(
            "This model's weights were quantised when it was loaded, and what was rounded away is "
            "lost: copy or convert the checkpoint it came from instead."
        )
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
    with atomic.new_directory(path, overwrite=overwrite) as draft:
        if sidecars is not None:
            sidecars_lib.copy(sidecars_lib.find(sidecars), draft)
        sink: Sink
        if format == "orbax":
            text.write_yaml(config, draft / CONFIG_YAML)
            sink = OrbaxSink(draft, infos, vocabulary="tree")
        else:
            conversion.dump_json(draft / CONFIG_JSON, values)
            sink = SafetensorsSink(draft, infos)
        with conversion.filling(sink, infos) as write:
            for rule in rules:
                # One block at a time from the device, never a whole stack.
                block = np.asarray(arrays[rule.leaf][rule.slices()])
                write(rule.name, rule.from_block(block))
            for name, (info, layer_idx) in tables.items():
                write(name, decay_tables.table(name, config, layer_idx, info.shape))
