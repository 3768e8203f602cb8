"""The end of a run whose updates make no sense any more."""

import pathlib

from hybrid_jax.training.history import History


class Diverged(Exception):
    """The loss or the gradient is not a number any more, or far off, step after step."""


def diverged(
    record: dict, history: History, batch: pathlib.Path, newest: pathlib.Path | None
) -> Diverged:
    """What to raise; `batch` is the last one, `newest` the newest checkpoint if there is one."""
    in_a_row = history.skipped_in_a_row
    where = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is {newest}"
    many = f"{in_a_row} updates in a row were skipped" if in_a_row > 1 else "the update was skipped"
    return Diverged(
        f"Step {record['step']}: loss {record['loss']}, gradient norm {record['gradient_norm']}; "
        f"{many}, which left the parameters as they were. The last of the batches is {batch}; "
        f"{where}. Try a lower --schedule.peak, a longer --schedule.warmup-steps or a smaller "
        "--optimizer.clip-norm in a new run, or --resume with --faults.spikes.kind Spikes, which "
        "skips bad updates before they harm."
    )
