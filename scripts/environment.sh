# Makes the virtual environment the other scripts run in; sourced by them, never run.
#
#   make_environment FOLDER EXTRA TORCH     EXTRA: "" or an extra of setup.cfg; TORCH: torch | no-torch
#
# Afterwards FOLDER/bin/python has the project installed in place. A second call with nothing changed
# takes a fraction of a second. PYTHON names the interpreter to build on, if one is to be preferred.

# The versions setup.cfg supports, as a test any Python can answer.
PYTHON_IS_FIT='import sys, venv, ensurepip; sys.exit(not sys.version_info >= (3, 11))'
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { printf '== %s\n' "$*" >&2; }

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python python3.11 python3.12 python3.13 python3.14 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[1-9]*/bin/python; do
    if "$candidate" -c "$PYTHON_IS_FIT" >/dev/null 2>&1; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  say "No Python 3.11 or newer with venv and ensurepip found. Install one (Debian, Ubuntu:" \
    "apt install python3 python3-venv) or name it: PYTHON=/path/to/python3 bash $0"
  return 1
}

# The jax extra for the accelerator of this machine; empty for none.
accelerator_extra() {
  local device
  if nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo cuda
    return
  fi
  # Google's PCI vendor id with the device ids of TPU v2/3, v4, v5e, v5p, v6e and 7x, as JAX knows them.
  for device in /sys/bus/pci/devices/*; do
    if [ "$(cat "$device/vendor" 2>/dev/null)" = 0x1ae0 ]; then
      case "$(cat "$device/device" 2>/dev/null)" in
        0x0027 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076) echo tpu && return ;;
      esac
    fi
  done
  if compgen -G '/dev/accel*' >/dev/null; then echo tpu; fi
}

# A requirement of the `test` extra, by name, as setup.cfg pins it.
pinned() {
  "$1/bin/python" - "$2" <<'PYTHON'
import configparser, sys
setup = configparser.ConfigParser()
setup.read("setup.cfg")
wanted = sys.argv[1]
print(*(line for line in setup["options.extras_require"]["test"].split() if line.startswith(wanted)))
PYTHON
}

has_pinned_torch() {
  "$1/bin/python" - "$2" >/dev/null 2>&1 <<'PYTHON'
import importlib.metadata, sys
wanted = sys.argv[1].partition("==")[2]
version = importlib.metadata.version("torch")
importlib.metadata.version("transformers")
sys.exit(version.partition("+")[0] != wanted)
PYTHON
}

# Says whether the plain requirement resolves, here, to a build without CUDA. Only metadata may be read
# for that: the size limit ends pip before it has pulled a wheel of gigabytes to look inside.
resolves_to_cpu_build() {
  local report
  report=$(ulimit -f 16384 && "$1/bin/python" -m pip install --quiet --retries 1 --dry-run \
    --no-deps --ignore-installed --report - "$2" 2>/dev/null) || return 1
  "$1/bin/python" -c '
import json, sys
needs = [n for p in json.load(sys.stdin)["install"] for n in p["metadata"].get("requires_dist", ())]
sys.exit(any("nvidia" in n or "cuda" in n or "triton" in n for n in needs if "extra ==" not in n))
' <<<"$report"
}

# PyTorch is wanted for comparison only, as a CPU build of the pinned version: from the configured
# index or wheel folders, else from PyTorch's own CPU index. Without one everything else still works.
install_torch() {
  local python="$1/bin/python" torch transformers
  torch=$(pinned "$1" torch==)
  transformers=$(pinned "$1" transformers)
  if has_pinned_torch "$1" "$torch"; then return; fi
  # `+cpu` is how an index that offers both tells them apart, so this request can never mean CUDA.
  if "$python" -m pip install --quiet --retries 1 "$torch+cpu" 2>/dev/null; then
    say "PyTorch: $torch+cpu from the configured index or wheel folder."
  elif resolves_to_cpu_build "$1" "$torch" && "$python" -m pip install --quiet "$torch"; then
    say "PyTorch: $torch, a CPU build, from the configured index or wheel folder."
  elif "$python" -m pip install --quiet --retries 0 --timeout 10 \
    --extra-index-url "$TORCH_CPU_INDEX" "$torch+cpu" 2>/dev/null; then
    say "PyTorch: $torch+cpu from $TORCH_CPU_INDEX."
  else
    say "Left out: PyTorch and what compares with it, for no CPU build of $torch is within reach; to" \
      "get it: $python -m pip install '$torch+cpu' '$transformers' --extra-index-url $TORCH_CPU_INDEX"
    return
  fi
  "$python" -m pip install --quiet "$transformers"
}

# What an installation depends on; the same line means there is nothing to do.
fingerprint() {
  "$1/bin/python" - "$2" <<'PYTHON'
import hashlib, pathlib, sys
text = b"".join(pathlib.Path(name).read_bytes() for name in ("setup.cfg", "pyproject.toml"))
print(hashlib.sha256(text).hexdigest()[:16], sys.version.split()[0], pathlib.Path.cwd(), sys.argv[1])
PYTHON
}

install_project() {
  local python="$1/bin/python" extras wanted
  extras=$(printf '%s\n' "$2" "$(accelerator_extra)" | grep . | paste -sd, -) || true
  wanted=$(fingerprint "$1" "$extras")
  if grep -qxF "$wanted" "$1/installed" 2>/dev/null; then return; fi
  say "Installing hybrid-jax${extras:+[$extras]} into $1 (a few minutes the first time)."
  "$python" -m pip install --quiet --upgrade-strategy only-if-needed -e ".${extras:+[$extras]}"
  printf '%s\n' "$wanted" >>"$1/installed"
}

# What the `aot` extra means for the jax installed here, wheel by wheel.
compiler_wheels() {
  "$1/bin/python" - <<'PYTHON'
import configparser, importlib.metadata
setup = configparser.ConfigParser()
setup.read("setup.cfg")
jax = importlib.metadata.version("jax")
pins = [r.partition(";")[0].strip() for r in importlib.metadata.requires("jax")]
libtpu = next(pin for pin in pins if pin.startswith("libtpu"))
for wheel in setup["options.extras_require"]["aot"].split():
    if wheel.startswith("jax["):
        print(libtpu, f"jax-cuda13-plugin=={jax}", f"jax-cuda13-pjrt=={jax}", sep="\n")
    else:
        print(wheel)
PYTHON
}

# The compilers for absent TPUs and GPUs go into FOLDER/compilers, where hybrid_jax/targets finds them
# and JAX does not: it would try each of them whenever it starts, and complain of what is missing.
install_compilers() {
  local wheels
  mapfile -t wheels < <(compiler_wheels "$1")
  if [ "$(cat "$1/compilers/installed" 2>/dev/null)" = "${wheels[*]}" ]; then return; fi
  say "Installing compilers for TPUs and NVIDIA GPUs into $1/compilers (2 GB): ${wheels[*]}"
  rm -rf "$1/compilers"
  "$1/bin/python" -m pip install --quiet --no-deps --target "$1/compilers" "${wheels[@]}"
  echo "${wheels[*]}" >"$1/compilers/installed"
}

make_environment() {
  local python
  # Two scripts started at once would install into each other's half-made environment.
  exec 9>"$1.lock"
  if command -v flock >/dev/null; then flock 9; fi
  # Settings of the caller's shell that would send pip or Python elsewhere.
  unset PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  if ! "$1/bin/python" -c "$PYTHON_IS_FIT" 2>/dev/null; then
    python=$(find_python)
    say "Making $1 with $("$python" --version) ($python)."
    "$python" -m venv --clear "$1"
  fi
  # Environments made by other tools come without pip.
  if [ ! -x "$1/bin/pip" ]; then "$1/bin/python" -m ensurepip --default-pip >/dev/null; fi
  # PyTorch first: the test extra would otherwise resolve to whatever build the index prefers.
  if [ "$3" = torch ]; then install_torch "$1"; fi
  install_project "$1" "$2"
  exec 9<&-
}
