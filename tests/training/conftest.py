"""What tests of whole runs share: programs that are compiled once."""

import jax
import pytest


@pytest.fixture(scope="session")
def compilations(tmp_path_factory):
    """A folder for compiled programs."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled_once(compilations):
    """Runs of a module compile the same programs: keep them on disk, for other processes too.

    Gives the environment variables that do the same in these.
    """
    settings = {
        "jax_compilation_cache_dir": str(compilations),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield {name.upper(): str(value) for name, value in settings.items()}
    for name, value in before.items():
        jax.config.update(name, value)
