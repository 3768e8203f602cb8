"""Run each nightly test by itself and record it, one JSON line a proof."""

import argparse
import concurrent.futures
import json
import os
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


def prove(test: str) -> tuple[str, float, str]:
    """Run one test: "passed", "failed" or "skipped" (which is no proof), seconds, what it said."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder, "report.xml")
        options = ["-q", "-m", "nightly", f"--junit-xml={report}", test]
        run = subprocess.run(
            [sys.executable, "-m", "pytest", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        result = "failed"
        if run.returncode == 0:
            skipped = xml.parse(report).find(".//skipped") is not None
            result = "skipped" if skipped else "passed"
    return result, round(time.monotonic() - start, 1), run.stdout


def most_jobs() -> int:
    """Compiling for a pod takes up to 6 GiB and both of two cores for part of the time."""
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return max(1, min(os.cpu_count() or 1, gibibytes // 8))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", default="nightly.jsonl", type=pathlib.Path)
    parser.add_argument(
        "--jobs", type=int, default=most_jobs(), help="tests at a time (%(default)s)"
    )
    args = parser.parse_args()
    results = args.results
    text = results.read_text() if results.exists() else ""
    past = [json.loads(line) for line in text.splitlines()]
    now = commit()
    done = {line["command"] for line in past if (line["commit"], line["result"]) == (now, "passed")}
    left = []
    for test in proofs():
        if f"pytest -m nightly {shlex.quote(test)}" in done and not now.endswith("-dirty"):
            print(f"proved already: {test}")
        else:
            left.append(test)
    failed = 0
    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
    running = {pool.submit(prove, test): test for test in left}
    try:
        for number, ended in enumerate(concurrent.futures.as_completed(running), 1):
            test = running[ended]
            result, seconds, said = ended.result()
            print(f"[{number}/{len(left)}] {result} in {seconds:.0f} s: {test}", flush=True)
            if result == "failed":
                failed += 1
                print(said, flush=True)
            command = f"pytest -m nightly {shlex.quote(test)}"
            line = {"commit": now, "command": command, "result": result, "seconds": seconds}
            with results.open("a") as out:
                out.write(json.dumps(line) + "\n")
    finally:
        # After Ctrl-C nothing new is begun.
        pool.shutdown(cancel_futures=True)
    print(f"{len(left) - failed} of {len(left)} passed or were skipped; {results}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
