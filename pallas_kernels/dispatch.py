"""Choose the implementation of an op: the one named, or the first in order that accepts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pallas_kernels.errors import Unsupported


def call(
    op_name: str,
    table: Mapping[str, Callable[..., Any]],
    order: Sequence[str],
    *args: Any,
    implementation: str | None = None,
    **kwargs: Any,
) -> Any:
    """Call one implementation of an op and return its result.

    Args:
      op_name: name of the op, for messages.
      table: every implementation by name; each takes `*args, **kwargs`.
      order: names to try in turn when the caller chose none.
      implementation: the caller's choice. It is obeyed or the call fails; nothing else is tried.

    Raises:
      ValueError: `implementation` is not in the table.
      Unsupported: the chosen implementation declined.
      ExceptionGroup: every implementation of `order` declined; holds one Unsupported each.
    """
    if implementation is not None and implementation not in table:
        choices = ", ".join(repr(name) for name in table)
        raise ValueError(
            f"{op_name} has no implementation {implementation!r}; choose one of {choices}, "
            "or None for the automatic choice"
        )
    refusals = []
    for name in order if implementation is None else (implementation,):
        try:
            return table[name](*args, **kwargs)
        except Unsupported as refusal:
            if implementation is not None:
                raise
            refusal.add_note(f"declined by {op_name} implementation {name!r}")
            refusals.append(refusal)
    raise ExceptionGroup(f"no implementation of {op_name} accepts this call", refusals)
