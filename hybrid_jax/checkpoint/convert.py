"""Convert a checkpoint directory tensor by tensor, in the memory of a few tensors."""

import contextlib
import dataclasses
import json
import os
import pathlib
import resource
import shutil
import sys
import time
import typing

from hybrid_jax.checkpoint import atomic, decay_tables, hf_config, sidecars
from hybrid_jax.checkpoint import plan as plans
from hybrid_jax.checkpoint.formats.orbax import OrbaxSink
from hybrid_jax.checkpoint.formats.protocol import Sink
from hybrid_jax.checkpoint.formats.safetensors_writer import SHARD_BYTES, SafetensorsSink
from hybrid_jax.checkpoint.opened import Checkpoint, open_checkpoint
from hybrid_jax.checkpoint.sidecars import CONFIG_JSON, CONFIG_YAML
from hybrid_jax.config import text

FORMATS = ("orbax", "hf", "hf-original")


class Summary(typing.NamedTuple):
    """What a conversion did."""

    tensors: int
    """Tensors written."""
    bytes: int
    """Bytes of their data."""
    seconds: float
    """Wall time."""
    peak_rss_bytes: int
    """Most memory that this process ever held, libraries included."""


def convert(
    src,
    dst,
    format: str,
    dtype: str | None = None,
    progress=None,
    *,
    check_finite: bool = True,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    language_only: bool = False,
) -> Summary:
    """Convert the checkpoint in `src` to a new directory `dst` in `format`.

    Args:
        src: Hugging Face directory (released names, transformers' `minimax`, M2; bf16 or FP8; one
            file or shards), Orbax as written by this package, or a training run, of which the
            newest good checkpoint is taken; what LoRA learnt is merged in.
        dst: Appears whole at the end, or not at all.
        format: `orbax`; `hf`, as transformers writes it, decay tables included; `hf-original`, as
            MiniMax released it.
        dtype: `float32` or `bfloat16` for all weights, FP8 ones multiplied with their scales;
            routers that are stored in float32 stay so. None keeps every tensor's bytes.
        progress: Called as progress(done_bytes, total_bytes, tensor_name) after each tensor.
        check_finite: Refuse NaN and infinite weights.
        overwrite: Replace a non-empty `dst`.
        shard_bytes: Largest safetensors file, unless one tensor is larger.
        language_only: Leave out the vision part of VL-01; without it such a source is refused.

    Raises:
        ValueError: what is wrong in `src`, naming file and tensor.
        OSError: `dst` cannot be written. In both cases `dst` is as before.
    """
    start = time.perf_counter()
    _check_arguments(src, dst, format, dtype)
    with open_checkpoint(src) as checkpoint:
        plan = plans.make(checkpoint, format, dtype, language_only=language_only)
        with atomic.new_directory(dst, overwrite=overwrite) as draft:
            write_config(draft, checkpoint, format, dtype, plan)
            sidecars.copy(sidecars.find(src), draft)
            infos = plan.infos
            sink: Sink
            if format == "orbax":
                sink = OrbaxSink(draft, infos, vocabulary=plan.vocabulary)
            else:
                sink = SafetensorsSink(draft, infos, shard_bytes=shard_bytes)
            with filling(sink, infos, progress) as write:
                _pour(checkpoint, plan, dtype, check_finite, write)
    peak = peak_rss_bytes()
    total = sum(info.nbytes for info in infos)
    return Summary(len(infos), total, time.perf_counter() - start, peak)


@contextlib.contextmanager
def filling(sink, infos, progress=None):
    """Yields write(name, array) into a sink that is closed at the end or, on an error, given up."""
    total, done = sum(info.nbytes for info in infos), 0

    def write(name, array):
        nonlocal done
        sink.write(name, array)
        done += array.nbytes
        if progress is not None:
            progress(done, total, name)

    try:
        yield write
        sink.close()
    except BaseException:
        sink.abort()
        raise


def write_config(
    directory: pathlib.Path,
    checkpoint: Checkpoint,
    format: str,
    dtype: str | None,
    plan: plans.Plan,
) -> None:
    """config.json or config.yaml of a converted checkpoint."""
    if plan.vocabulary == "tree":
        config = checkpoint.config
        if dtype is not None:
            dtypes = dataclasses.replace(config.dtypes, parameters=dtype)
            config = dataclasses.replace(config, dtypes=dtypes)
        text.write_yaml(config, directory / CONFIG_YAML)
        return
    described = checkpoint.description
    if format == "orbax" and described is not None:
        values = described.json
    else:
        stored = checkpoint.source.tensors[next(iter(checkpoint.rules))].dtype
        names = {tag: name for name, tag in plans.DTYPE_TAGS.items()}
        stored_name = dtype or names.get(stored, "float32")
        values = hf_config.write(checkpoint.config, format, stored_name, described)
    if dtype is not None:
        values = hf_config.with_dtype(values, dtype)
    if described is not None and values is described.json:
        # Byte for byte: nothing has changed.
        shutil.copyfile(checkpoint.path / CONFIG_JSON, directory / CONFIG_JSON)
    else:
        dump_json(directory / CONFIG_JSON, values)


def dump_json(path: pathlib.Path, values: dict) -> None:
    """Write a config.json as transformers lays it out."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def peak_rss_bytes() -> int:
    """Most memory that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def _pour(checkpoint: Checkpoint, plan: plans.Plan, dtype, check_finite: bool, write) -> None:
    read = checkpoint.read(plan.outputs, dequantize=dtype is not None, check_finite=check_finite)
    for name, array in read:
        for output in plan.outputs[name]:
            write(output.info.name, output.make(array, checkpoint.rules.get(name)))
    for name, (info, layer_idx) in plan.tables.items():
        write(name, decay_tables.table(name, checkpoint.config, layer_idx, info.shape))


def check_format(format: str) -> None:
    """ValueError with near names if there is no such format."""
    if format not in FORMATS:
        raise ValueError(
            f"There is no format {format!r}.{text.near_names(str(format), FORMATS)} Formats: "
            f"{', '.join(FORMATS)}."
        )


def _check_arguments(src, dst, format: str, dtype: str | None) -> None:
    check_format(format)
    if dtype is not None and dtype not in plans.DTYPE_TAGS:
        raise ValueError(f"dtype must be one of {', '.join(plans.DTYPE_TAGS)}; got {dtype!r}.")
    for what, path in (("source", src), ("destination", dst)):
        if not os.fspath(path):
            raise ValueError(f"The {what} must be a directory; got an empty path.")
    # Not Path.resolve, which raises where links run in a circle.
    src, dst = (pathlib.Path(os.path.realpath(path)) for path in (src, dst))
    if src == dst or src in dst.parents or dst in src.parents:
        raise ValueError(f"Source {src} and destination {dst} must be apart; one holds the other.")
