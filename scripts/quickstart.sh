#!/usr/bin/env bash
# From a fresh machine with Python 3.11 or newer to a trained, exported and compared model.
# Arguments go to scripts/quickstart.py; --help lists them.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

make_environment .venv "" torch
exec .venv/bin/python scripts/quickstart.py "$@"
