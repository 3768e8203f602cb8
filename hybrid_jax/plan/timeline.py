"""Walk through a program in the order of its schedule: what takes how long, and what is waited for."""

import collections
import dataclasses
from collections.abc import Callable

from hybrid_jax.plan import collectives, hlo
from hybrid_jax.plan.network import Network

# (computation, instruction) -> (seconds, what it is, where the time comes from)
Clock = Callable[[str, hlo.Instruction], "Work"]

_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "copy-start",
    "copy-done", "add-dependency", "partition-id", "replica-id", "opt-barrier", "call-done",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Work:
    """What an instruction costs."""

    seconds: float
    kind: str
    """matrix products, elementwise and copies, or the name of a kernel."""
    source: str
    """compiler, schedule or model."""


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind over the same axes."""

    count: float = 0
    bytes: float = 0
    seconds: float = 0
    exposed: float = 0
    """Seconds of these that the device waits."""

    def add(self, other: "Traffic", times: float = 1) -> None:
        """Take in another's, `times` over."""
        for field in dataclasses.fields(self):
            name = field.name
            setattr(self, name, getattr(self, name) + times * getattr(other, name))


@dataclasses.dataclass
class Timeline:
    """A computation from start to end; a loop counts as often as it runs."""

    seconds: float = 0
    work: dict[tuple[str, str, bool], float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )
    """Seconds by (kind, source, whether it is computed a second time)."""
    traffic: dict[tuple[str, tuple[str, ...]], Traffic] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(Traffic)
    )
    """By kind and mesh axes."""
    memory_bytes: float = 0
    """Read and written in HBM by what is no kernel, each operand counted whole."""
    unknown_loops: int = 0
    """Loops that do not say how often they run, counted once."""

    def add(self, other: "Timeline", times: float = 1) -> None:
        """Run another one after this, `times` over."""
        self.seconds += times * other.seconds
        self.memory_bytes += times * other.memory_bytes
        self.unknown_loops += other.unknown_loops
        for key, seconds in other.work.items():
            self.work[key] += times * seconds
        for place, traffic in other.traffic.items():
            self.traffic[place].add(traffic, times)


class Walk:
    """Simulates one device: a queue of work, and links that are busy for a time."""

    def __init__(self, program: hlo.Program, clock: Clock, network: Network, mesh: dict[str, int]):
        self._program = program
        self._clock = clock
        self._network = network
        self._mesh = mesh
        self._done: dict[str, Timeline] = {}

    def entry(self) -> Timeline:
        """The whole program."""
        return self._body(self._program.entry)

    def _body(self, name: str) -> Timeline:
        if name not in self._done:
            self._done[name] = _Body(self, name).run()
        return self._done[name]

    # What a body asks for.
    def called(self, computation: str, instruction: hlo.Instruction) -> Timeline | None:
        """The time of a loop, a branch or a call; None for anything else."""
        inner = Timeline()
        if instruction.opcode == "while":
            body = instruction.attribute(r"body=%?([\w.\-]+)")
            trips = self._program.trips(instruction)
            inner.add(self._body(body), trips or 1)
            inner.unknown_loops += trips is None
        elif instruction.opcode == "conditional":
            inner.add(
                max((self._body(name) for name in instruction.called), key=lambda b: b.seconds)
            )
        elif instruction.opcode == "call":
            for name in instruction.called:
                inner.add(self._body(name))
        else:
            return None
        return inner


class _Body:
    """One computation on its way."""

    def __init__(self, walk: Walk, name: str):
        self._walk, self._name = walk, name
        self._timeline = Timeline()
        self._busy: dict[int, float] = collections.defaultdict(float)
        """When the links along each torus dim are free again."""
        self._pending: dict[str, tuple[float, Traffic]] = {}
        """By channel: when a collective that was started ends, and where it is counted."""
        self._starts: dict[str, str] = {}
        """Instruction that started a collective -> its channel."""
        self._last: dict[str, str] = {}
        """Channel -> the last instruction that carries a part of it."""

    def run(self) -> Timeline:
        walk, timeline = self._walk, self._timeline
        body = walk._program.computations[self._name]
        parts = {each.name: self._collectives(each) for each in body}
        for each in body:
            for found in parts[each.name]:
                self._last[found.channel] = each.name
        for each in body:
            if (inner := walk.called(self._name, each)) is not None:
                timeline.add(inner)
                continue
            for found in parts[each.name]:
                self._begin(found, each.name)
            self._work(each, bool(parts[each.name]))
            self._end(each, parts[each.name])
        for channel in list(self._pending):
            self._wait(channel)
        return timeline

    def _collectives(self, instruction) -> list[collectives.Collective]:
        walk = self._walk
        devices = len(walk._network)
        found = collectives.inside(walk._program, self._name, instruction, devices)
        if not instruction.opcode == "fusion":
            # Channel numbers are shared by what does not overlap: a start and its end are named.
            return [dataclasses.replace(each, channel=instruction.name) for each in found]
        return [
            dataclasses.replace(each, channel=f"fused {each.channel}")
            if "async" in "".join(instruction.called)
            or instruction.name.startswith("async")
            or _is_chained(walk._program, instruction)
            else dataclasses.replace(each, channel=instruction.name)
            for each in found
        ]

    def _begin(self, found: collectives.Collective, name: str) -> None:
        if found.channel in self._pending:
            return
        walk = self._walk
        reach = walk._network.reach(found.group)
        seconds = walk._network.seconds(found.kind, found.size, reach)
        start = max([self._timeline.seconds, *(self._busy[dim] for dim in reach.dims)])
        for dim in reach.dims:
            self._busy[dim] = start + seconds
        place = (found.kind, collectives.axes(found.group, walk._mesh))
        traffic = self._timeline.traffic[place]
        traffic.add(Traffic(1, found.size, seconds))
        self._pending[found.channel] = (start + seconds, traffic)
        self._starts[name] = found.channel

    def _work(self, instruction: hlo.Instruction, is_collective: bool) -> None:
        if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
            return
        if is_collective and instruction.opcode != "fusion":
            return
        work = self._walk._clock(self._name, instruction)
        again = "rematted_computation" in instruction.attributes
        self._timeline.seconds += work.seconds
        self._timeline.work[work.kind, work.source, again] += work.seconds
        read = self._walk._program.operand_bytes(self._name, instruction)
        self._timeline.memory_bytes += sum(read) + instruction.bytes

    def _end(self, instruction: hlo.Instruction, parts) -> None:
        """Wait for what ends here: a -done, the last part of a chain, or what has no -start."""
        if instruction.opcode.endswith("-done"):
            for operand in instruction.operands:
                if channel := self._starts.get(operand):
                    self._wait(channel)
        elif not instruction.opcode.endswith("-start"):
            for found in parts:
                if self._last[found.channel] == instruction.name:
                    self._wait(found.channel)

    def _wait(self, channel: str) -> None:
        if channel in self._pending:
            end, traffic = self._pending.pop(channel)
            wait = max(0.0, end - self._timeline.seconds)
            self._timeline.seconds += wait
            traffic.exposed += wait


def _is_chained(program: hlo.Program, instruction: hlo.Instruction) -> bool:
    """Whether a fusion carries a part of a collective that goes on in other fusions."""
    return any(
        "chain_id" in each.attributes
        for called in instruction.called
        for each in program.computations.get(called, ())
        if collectives.kind_of(each.opcode)
    )
