"""The public names exist, load on first use, and importing the package costs nothing."""

import subprocess
import sys

import jax
import pytest

import hybrid_jax

PROBE = """
import sys, time
start = time.perf_counter()
import hybrid_jax
seconds = time.perf_counter() - start
heavy = {"jax", "flax", "numpy", "optax", "orbax", "torch", "rich", "tyro"} & set(sys.modules)
print(round(seconds, 3), sorted(heavy))
"""


def test_importing_the_package_loads_nothing_heavy():
    result = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True
    )
    seconds, heavy = result.stdout.split(maxsplit=1)
    assert heavy.strip() == "[]"
    # 0.002 s on an idle core; the margin is for a busy one.
    assert float(seconds) < 0.5


@pytest.mark.parametrize("name", ["load", "save", "generate"])
def test_public_functions_resolve(name):
    assert callable(getattr(hybrid_jax, name))
    assert name in dir(hybrid_jax)


def test_presets_are_reachable_from_the_root():
    config = hybrid_jax.presets.get("nano")
    assert config.num_layers > 0


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match=r"no attribute 'lod'; it has .*'load'"):
        _ = hybrid_jax.lod


def test_strict_jax_is_on_in_every_test():
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    assert jax.config.jax_numpy_rank_promotion == "raise"
