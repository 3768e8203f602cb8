"""Run each nightly test by itself and record it, one JSON line a proof."""

import json
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit() -> str:
    """The commit under test; marked dirty when uncommitted changes make it name no state."""
    dirty = output("git", "status", "--porcelain", "--untracked-files=no")
    return output("git", "rev-parse", "HEAD") + ("-dirty" if dirty else "")


def proofs() -> list[str]:
    """The nightly tests, by node id."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "nightly"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode not in (0, 5):
        sys.exit(f"collecting the nightly tests failed:\n{found.stdout}{found.stderr}")
    lines = found.stdout.splitlines()
    return [line for line in lines if line.startswith("tests/") and "::" in line]


def prove(test: str) -> str:
    """Run one test; "passed", "failed" or "skipped" (which is no proof)."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder, "report.xml")
        options = ["-q", "-m", "nightly", f"--junit-xml={report}"]
        if subprocess.run([sys.executable, "-m", "pytest", *options, test]).returncode != 0:
            return "failed"
        return "skipped" if xml.parse(report).find(".//skipped") is not None else "passed"


def main() -> int:
    results = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "nightly.jsonl")
    text = results.read_text() if results.exists() else ""
    past = [json.loads(line) for line in text.splitlines()]
    now = commit()
    done = {line["command"] for line in past if (line["commit"], line["result"]) == (now, "passed")}
    failed = 0
    for test in proofs():
        command = f"pytest -m nightly {shlex.quote(test)}"
        if command in done and not now.endswith("-dirty"):
            print(f"proved already: {test}")
            continue
        start = time.monotonic()
        line = {"commit": now, "command": command, "result": prove(test)}
        line["seconds"] = round(time.monotonic() - start, 1)
        failed += line["result"] == "failed"
        with results.open("a") as out:
            out.write(json.dumps(line) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
