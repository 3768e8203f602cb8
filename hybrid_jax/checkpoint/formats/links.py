"""Where the links of a checkpoint directory may lead: nowhere but into itself and the Hub cache."""

import os
import pathlib


def inside(directory: pathlib.Path, name: str) -> pathlib.Path:
    """The file, if it really is in the directory or in the Hub cache's blobs behind it.

    A directory from the net must not reach around the disk. Raises ValueError otherwise.
    """
    path = directory / name
    target, home = (pathlib.Path(os.path.realpath(place)) for place in (path, directory))
    if not os.path.exists(path):
        raise ValueError(
            f"{path} is a link that leads to no file ({target}). Copy the file into {directory}."
        )
    # The Hub cache keeps snapshots/<revision>/<file> as links to ../../blobs/<hash>.
    if home not in target.parents and target.parent != home.parent.parent / "blobs":
        raise ValueError(
            f"{path} is a link to {target}, outside the directory. Copy the file into {directory}."
        )
    return path
