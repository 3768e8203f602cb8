"""A program from start to end, as scheduled: what takes how long, and what is waited for."""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

from hybrid_jax.plan import collectives, hlo
from hybrid_jax.plan.network import Network

# (computation, instruction) -> (seconds, what it is, where the time comes from)
Clock = Callable[[str, hlo.Instruction], "Work"]

_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "copy-start",
    "copy-done", "add-dependency", "partition-id", "replica-id", "opt-barrier",
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
    """Loops that do not say how often they run: as often as they could slice what they read."""

    def add(self, other: "Timeline", times: float = 1) -> None:
        """Run another one after this, `times` over."""
        self.seconds += times * other.seconds
        self.memory_bytes += times * other.memory_bytes
        self.unknown_loops += other.unknown_loops
        for key, seconds in other.work.items():
            self.work[key] += times * seconds
        for place, traffic in other.traffic.items():
            self.traffic[place].add(traffic, times)


class Links:
    """The links of one device, which collectives at the same time share evenly, dim by dim."""

    def __init__(self):
        self._now = 0.0
        self._left: dict[str, float] = {}
        """By channel: seconds that what is on its way would still take alone."""
        self._dims: dict[str, tuple[int, ...]] = {}
        self._ended: dict[str, float] = {}

    def begin(self, channel: str, now: float, seconds: float, dims: Sequence[int]) -> None:
        """Start at `now`, which never goes back, what takes so long alone on these dims."""
        self._advance(now)
        self._left[channel], self._dims[channel] = seconds, tuple(dims)

    def end(self, channel: str) -> float:
        """When it is over, if nothing else is started meanwhile."""
        while channel in self._left:
            self._advance(math.inf)
        return self._ended[channel]

    def _advance(self, until: float) -> None:
        """On to `until`, or to infinity just to the next end."""
        while self._left and self._now < until:
            crowd = collections.Counter(dim for name in self._left for dim in self._dims[name])
            rates = {
                name: 1 / max((crowd[dim] for dim in self._dims[name]), default=1)
                for name in self._left
            }
            first = min(self._left, key=lambda name: self._left[name] / rates[name])
            step = min(self._left[first] / rates[first], until - self._now)
            self._now += step
            for name, rate in rates.items():
                self._left[name] -= step * rate
            if self._now < until:
                del self._left[first]
                self._ended[first] = self._now
                if until == math.inf:
                    return
        self._now = self._now if until == math.inf else max(self._now, until)


class Walk:
    """Simulates one device: a queue of work, and links that are busy for a time."""

    def __init__(self, program: hlo.Program, clock: Clock, network: Network, mesh: dict[str, int]):
        self.program = program
        self.clock = clock
        self.network = network
        self.mesh = mesh
        self._done: dict[str, Timeline] = {}

    def entry(self) -> Timeline:
        """The whole program."""
        return self._computation(self.program.entry)

    def called(self, instruction: hlo.Instruction) -> Timeline | None:
        """The time of a loop, a branch or a call; None for anything else."""
        inner = Timeline()
        if instruction.opcode == "while":
            trips = self.program.trips(instruction)
            body = self._computation(instruction.attribute(r"body=%?([\w.\-]+)") or "")
            inner.add(body, trips or self.program.pieces(instruction))
            inner.unknown_loops += trips is None
        elif instruction.opcode == "conditional":
            branches = [self._computation(name) for name in instruction.called]
            inner.add(max(branches, key=lambda branch: branch.seconds))
        elif instruction.opcode == "call":
            for name in instruction.called:
                inner.add(self._computation(name))
        else:
            return None
        return inner

    def _computation(self, name: str) -> Timeline:
        if name not in self._done:
            self._done[name] = _Computation(self, name).run()
        return self._done[name]


class _Computation:
    """One computation on its way from its first instruction to its last."""

    def __init__(self, walk: Walk, name: str):
        self._walk, self._name = walk, name
        self._timeline = Timeline()
        self._links = Links()
        self._pending: dict[str, Traffic] = {}
        """By channel of a collective that was started: where it is counted."""
        self._starts: dict[str, str] = {}
        """Instruction that started a collective -> its channel."""

    def run(self) -> Timeline:
        """The time of all instructions, and what they wait for."""
        body = self._walk.program.computations[self._name]
        parts = {each.name: self._collectives(each) for each in body}
        last = {found.channel: each.name for each in body for found in parts[each.name]}
        for each in body:
            if (inner := self._walk.called(each)) is not None:
                self._timeline.add(inner)
                continue
            for found in parts[each.name]:
                self._begin(found, each.name)
            self._work(each, bool(parts[each.name]))
            if each.opcode.endswith("-done"):
                ending = [self._starts.get(operand) for operand in each.operands]
            elif each.opcode.endswith("-start"):
                ending = []
            else:
                channels = [found.channel for found in parts[each.name]]
                ending = [channel for channel in channels if last[channel] == each.name]
            for channel in filter(None, ending):
                self._wait(channel)
        for channel in list(self._pending):
            self._wait(channel)
        return self._timeline

    def _collectives(self, instruction) -> list[collectives.Collective]:
        """Those an instruction begins, carries on or ends, each with a channel of its own.

        Fusions that carry parts of one collective share its channel; any other is by its name.
        """
        walk = self._walk
        found = collectives.inside(walk.program, self._name, instruction, len(walk.network))
        is_part = instruction.opcode == "fusion" and _is_part(walk.program, instruction)
        return [
            dataclasses.replace(
                each, channel=f"parts of {each.channel}" if is_part else instruction.name
            )
            for each in found
        ]

    def _begin(self, found: collectives.Collective, name: str) -> None:
        if found.channel in self._pending:
            return
        reach = self._walk.network.reach(found.group)
        seconds = self._walk.network.seconds(found.kind, found.size, reach)
        self._links.begin(found.channel, self._timeline.seconds, seconds, reach.dims)
        place = (found.kind, collectives.axes(found.group, self._walk.mesh))
        traffic = self._timeline.traffic[place]
        traffic.add(Traffic(1, found.size, seconds))
        self._pending[found.channel] = traffic
        self._starts[name] = found.channel

    def _work(self, instruction: hlo.Instruction, is_collective: bool) -> None:
        if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
            return
        if is_collective and instruction.opcode != "fusion":
            return
        work = self._walk.clock(self._name, instruction)
        again = "rematted_computation" in instruction.attributes
        self._timeline.seconds += work.seconds
        self._timeline.work[work.kind, work.source, again] += work.seconds
        read = self._walk.program.operand_bytes(self._name, instruction)
        self._timeline.memory_bytes += sum(read) + instruction.bytes

    def _wait(self, channel: str) -> None:
        if channel in self._pending:
            traffic = self._pending.pop(channel)
            wait = max(0.0, self._links.end(channel) - self._timeline.seconds)
            self._timeline.seconds += wait
            traffic.exposed += wait


def _is_part(program: hlo.Program, instruction: hlo.Instruction) -> bool:
    """Whether a fusion carries a part of a collective that goes on in other fusions."""
    return instruction.name.startswith("async-collective") or any(
        "chain_id" in each.attributes
        for called in instruction.called
        for each in program.computations.get(called, ())
        if collectives.kind_of(each.opcode)
    )
