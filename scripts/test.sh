#!/usr/bin/env bash
# From a fresh machine with Python 3.11 or newer to a tested checkout: lint, import contracts, tests.
# Arguments go to pytest: bash scripts/test.sh tests/model -k decay
# VENV names another environment than .venv; TORCH=no-torch leaves PyTorch out of it; AOT=aot installs
# the compilers of TPUs and NVIDIA GPUs too (2 GB) and then also compiles every kernel for them.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
venv=${VENV:-.venv}

# How many at a time where each holds up to $1 GiB: tests compile more than they compute, which keeps
# one core busy each.
workers() {
  local cores gibibytes
  cores=$(nproc 2>/dev/null || echo 1)
  gibibytes=$(awk '/MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo 2>/dev/null || echo 4)
  echo $((cores < gibibytes / $1 ? cores : gibibytes / $1))
}

make_environment "$venv" test-core "${TORCH:-torch}"
say "Lint, types and import contracts"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check --quiet .
"$venv/bin/mypy"
"$venv/bin/lint-imports" --no-logo
say "Tests"
"$venv/bin/python" -m pytest --numprocesses "$(workers 4)" --dist loadscope \
  --no-loadscope-reorder --durations 15 "$@"
if [ "${AOT:-}" = aot ]; then
  install_compilers "$venv"
  say "Tests that compile for TPUs and NVIDIA GPUs that are not here"
  # A compiler for a pod takes up to 6 GiB.
  PYTHONPATH="$PWD/$venv/compilers" CI=true "$venv/bin/python" -m pytest \
    --numprocesses "$(workers 8)" --dist loadscope -m "aot and not nightly" --at-least 10 --durations 15
fi
