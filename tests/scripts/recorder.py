"""Programs of a platform that is not here, put on PATH: they record how they were called."""

import json
import os
import pathlib
import stat
import sys

_PROGRAM = """#!{python}
import json, os, sys
call = {{"argv": sys.argv[1:], "environment": dict(os.environ)}}
with open({calls!r}, "a") as file:
    file.write(json.dumps(call) + "\\n")
{then}
"""


class Recorder:
    """Fake programs in a folder that comes first on PATH: the real ones are out of reach."""

    def __init__(self, folder: pathlib.Path, monkeypatch):
        self.bin = folder / "bin"
        self._calls = folder / "calls"
        for path in (self.bin, self._calls):
            path.mkdir()
        monkeypatch.setenv("PATH", f"{self.bin}:{os.environ['PATH']}")

    def add(self, name: str, then: str = "") -> None:
        """A program that records its calls, then does this in Python."""
        program = self.bin / name
        calls = str(self._calls / name)
        program.write_text(_PROGRAM.format(python=sys.executable, calls=calls, then=then))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def calls(self, name: str) -> list[dict]:
        """Arguments and environment of each call, in order."""
        file = self._calls / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
