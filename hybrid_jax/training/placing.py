"""Where a run computes: a placement from its configuration and the devices there are."""

import math
from collections.abc import Callable, Sequence

import jax

from hybrid_jax.config.parallel import Parallel
from hybrid_jax.config.training import TrainConfig
from hybrid_jax.model.parallel import placement as placements
from hybrid_jax.model.parallel.admission import Capacity
from hybrid_jax.model.parallel.placement import Placement
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.state import shardings
from sharding import Logical


def choose(config: TrainConfig, devices: Sequence, note: Callable[[str], None]) -> Placement | None:
    """Where `config` computes on these devices; None for one device.

    Without `config.parallel`, fsdp over all of them, or over as many as rows and widths divide by
    where one process has them all; `note` says so. Raises ValueError, with the numbers, if the mesh
    does not multiply out, or rows, tokens or parameters do not divide by it.
    """
    parallel = config.parallel
    if parallel is None:
        parallel, given = Parallel(mesh="fsdp=-1"), len(devices)
        devices = _usable(config, devices)
        if given > 1:
            note(_note(len(devices), given))
    placement = make(parallel, devices)
    if placement.shape.devices == 1:
        return None
    check(config, placement)
    return placement


def make(parallel: Parallel, devices: Sequence) -> Placement:
    """The placement that a configuration means; ValueError if it does not multiply out."""
    capacity = Capacity(parallel.capacity_per_expert, parallel.capacity_per_device)
    options = placements.ExpertOptions(capacity, parallel.token_groups)
    return placements.make(parallel.mesh, parallel.rules, devices, options)


def check(config: TrainConfig, placement: Placement) -> None:
    """ValueError, with the numbers, if rows, tokens or parameters do not divide."""
    _check_rows(config, placement)
    _check_tokens(config, placement)
    skeleton = Skeleton(config.model, config.tuning)
    shardings(skeleton, Optimizer(config, skeleton.axes), placement)


def _usable(config: TrainConfig, devices: Sequence) -> Sequence:
    """As many as divide a round's rows and the model's width; all, where processes share them."""
    if jax.process_count() > 1:
        return devices
    rows = config.batch_size // config.accumulate
    return devices[: math.gcd(len(devices), rows, config.model.hidden_dim)]


def _note(used: int, given: int) -> str:
    if used == given:
        return f"Using all {given} devices, on the axis fsdp; --mesh chooses otherwise."
    return (
        f"Using {used} of {given} devices, on the axis fsdp: rows or widths do not divide by more. "
        "Choose another --batch-size or --mesh to use all."
    )


def _check_rows(config: TrainConfig, placement: Placement) -> None:
    split = _split(placement, Logical.BATCH)
    rows = config.batch_size // config.accumulate
    if rows % math.prod(split.values()):
        # Experts' devices split rows in all rules but these.
        few = ", or the rules long_rows" if placement.rules.name == "long_context" else ""
        raise ValueError(
            f"batch_size={config.batch_size} in accumulate={config.accumulate} rounds gives "
            f"{rows} rows, which do not divide by {_product(split)} of the mesh "
            f"{placement.shape}. Choose a batch size that is a multiple of "
            f"{config.accumulate * math.prod(split.values())}, or another --mesh{few}."
        )


def _check_tokens(config: TrainConfig, placement: Placement) -> None:
    split = _split(placement, Logical.TIME)
    # A causal ring deals two pieces of a row to each device.
    pieces = 2 * math.prod(split.values())
    length = config.data.sequence_length
    if split and length % pieces:
        raise ValueError(
            f"sequence_length={length} does not divide by 2 x {_product(split)}: each device "
            f"holds two pieces of a row. Choose a multiple of {pieces}, or another --mesh."
        )
    rows = config.batch_size // config.accumulate
    devices = math.prod((split | _split(placement, Logical.BATCH)).values())
    tokens, groups = rows * length // devices, placement.experts.token_groups
    if tokens % groups:
        raise ValueError(
            f"The {tokens} tokens of a device do not divide into token_groups={groups}; choose "
            "another number of groups."
        )


def _split(placement: Placement, logical: Logical) -> dict[str, int]:
    """Mesh axes that split a dim, with their sizes; those of one device left out."""
    sizes = placement.shape.sizes
    return {axis: sizes[axis] for axis in placement.axes_of(logical) if sizes[axis] > 1}


def _product(split: dict[str, int]) -> str:
    text = " x ".join(f"{axis}={size}" for axis, size in split.items())
    return f"{text} = {math.prod(split.values())}" if len(split) > 1 else text
