#!/usr/bin/env bash
# Checks the GPU kernels of lightning attention on this machine's GPU, then times them; --help says more.
# Installs nothing and needs no network: the Python that PYTHON names (python3 if none) has to have
# jax with its CUDA plugin (0.10.2 to 0.12), and PyTorch with Triton where --peer is given.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# JAX and PyTorch share the card: neither may take all of it at the start.
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m scripts.bench_gpu "$@"
