"""What each chip can do at most, with sources. Ceilings, not promises."""

import dataclasses
import typing

# Rates, capacities and core counts of TPUs as jax/_src/pallas/mosaic/tpu_info.py has them (jax
# 0.10.2), which repeats the tables of https://cloud.google.com/tpu/docs/system-architecture-tpu-vm.
_TPU_INFO = "jax 0.10.2, jax/_src/pallas/mosaic/tpu_info.py"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip as it is sold; `devices` is how many devices JAX makes of it."""

    name: str
    platform: typing.Literal["tpu", "cuda"]
    """As jax.lax.platform_dependent calls it."""
    device_kind: str
    """`jax.Device.device_kind`, of a real device and of a compile-only one."""
    devices: int
    cores: int
    """TensorCores, or streaming multiprocessors."""
    bf16_flops: float
    """Dense bfloat16 products with float32 sums, per second."""
    hbm_bytes_per_second: float
    hbm_bytes: int
    scratch_bytes: int
    """VMEM of one TensorCore, or shared memory of one multiprocessor."""
    clock_hz: float
    """Clock of a core. One bundle of instructions a cycle on TPUs."""
    topology: str
    """The smallest topology that compiles; `name:topology` is a target."""
    sources: tuple[str, ...]

    @property
    def cores_per_device(self) -> int:
        """2 where one JAX device is both TensorCores of a chip ("megacore")."""
        return self.cores // self.devices

    @property
    def device_hbm_bytes_per_second(self) -> float:
        """A device's share of the memory bandwidth."""
        return self.hbm_bytes_per_second / self.devices


_TPUS = (
    Chip(
        name="v4", platform="tpu", device_kind="TPU v4", devices=1, cores=2,
        bf16_flops=275e12, hbm_bytes_per_second=1.23e12, hbm_bytes=34_400_000_000,
        scratch_bytes=16 << 20, clock_hz=1.05e9, topology="2x2x1",
        sources=(_TPU_INFO, "clock: arXiv 2304.01433, table 4"),
    ),
    Chip(
        name="v5e", platform="tpu", device_kind="TPU v5 lite", devices=1, cores=1,
        bf16_flops=197e12, hbm_bytes_per_second=0.82e12, hbm_bytes=17_200_000_000,
        scratch_bytes=128 << 20, clock_hz=1.5e9, topology="2x2",
        sources=(_TPU_INFO, "clock: FLOP/s over 4 units x 128 x 128 x 2 a cycle"),
    ),
    Chip(
        name="v5p", platform="tpu", device_kind="TPU v5", devices=1, cores=2,
        bf16_flops=459e12, hbm_bytes_per_second=2.46e12, hbm_bytes=103_000_000_000,
        scratch_bytes=64 << 20, clock_hz=1.75e9, topology="2x2x1",
        sources=(_TPU_INFO, "clock: FLOP/s over 2 x 4 units x 128 x 128 x 2 a cycle"),
    ),
    # The compiler's own estimate of a large product, 455,881 FLOP a cycle on v6e and 417,332 on a
    # tpu7x core, fits two rows of 256 a cycle in each of the two units and no lower figure.
    Chip(
        name="v6e", platform="tpu", device_kind="TPU v6 lite", devices=1, cores=1,
        bf16_flops=920e12, hbm_bytes_per_second=1.64e12, hbm_bytes=34_400_000_000,
        scratch_bytes=128 << 20, clock_hz=1.75e9, topology="2x2",
        sources=(_TPU_INFO, "clock: FLOP/s over 2 units x 2 x 256 x 256 x 2 a cycle"),
    ),
    Chip(
        name="tpu7x", platform="tpu", device_kind="TPU7x", devices=2, cores=2,
        bf16_flops=2310e12, hbm_bytes_per_second=7.40e12, hbm_bytes=206_000_000_000,
        scratch_bytes=64 << 20, clock_hz=2.2e9, topology="2x2x1",
        sources=(_TPU_INFO, "clock: FLOP/s over 2 x 2 units x 2 x 256 x 256 x 2 a cycle"),
    ),
)  # fmt: skip

_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper, table of SXM5"
_GPUS = (
    Chip(
        name="h100", platform="cuda", device_kind="NVIDIA H100 80GB HBM3", devices=1, cores=132,
        bf16_flops=989e12, hbm_bytes_per_second=3.35e12, hbm_bytes=84_978_434_048,
        scratch_bytes=233_472, clock_hz=1.98e9, topology="1",
        sources=(_HOPPER, "memory and clock as the driver reports them"),
    ),
    Chip(
        name="h200", platform="cuda", device_kind="NVIDIA H200", devices=1, cores=132,
        bf16_flops=989e12, hbm_bytes_per_second=4.80e12, hbm_bytes=141_000_000_000,
        scratch_bytes=233_472, clock_hz=1.98e9, topology="1",
        sources=(_HOPPER, "memory: NVIDIA H200 datasheet"),
    ),
    Chip(
        name="b200", platform="cuda", device_kind="NVIDIA B200", devices=1, cores=148,
        bf16_flops=2250e12, hbm_bytes_per_second=8.0e12, hbm_bytes=180_000_000_000,
        scratch_bytes=233_472, clock_hz=1.965e9, topology="1",
        sources=("NVIDIA DGX B200 datasheet, an eighth of the system",),
    ),
)  # fmt: skip

CHIPS = {chip.name: chip for chip in (*_TPUS, *_GPUS)}


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of one JAX device of this kind; None for a kind that is not in the table."""
    for chip in CHIPS.values():
        if chip.device_kind == device_kind:
            return chip.bf16_flops / chip.devices
    return None


def parse(target: str) -> tuple[Chip, str]:
    """The chip and the topology of "v5p", "v5p:2x2x1", "h100:8"; ValueError says what there is."""
    name, colon, topology = target.partition(":")
    if name not in CHIPS or (colon and not topology):
        raise ValueError(
            f"There is no target {target!r}; a target is a chip out of {', '.join(CHIPS)}, and "
            "for more than one host's devices a topology: v5p:2x2x1, h100:8."
        )
    return CHIPS[name], topology or CHIPS[name].topology
