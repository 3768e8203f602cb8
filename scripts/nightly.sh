#!/usr/bin/env bash
# Runs every test marked nightly, each in a process of its own, and appends one JSON line a proof to a
# results file (nightly.jsonl, or the first argument; --jobs N for how many at a time). Start it again to
# go on: what passed at this commit is kept.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

make_environment .venv test-core torch
install_compilers .venv
PYTHONPATH="$PWD/.venv/compilers" exec .venv/bin/python scripts/nightly.py "$@"
