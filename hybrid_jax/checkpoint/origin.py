"""What a conversion is made from, and how: two starts with the same of both go on with one work."""

import concurrent.futures
import dataclasses
import hashlib
import json
from collections.abc import Mapping

from hybrid_jax import __version__
from hybrid_jax.checkpoint import sidecars
from hybrid_jax.checkpoint.formats import protocol, training_run
from hybrid_jax.checkpoint.formats.files import Folder
from hybrid_jax.checkpoint.opened import Checkpoint

# Hundreds of files, each of which may be a request to a store.
_ASKING = 16


@dataclasses.dataclass(frozen=True)
class Origin:
    """Digests by what they are of; equal ones make equal bytes, if they are of a source."""

    parts: Mapping[str, str]

    @property
    def digest(self) -> str | None:
        """Of all parts; None for those of a model, whose values are not among them."""
        return _digest(dict(self.parts)) if "source" in self.parts else None

    def differences(self, other: "Origin") -> list[str]:
        """What is not the same."""
        names = sorted(self.parts.keys() | other.parts.keys())
        return [name for name in names if self.parts.get(name) != other.parts.get(name)]


def of(checkpoint: Checkpoint, layout: protocol.Layout, options: Mapping) -> Origin:
    """Names, sizes and times of the source's files; the options; what will lie where; our version.

    In object storage a file has the version that the store gives it instead of a time. The place
    of the source does not count, for machines may know it by other paths.
    """
    return Origin(
        {
            "source": _digest(_files(checkpoint)),
            "options": _digest(dict(options)),
            "layout": _digest(_units(layout)),
            "version": __version__,
        }
    )


def of_model(
    config: str, travelling: Folder | None, layout: protocol.Layout, dealt: Mapping | None
) -> Origin:
    """Of a model: its config, files that travel along, what lies where, and who writes it; version.

    `dealt` is what several processes write each; None for one. Its values do not count: whoever
    goes on holds what it would write against what was written.
    """
    names = [] if travelling is None else sidecars.find(travelling)
    files = [[name, *travelling.state(name)] for name in names] if travelling is not None else []
    writers = [
        [name, [[piece.process, [[p.begin, p.shape] for p in piece.parts or ()]] for piece in each]]
        for name, each in (dealt or {}).items()
    ]
    return Origin(
        {
            "config": _digest(config),
            "sidecars": _digest(files),
            "layout": _digest(_units(layout)),
            "processes": _digest(writers),
            "version": __version__,
        }
    )


def _units(layout: protocol.Layout) -> list:
    return [
        [[info.name, info.dtype, list(info.shape)] for info in unit.infos] for unit in layout.units
    ]


def _files(checkpoint: Checkpoint) -> list[list]:
    """[path, bytes, version or time of the last change] of everything that is read."""
    folder, step = checkpoint.folder, checkpoint.step
    if step is None:
        names = folder.below()
    else:
        # The run itself may go on meanwhile.
        names = folder.below(f"{training_run.CHECKPOINTS}/{step}")
        names += [sidecars.CONFIG_YAML, *sidecars.find(folder)]
    with concurrent.futures.ThreadPoolExecutor(_ASKING) as pool:
        return sorted([name, *state] for name, state in zip(names, pool.map(folder.state, names)))


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
