"""One conversion: its opened source, its plan, and how a unit of the destination is written."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from hybrid_jax.checkpoint import decay_tables, hf_config, origin, sidecars
from hybrid_jax.checkpoint import plan as plans
from hybrid_jax.checkpoint.formats import protocol
from hybrid_jax.checkpoint.formats.orbax import OrbaxLayout
from hybrid_jax.checkpoint.formats.safetensors_writer import SafetensorsLayout
from hybrid_jax.checkpoint.opened import Checkpoint
from hybrid_jax.checkpoint.sidecars import CONFIG_JSON, CONFIG_YAML
from hybrid_jax.config import text


@dataclasses.dataclass(frozen=True)
class Job:
    """What was asked for; the arguments of `convert`."""

    src: str
    format: str
    dtype: str | None
    check_finite: bool
    shard_bytes: int
    group_bytes: int
    language_only: bool


class Conversion:
    """A job on its opened source. Every process of a conversion makes the same of it."""

    def __init__(self, job: Job, checkpoint: Checkpoint):
        self.job = job
        self.checkpoint = checkpoint
        self.plan = plans.make(checkpoint, job.format, job.dtype, language_only=job.language_only)
        self.layout: protocol.Layout
        if job.format == "orbax":
            self.layout = OrbaxLayout(
                self.plan.infos, vocabulary=self.plan.vocabulary, group_bytes=job.group_bytes
            )
        else:
            self.layout = SafetensorsLayout(self.plan.infos, shard_bytes=job.shard_bytes)
        # What else may be asked for changes no byte, or changes the layout.
        options = {"format": job.format, "dtype": job.dtype}
        self.origin = origin.of(checkpoint, self.layout, options)
        self._made = self._makers()
        self._units_of = self._count_units()
        # A stored tensor of which the next unit gets a part as well.
        self._kept: tuple[str, np.ndarray] | None = None

    def prepare(self, directory: pathlib.Path) -> None:
        """Write the config and what travels along."""
        write_config(directory, self.checkpoint, self.job.format, self.job.dtype, self.plan)
        sidecars.copy(self.checkpoint.folder, directory)

    def write(
        self, directory: pathlib.Path, number: int, told: Callable[[protocol.TensorInfo], None]
    ) -> protocol.Written:
        """Read, make and write all tensors of a unit; `told` hears of each."""
        infos = self.layout.units[number].infos
        return self.layout.write(directory, number, self._tensors(infos, told))

    def _tensors(self, infos, told) -> Iterator[np.ndarray]:
        """The tensors of a unit, in order."""
        for run in _runs([self._made[info.name] for info in infos]):
            for info, array in self._make(run):
                yield array
                # Asked for the next one: this one is written.
                del array
                told(info)

    def _make(self, run: list["_Maker"]) -> Iterator[tuple[protocol.TensorInfo, np.ndarray]]:
        wanted: dict[str, list[plans.Output]] = {}
        for maker in run:
            if maker.stored is None:
                info, layer_idx = self.plan.tables[maker.output.info.name]
                config = self.checkpoint.config
                yield info, decay_tables.table(info.name, config, layer_idx, info.shape)
            else:
                wanted.setdefault(maker.stored, []).append(maker.output)
        for name, array in self._read(list(wanted)):
            rule = self.checkpoint.rules.get(name)
            for output in wanted[name]:
                yield output.info, output.make(array, rule)

    def _read(self, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        if names and self._kept is not None and self._kept[0] == names[0]:
            yield self._kept
            names = names[1:]
        if any(self._units_of[name] > 1 for name in names):
            # One at a time: it may be a whole stack.
            self._kept = None
        dequantize = self.job.dtype is not None
        for name, array in self.checkpoint.read(
            names, dequantize=dequantize, check_finite=self.job.check_finite
        ):
            if self._units_of[name] > 1:
                self._kept = name, array
            yield name, array

    def _makers(self) -> dict[str, "_Maker"]:
        made = {
            output.info.name: _Maker(stored, output)
            for stored, outputs in self.plan.outputs.items()
            for output in outputs
        }
        return made | {
            name: _Maker(None, plans.Output(info)) for name, (info, _) in self.plan.tables.items()
        }

    def _count_units(self) -> dict[str | None, int]:
        units: dict[str | None, set[int]] = {}
        for unit in self.layout.units:
            for info in unit.infos:
                units.setdefault(self._made[info.name].stored, set()).add(unit.number)
        return {stored: len(numbers) for stored, numbers in units.items()}


@dataclasses.dataclass(frozen=True)
class _Maker:
    """What a tensor is made from; None is computed."""

    stored: str | None
    output: plans.Output


def _runs(makers: list[_Maker]) -> Iterator[list[_Maker]]:
    """Cut where the order of the file is no longer that of the source, and around what is computed.

    In a file wide types come first; within a type the order is that of the source.
    """
    run: list[_Maker] = []
    for maker in makers:
        last = run[-1] if run else None
        if last is not None and (
            (last.stored is None) != (maker.stored is None)
            or last.output.info.dtype != maker.output.info.dtype
        ):
            yield run
            run = []
        run.append(maker)
    yield run


def shares(layout: protocol.Layout, numbers, of: int) -> list[list[int]]:
    """Units dealt out to `of` workers, each a piece in order and about as many bytes."""
    sizes = {number: sum(info.nbytes for info in layout.units[number].infos) for number in numbers}
    total, begin = sum(sizes.values()), 0
    dealt: list[list[int]] = [[] for _ in range(of)]
    for number, size in sizes.items():
        # Where the middle of the unit lies; an empty one counts to where it begins.
        middle = (2 * begin + size) * of // (2 * total) if total else 0
        dealt[min(middle, of - 1)].append(number)
        begin += size
    return dealt


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
    plain = "bfloat16" if dtype == plans.FP8 else dtype
    if format == "orbax" and described is not None:
        values = described.json
    else:
        stored = checkpoint.source.tensors[next(iter(checkpoint.rules))].dtype
        names = {tag: name for name, tag in plans.DTYPE_TAGS.items()}
        stored_name = plain or names.get(stored, "float32")
        values = hf_config.write(checkpoint.config, format, stored_name, described)
    if plain is not None:
        values = hf_config.with_dtype(values, plain)
    if dtype == plans.FP8:
        values = hf_config.with_fp8(values)
    if described is not None and values is described.json:
        # Byte for byte: nothing has changed.
        checkpoint.folder.copy(CONFIG_JSON, directory / CONFIG_JSON)
    else:
        (directory / CONFIG_JSON).write_text(hf_config.dump(values), encoding="utf-8")
