"""Files that travel with the weights: tokenizer, generation config, chat template, licence."""

import pathlib
import shutil

from hybrid_jax.checkpoint.formats import orbax

CONFIG_JSON, CONFIG_YAML = "config.json", "config.yaml"
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py", ".md", ".tiktoken")


def find(directory) -> list[pathlib.Path]:
    """Files and folders of a checkpoint directory that are neither its weights nor its config."""
    known = (CONFIG_JSON, CONFIG_YAML, orbax.INDEX_NAME)
    return [
        path
        for path in sorted(pathlib.Path(directory).iterdir())
        if path.name not in known and not path.name.startswith(".") and _travels(path)
    ]


def copy(paths, directory: pathlib.Path) -> None:
    """Copy them into a directory."""
    for path in paths:
        if path.is_dir():
            shutil.copytree(path, directory / path.name)
        else:
            shutil.copyfile(path, directory / path.name)


def _travels(path: pathlib.Path) -> bool:
    if path.is_dir():
        return path.name == "additional_chat_templates"
    if path.name.endswith(".index.json"):
        return False
    return path.suffix in _SUFFIXES or path.name.startswith(("LICENSE", "NOTICE"))
