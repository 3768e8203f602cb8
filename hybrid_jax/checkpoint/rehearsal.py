"""What a conversion would do, from config.json and an index alone: nothing is read or written."""

import dataclasses
from collections.abc import Mapping

from hybrid_jax.checkpoint import fp8, hf_config, inspection, mapping
from hybrid_jax.checkpoint import plan as plans
from hybrid_jax.checkpoint.formats.protocol import TensorInfo
from hybrid_jax.checkpoint.opened import Checkpoint


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """A conversion that was planned and not done."""

    rows: list[mapping.Row]
    """Where every stored tensor goes in our tree."""
    notes: list[str]
    problems: list[str]
    """Why it would be refused; empty if it would not."""
    written: int | None
    """Tensors of the destination; None if there is no plan."""
    bytes: int | None
    """Of these; where no header says what is stored, as the config asks for."""
    dropped: list[str]
    """Stored tensors that the destination has not."""


def rehearse(
    src, format: str, dtype: str | None = None, *, language_only: bool = False, full: bool = False
) -> Rehearsal:
    """Plan what `convert` would do to `src`, whose weights need not be there.

    `full` gives a row for each tensor, not for each kind. Raises ValueError if `src` is no
    checkpoint.
    """
    found = inspection.inspect(src, need_files=False)
    if found.match is None:
        return Rehearsal([], found.notes, found.problems, None, None, [])
    rows = mapping.rows(found.match, found.listing.tensors, full=full)
    problems, plan = list(found.problems), None
    if not problems:
        try:
            plan = _plan(found, format, dtype, language_only)
        except ValueError as error:
            problems.append(str(error))
    if plan is None:
        return Rehearsal(rows, found.notes, problems, None, None, [])
    count = sum(info.nbytes for info in plan.infos)
    return Rehearsal(rows, found.notes, problems, len(plan.infos), count, plan.dropped)


class _Names:
    """A source of which names and forms are known, and nothing can be read."""

    def __init__(self, tensors: Mapping[str, TensorInfo]):
        self.tensors = dict(tensors)


def _plan(found: inspection.Inspection, format, dtype, language_only: bool) -> plans.Plan:
    assert found.match is not None and found.config is not None, "it has no problem"
    described, match = found.description, found.match
    block = None if described is None else fp8.block_size(described.json, "config.json")
    tensors = {
        # A tensor of unknown form is derived or of the vision part: its bytes are not counted.
        name: info or TensorInfo(name, "U8", (0,))
        for name, info in found.infos.items()
    }
    checkpoint = Checkpoint(
        found.folder,
        found.config,
        described,
        _Names(tensors),  # type: ignore[arg-type]
        match.rules,
        match.scales,
        match.derived,
        match.vision,
        block,
    )
    plan = plans.make(checkpoint, format, dtype, language_only=language_only)
    if format != "orbax":
        # Whether its config.json has a field for everything; its dtype is no matter of that.
        hf_config.write(found.config, format, dtype or "bfloat16", described)
    return plan
