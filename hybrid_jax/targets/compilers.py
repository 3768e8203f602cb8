"""Which compilers for absent chips are installed here, and what to install for the others."""

import importlib.metadata
import pathlib
import sys

# Where scripts/environment.sh puts them: beside the environment's packages, not among them, for JAX
# tries every plugin it sees when it starts.
FOLDER = pathlib.Path(sys.prefix) / "compilers"

# Distributions a compilation needs, by platform. cuDNN is what cuDNN attention is compiled with.
WHEELS = {
    "tpu": ("libtpu",),
    "cuda": (
        "jax-cuda13-plugin",
        "jax-cuda13-pjrt",
        "nvidia-cuda-nvcc",
        "nvidia-nvvm",
        "nvidia-cudnn-cu13",
    ),
}


class CompilerMissing(ModuleNotFoundError):
    """The compiler for a chip is not installed; the message names what to install."""


def found(platform: str) -> dict[str, str | None]:
    """The version of each wheel of a platform's compiler; None where it is missing."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        # JAX looks for plugins once, when it is first asked for a device: call this before.
        sys.path.append(str(FOLDER))
    return {name: _version(name) for name in WHEELS[platform]}


def require(platform: str) -> None:
    """Raise CompilerMissing unless every wheel of the platform's compiler is installed."""
    missing = [name for name, version in found(platform).items() if version is None]
    if missing:
        raise CompilerMissing(
            f"Compiling for {platform} without the chip needs {', '.join(missing)}: install the "
            "extra `aot` (pip install -e '.[aot]'), or run AOT=aot bash scripts/test.sh, which "
            f"puts the compilers alone into {FOLDER}."
        )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
