"""The first state of a run that begins with the weights of another one."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from hybrid_jax.checkpoint import atomic, loading
from hybrid_jax.checkpoint.formats.protocol import RangedSource
from hybrid_jax.checkpoint.opened import Checkpoint, open_checkpoint
from hybrid_jax.config import text
from hybrid_jax.config.start import Start
from hybrid_jax.config.training import TrainConfig
from hybrid_jax.model.parallel.placement import Placement
from hybrid_jax.training.checkpoints import CheckpointStore
from hybrid_jax.training.fingerprint import Fingerprint
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Named, Skeleton
from hybrid_jax.training.run import RunDirectory
from hybrid_jax.training.state import TrainState, abstract_state, state_from
from sharding import processes


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a run began with; stored beside its configuration."""

    path: str
    step: int | None
    """Of the run it came from; None for other checkpoints."""
    digest: str
    """Of names and values of the parameters as this run began with them, in its dtypes: runs that
    began with the same have the same, whatever they read and on whatever devices
    (`fingerprint.Fingerprint`)."""
    differences: tuple[str, ...]
    """Fields of the model's configuration that were otherwise there."""

    def write(self, path: pathlib.Path) -> None:
        """As JSON, whole or not at all."""
        atomic.write_text(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def begin(
    config: TrainConfig,
    skeleton: Skeleton,
    optimizer: Optimizer,
    placement: Placement | None,
    note: Callable[[str], None],
    tokenizer: pathlib.Path | None = None,
) -> tuple[TrainState, Origin]:
    """The state before the first update with the parameters that `config.start` names.

    `note` is told what they are, how the model differs, and if `tokenizer`, the file of this run,
    is not the one that lies beside them.

    Each process reads what its devices hold, one parameter after the other. Raises
    ValueError, listing every difference, if names or shapes are not those of this model; ValueError
    or OSError if there is nothing to read.
    """
    start = config.start
    assert start is not None
    found: list[tuple[Named, Fingerprint, int | None, tuple[str, ...]]] = []
    processes.all_pass(lambda: found.append(_read(config, start, skeleton, placement)))
    params, values, step, differences = found.pop()
    # Not before each has read its own.
    digest = values.digest({name: skeleton.abstract[name] for name in skeleton.names})
    origin = Origin(str(start.path), step, digest, differences)
    if start.moments:
        del params
        # All take part, for every process restores its own part.
        state = _with_moments(config, start, origin, skeleton, optimizer, placement)
    else:
        state = state_from(params, config, skeleton, optimizer, placement)
    note(_describe(origin))
    other = pathlib.Path(start.path) / "tokenizer.json"
    if tokenizer is not None and _differ(tokenizer, other):
        note(
            f"{other} is not the tokenizer of this run, whose numbers may mean other words to "
            f"these weights. A new run takes it with --data.tokenizer {other}"
        )
    return state, origin


def _differ(one: pathlib.Path, other: pathlib.Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() != other.read_bytes()


def _read(config: TrainConfig, start: Start, skeleton: Skeleton, placement):
    """(parameters, what they are, step, fields of the model's configuration that differ)."""
    with open_checkpoint(start.path, start.step) as checkpoint:
        _check_same_parameters(checkpoint, skeleton)
        params: Named = {}
        values = Fingerprint()
        for name in skeleton.names:
            wanted, where = skeleton.abstract[name], None
            if placement is not None:
                where = placement.parameter(name, skeleton.all_axes(name), wanted.shape)
            dtype = np.dtype(wanted.dtype)
            seen = functools.partial(values.add, name, wanted.shape)
            params[name] = loading.load(checkpoint, name, wanted.shape, dtype, where, seen=seen)
        if isinstance(checkpoint.source, RangedSource):
            checkpoint.source.check_unchanged()
        return params, values, checkpoint.step, _differences(checkpoint.config, config.model)


def _with_moments(
    config: TrainConfig, start: Start, origin: Origin, skeleton, optimizer, placement
) -> TrainState:
    """Parameters and the optimiser's state of a run that trained the same way; step 0."""
    run = RunDirectory(pathlib.Path(start.path))
    if not run.config.is_file():
        raise ValueError(f"start.moments needs a run, and {start.path} is none: it has no moments.")
    stored = run.read_config()
    for what in ("tuning", "optimizer"):
        then, now = (text.dump(getattr(each, what)) for each in (stored, config))
        kinds = then.splitlines()[0], now.splitlines()[0]
        # Numbers of an optimiser may change; what it keeps, and of which parameters, may not.
        if kinds[0] != kinds[1] or (what == "tuning" and then != now):
            raise ValueError(
                f"start.moments needs the same {what} as in {start.path}; there it is\n{then}"
                f"and here\n{now}Leave start.moments out, or train as before."
            )
    with CheckpointStore.reading(run.checkpoints) as checkpoints:
        state = checkpoints.restore(
            abstract_state(skeleton, optimizer, placement), origin.step
        ).state
    zero = jax.make_array_from_callback((), state.step.sharding, lambda _: np.zeros((), np.int32))
    return dataclasses.replace(state, step=zero)


def _check_same_parameters(checkpoint: Checkpoint, skeleton: Skeleton) -> None:
    """ValueError with every name and shape that differs."""
    stored = checkpoint.shapes
    wanted = {name: skeleton.abstract[name].shape for name in skeleton.names}
    problems = [
        f"  {name}: there {_shape(stored.get(name))}, here {_shape(wanted.get(name))}"
        for name in [*wanted, *(name for name in stored if name not in wanted)]
        if stored.get(name) != wanted.get(name)
    ]
    if problems:
        raise ValueError(
            f"The parameters of {checkpoint.folder} are not those of model "
            f"{skeleton.config.name}:\n"
            + "\n".join(problems)
            + "\nStart with another checkpoint, or give this run that model."
        )


def _shape(shape) -> str:
    return "absent" if shape is None else str(list(shape))


def _differences(there, here) -> tuple[str, ...]:
    """Lines of the model's configuration that are otherwise."""
    old, new = (
        dict(line.split(" = ", 1) for line in text.dump(model).splitlines())
        for model in (there, here)
    )
    return tuple(
        f"model.{name} = {new.get(name, 'absent')}, there {old.get(name, 'absent')}"
        for name in [*new, *(name for name in old if name not in new)]
        if old.get(name) != new.get(name) and name != "name"
    )


def _describe(origin: Origin) -> str:
    step = "" if origin.step is None else f" at step {origin.step}"
    lines = [f"Starting with the weights of {origin.path}{step} (digest {origin.digest})."]
    if origin.differences:
        lines.append("Differing from there: " + "; ".join(origin.differences) + ".")
    return " ".join(lines)
