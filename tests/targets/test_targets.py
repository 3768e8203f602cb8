"""Targets are found by name, refused with the way out, and compile without the chip."""

import jax
import jax.numpy as jnp
import pytest

from hybrid_jax import targets
from hybrid_jax.targets import compilers
from tests import aot


@pytest.mark.parametrize("chip", targets.CHIPS.values(), ids=targets.CHIPS)
def test_every_chip_is_whole_and_says_where_its_figures_are_from(chip):
    assert chip.cores % chip.devices == 0
    assert chip.sources
    # The ridge of every chip since 2020 lies here; a unit mistaken by 1000 does not.
    assert 150 < chip.bf16_flops / chip.hbm_bytes_per_second < 600


@pytest.mark.parametrize(
    ("target", "message"),
    [("v9", "a chip out of v4, v5e"), ("v5p:", "no target 'v5p:'"), ("v5p8", "no target")],
)
def test_an_unknown_target_says_what_there_is(target, message):
    with pytest.raises(ValueError, match=message):
        targets.devices(target)


def test_a_missing_compiler_names_what_to_install(monkeypatch):
    monkeypatch.setattr(compilers, "_version", lambda name: None)
    with pytest.raises(targets.CompilerMissing, match=r"needs libtpu: .*aot"):
        targets.devices("v5p")
    with pytest.raises(targets.CompilerMissing, match=r"nvidia-cuda-nvcc.*scripts/test.sh"):
        targets.devices("h100")


@pytest.mark.aot
@pytest.mark.parametrize("name", targets.CHIPS)
def test_a_program_compiles_for_the_absent_chip(name):
    chip = targets.CHIPS[name]
    matrix = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
    compiled = aot.compile_for(name, lambda x: x @ x, matrix)
    assert compiled.memory_analysis().argument_size_in_bytes == 256 * 256 * 2
    devices = aot.devices(name)
    assert devices[0].device_kind == chip.device_kind
    if chip.platform == "tpu":
        assert devices[0].num_cores == chip.cores_per_device


@pytest.mark.aot
def test_a_topology_has_the_devices_it_says():
    assert len(aot.devices("tpu7x:2x2x1")) == 8
    assert len(aot.devices("v6e:4x4")) == 16
    assert len(aot.devices("h100:8")) == 8
    with pytest.raises(ValueError, match="refuses v5p:2x3"):
        targets.devices("v5p:2x3")
    with pytest.raises(ValueError, match="a number of devices"):
        targets.devices("h100:2x2")
