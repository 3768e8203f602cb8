"""Files that travel with the weights: tokenizer, generation config, chat template, licence."""

import pathlib
import shutil

from hybrid_jax.checkpoint import manifest
from hybrid_jax.checkpoint.formats import orbax
from hybrid_jax.checkpoint.formats.links import inside
from hybrid_jax.checkpoint.formats.training_run import is_training_run

CONFIG_JSON, CONFIG_YAML = "config.json", "config.yaml"
TEMPLATES = "additional_chat_templates"
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py", ".md", ".tiktoken")


# What a training run keeps for itself: versions it ran with, and what it started from.
_OF_RUNS = ("environment.json", "start.json")


def find(directory) -> list[pathlib.Path]:
    """Files and folders of a checkpoint directory that are neither its weights nor its config.

    Nor its manifest, and, of a training run, its own records.
    """
    known: tuple[str, ...] = (CONFIG_JSON, CONFIG_YAML, orbax.INDEX_NAME, manifest.NAME)
    if is_training_run(directory):
        known += _OF_RUNS
    return [
        path
        for path in sorted(pathlib.Path(directory).iterdir())
        if path.name not in known and not path.name.startswith(".") and _travels(path)
    ]


def copy(paths, directory: pathlib.Path) -> None:
    """Copy them into a directory; ValueError for a link that leads out of theirs."""
    for path in paths:
        if path.name == TEMPLATES:
            # What transformers reads there, and no folders below: a link to "." has no end.
            (directory / path.name).mkdir()
            for template in sorted(path.glob("*.jinja")):
                name = f"{path.name}/{template.name}"
                shutil.copyfile(inside(path.parent, name), directory / name)
        else:
            shutil.copyfile(inside(path.parent, path.name), directory / path.name)


def _travels(path: pathlib.Path) -> bool:
    if path.is_dir():
        return path.name == TEMPLATES
    if path.name.endswith(".index.json"):
        return False
    return path.suffix in _SUFFIXES or path.name.startswith(("LICENSE", "NOTICE"))
