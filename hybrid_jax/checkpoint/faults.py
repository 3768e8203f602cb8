"""Named moments of a save, at which a test may kill the process or let the disk fail."""

from collections.abc import Callable

POINTS = (
    # Nothing is on disk.
    "begin",
    # Arrays are being written, under another name than the checkpoint's.
    "arrays",
    # They have their name; there is no manifest.
    "written",
    # The manifest is there under another name.
    "manifest drafted",
    # The checkpoint is whole; older ones are still there.
    "manifest named",
    # An older one is about to go, then out of sight, then being deleted.
    "retention",
    "deletion",
)

_hook: Callable[[str], None] | None = None


def install(hook: Callable[[str], None] | None) -> None:
    """Call `hook` with the name of each point that is reached; None ends that."""
    global _hook
    _hook = hook


def reach(point: str) -> None:
    """Say that a point of POINTS is reached; does nothing outside tests."""
    if _hook is not None:
        assert point in POINTS, point
        _hook(point)
