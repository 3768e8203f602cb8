"""Choose the implementation of an op: the one named, or the first in order that accepts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pallas_kernels.errors import Unsupported
from pallas_kernels.target import TARGETS, Target


class Choice(NamedTuple):
    """What the automatic choice takes for one target, and why it passed over what comes before."""

    name: str
    refusals: dict[str, str]
    """Reason by name of each implementation that was tried first and declined."""


def choose(
    order: Sequence[str],
    why_not: Mapping[str, Callable[..., str | None]],
    *args: Any,
    **kwargs: Any,
) -> dict[Target, Choice]:
    """For every target, the first implementation of the order that can serve this call.

    Args:
      order: names to try in turn; the last one must take every call on every target.
      why_not: by name, a function of the target and the call that looks at shapes, dtypes and
        options and returns the reason why the implementation cannot serve it, or None. A name that
        is missing takes all.
      args, kwargs: the call; arrays may be abstract.
    """
    choices = {}
    for target in TARGETS:
        refusals: dict[str, str] = {}
        for name in order:
            reason = why_not[name](target, *args, **kwargs) if name in why_not else None
            if reason is None:
                choices[target] = Choice(name, refusals)
                break
            refusals[name] = reason
        else:
            raise ValueError(f"no implementation takes the call on {target}: {refusals}")
    return choices


class Plan(NamedTuple):
    """An automatic or a named choice as a static argument: what runs where, and what to say."""

    names: tuple[str, ...]
    """The implementation of each of TARGETS."""
    notes: tuple[tuple[Target, str], ...] = ()
    """For target.announce: the targets on which this is the slow path."""


def named(name: str) -> Plan:
    """One implementation, whatever the target."""
    return Plan((name,) * len(TARGETS))


def plan(op_name: str, choices: Mapping[Target, Choice], *, slow: str | None) -> Plan:
    """The choices, with a note for every accelerator where `slow` was what remained."""
    notes = tuple(
        (target, f"{op_name} on {target} takes the slow path, {slow!r}: {reasons}")
        for target, choice in choices.items()
        if choice.name == slow and target != "cpu"
        if (reasons := "; ".join(f"{name}: {why}" for name, why in choice.refusals.items()))
    )
    return Plan(tuple(choices[target].name for target in TARGETS), notes)


def demand(why_not: Callable[..., str | None] | None, *args: Any, **kwargs: Any) -> None:
    """Raise Unsupported if the implementation a caller named serves the call on no target.

    On which of the others it was meant to run is not known here; there its compiler refuses it.
    """
    if why_not is None:
        return
    reasons = {why_not(target, *args, **kwargs): target for target in reversed(TARGETS)}
    if None not in reasons:
        raise Unsupported("; ".join(f"for {reasons[key]}: {key}" for key in reversed(reasons)))


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
