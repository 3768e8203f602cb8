#!/usr/bin/env bash
# Prepares a TPU VM: the environment of the repository this file lies in, and a bucket mounted.
#
#   bash scripts/launch/tpu_vm_setup.sh [BUCKET FOLDER]
#
# It may be run again. What it takes of the images, Ubuntu 22.04 with sudo, could not be tried here.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
source scripts/environment.sh

# A VM that has just started installs updates by itself; wait for it to let go.
install_packages() {
  sudo apt-get update -qq
  sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq "$@"
}

# https://cloud.google.com/storage/docs/cloud-storage-fuse/install
install_gcsfuse() {
  local keyring=/usr/share/keyrings/cloud.google.asc
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$keyring" >/dev/null
  echo "deb [signed-by=$keyring] https://packages.cloud.google.com/apt" \
    "gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  install_packages gcsfuse
}

# Ubuntu 22.04 has Python 3.10 and offers 3.11.
if ! find_python >/dev/null 2>&1; then install_packages python3.11 python3.11-venv; fi
make_environment .venv "" no-torch

if [ $# -eq 2 ]; then
  if ! command -v gcsfuse >/dev/null; then install_gcsfuse; fi
  sudo mkdir -p -- "$2"
  sudo chown "$(id -un)" -- "$2"
  # Checkpoints appear by renaming their directory, which is refused at the limit's default of 0.
  if ! mountpoint -q -- "$2"; then gcsfuse --implicit-dirs --rename-dir-limit=200000 "$1" "$2"; fi
fi
