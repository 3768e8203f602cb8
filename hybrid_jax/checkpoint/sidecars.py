"""Files that travel with the weights: tokenizer, generation config, chat template, licence."""

import pathlib

from hybrid_jax.checkpoint import manifest
from hybrid_jax.checkpoint.formats import orbax
from hybrid_jax.checkpoint.formats.files import Folder, LocalFolder
from hybrid_jax.checkpoint.formats.training_run import is_training_run

CONFIG_JSON, CONFIG_YAML = "config.json", "config.yaml"
TEMPLATES = "additional_chat_templates"
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py", ".md", ".tiktoken")


# What a training run keeps for itself: versions it ran with, and what it started from.
_OF_RUNS = ("environment.json", "start.json")


def find(folder: Folder) -> list[str]:
    """Names of files of a checkpoint that are neither its weights nor its config.

    Nor its manifest, and, of a training run, its own records.
    """
    known: tuple[str, ...] = (CONFIG_JSON, CONFIG_YAML, orbax.INDEX_NAME, manifest.NAME)
    if isinstance(folder, LocalFolder) and is_training_run(folder.path):
        known += _OF_RUNS
    found = [name for name in folder.names() if name not in known and _travels(name)]
    # What transformers reads there, and no folders below: a link to "." has no end.
    templates = [name for name in folder.names(TEMPLATES) if name.endswith(".jinja")]
    return found + [f"{TEMPLATES}/{name}" for name in templates]


def copy(folder: Folder, directory: pathlib.Path) -> None:
    """Copy them into a directory; ValueError for a link that leads out of their folder."""
    for name in find(folder):
        (directory / name).parent.mkdir(exist_ok=True)
        folder.copy(name, directory / name)


def _travels(name: str) -> bool:
    if name.startswith(".") or name.endswith(".index.json"):
        return False
    return pathlib.PurePath(name).suffix in _SUFFIXES or name.startswith(("LICENSE", "NOTICE"))
