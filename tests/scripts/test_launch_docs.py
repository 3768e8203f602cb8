"""The commands of the documentation are understood by the launchers they name."""

import re
import shlex

import pytest

from scripts.launch import gke, local, tpu_vm
from tests.architecture.source import ROOT

LAUNCHERS = {"local": local, "gke": gke, "tpu_vm": tpu_vm}


def commands():
    """Name of the launcher and words of every command in a block of shell code."""
    for document in ("README.md", "docs/scaling.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", "").splitlines():
                if found := re.match(r"python scripts/launch/(\w+)\.py (.*)", line):
                    yield found[1], shlex.split(found[2])


@pytest.mark.parametrize(("name", "words"), [*commands()])
def test_every_command_has_a_dry_run(name, words, capsys):
    """Sizes, meshes and options included; no word is a program's own yet."""
    options = [word for word in words[: words.index("--")] if word != "--dry-run"]
    rest = words[words.index("--") :]
    assert LAUNCHERS[name].main([*options, "--dry-run", *rest]) == 0
    assert rest[1] == "train" and capsys.readouterr().out


def test_every_launcher_is_shown():
    assert {name for name, _ in commands()} == set(LAUNCHERS)
