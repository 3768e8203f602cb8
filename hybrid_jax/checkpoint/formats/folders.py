"""The folder of a checkpoint, wherever it lies."""

import os
import pathlib

from hybrid_jax.checkpoint.formats.files import Folder, LocalFolder
from hybrid_jax.checkpoint.formats.remote import RemoteFolder, is_remote


def at(path) -> Folder:
    """By its path on this machine, or its address in object storage (`s3://...`).

    ValueError if there is none, or what to install to read it.
    """
    if is_remote(path):
        return RemoteFolder(path)
    directory = pathlib.Path(path)
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise ValueError(f"{directory} {what}; expected a checkpoint directory.")
    return LocalFolder(directory)


def absolute(path) -> str:
    """The same place for a process in another working directory."""
    return os.fspath(path) if is_remote(path) else os.path.abspath(path)
