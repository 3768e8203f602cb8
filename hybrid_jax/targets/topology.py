"""Devices that exist only for the compiler: lower and compile for them, nothing runs."""

import functools
import os
from typing import Any

from hybrid_jax.targets import chips, compilers

# Without these libtpu asks a metadata server where it is, insists on being the only one of its kind
# on the machine, and prints warnings; it reads them when it is loaded.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Any will do: the topology asked for counts.
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}

# The parts of a GpuTargetConfigProto that differ between chips; the rest is common to all of them.
_GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {scratch_bytes}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2_bytes}
  clock_rate_ghz: {clock_ghz}
  device_memory_size: {memory_bytes}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: {major} minor: 0 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
device_description_str: "{description}"
"""
_COMPUTE_CAPABILITY = {"h100": 9, "h200": 9, "b200": 10}
_L2_BYTES = {"h100": 52_428_800, "h200": 62_914_560, "b200": 132_644_864}


def devices(target: str) -> list[Any]:
    """Compile-only devices of a target: "v5p" (the smallest topology), "v5p:8x8x8", "h100:8".

    A TPU topology counts chips: tpu7x has two devices a chip. A GPU topology is the number of
    devices of one host. A process that calls this for a TPU cannot use a real one afterwards.

    Raises:
      ValueError: there is no such chip or topology.
      CompilerMissing: the compiler's wheels are not installed; the message says what to install.
    """
    chip, topology = chips.parse(target)
    compilers.require(chip.platform)
    return list(_devices(chip, topology))


@functools.cache
def _devices(chip: chips.Chip, topology: str) -> tuple[Any, ...]:
    """Asked for twice, the devices are the same: JAX puts no two topologies in one program."""
    return tuple(_tpu(chip, topology) if chip.platform == "tpu" else _gpu(chip, topology))


def _tpu(chip: chips.Chip, topology: str):
    import jax
    from jax.experimental import topologies

    for name, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # v4 alone has to be told to be one device a chip, as Cloud TPUs are by default.
    options = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.name}:{topology}", **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"The TPU compiler refuses {chip.name}:{topology}: {error}") from error
    return description.devices


def _gpu(chip: chips.Chip, topology: str):
    from jax.experimental import topologies

    if not topology.isdecimal() or int(topology) < 1:
        raise ValueError(
            f"The topology of {chip.name} is a number of devices, as in {chip.name}:8; "
            f"got {topology!r}."
        )
    description = topologies.get_topology_desc(
        platform="cuda",
        topology_name=chip.name,
        topology=f"1x1x{topology}",
        target_config=gpu_config(chip),
    )
    return description.devices


def gpu_config(chip: chips.Chip) -> str:
    """The chip as a GpuTargetConfigProto in text form."""
    return _GPU_CONFIG.format(
        scratch_bytes=chip.scratch_bytes,
        cores=chip.cores,
        bandwidth=int(chip.hbm_bytes_per_second),
        l2_bytes=_L2_BYTES[chip.name],
        clock_ghz=chip.clock_hz / 1e9,
        memory_bytes=chip.hbm_bytes,
        major=_COMPUTE_CAPABILITY[chip.name],
        description=chip.device_kind,
    )
