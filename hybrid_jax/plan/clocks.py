"""How long one operation takes: the compiler's estimate, a kernel's schedule, or a roofline."""

import math
import re

from hybrid_jax.plan import hlo, kernels
from hybrid_jax.plan.timeline import Work
from hybrid_jax.targets.chips import Chip

KERNEL = "kernel "
MATRIX, ELEMENTWISE = "matrix products", "elementwise and copies"
_KERNELS = ("tpu_custom_call", "mosaic_gpu", "__cudnn")


class TpuClock:
    """The TPU compiler's `estimated_cycles`; kernels by name from their schedules."""

    def __init__(self, program: hlo.Program, chip: Chip, fill: float):
        """`fill` is as `kernels.seconds` has it."""
        self._program, self._chip, self._fill = program, chip, fill

    def __call__(self, computation: str, instruction: hlo.Instruction) -> Work:
        kind = _kind(self._program, instruction)
        if kind.startswith(KERNEL):
            known = kernels.seconds(
                self._program, computation, instruction, self._chip.name, self._fill
            )
            if known is not None:
                derived = kind.removeprefix(KERNEL).startswith(kernels.DERIVED)
                return Work(known, kind, "model" if derived else "schedule")
        cycles = instruction.attribute(r'estimated_cycles":"?(\d+)')
        # The largest whole number stands for an estimate that overflowed.
        if cycles and int(cycles) < 1 << 62:
            return Work(int(cycles) / self._chip.clock_hz, kind, "compiler")
        return Work(_roofline(self._program, self._chip, computation, instruction), kind, "model")


class RooflineClock:
    """FLOPs at the peak rate or bytes at that of the memory, whichever takes longer."""

    def __init__(self, program: hlo.Program, chip: Chip):
        self._program, self._chip = program, chip

    def __call__(self, computation: str, instruction: hlo.Instruction) -> Work:
        seconds = _roofline(self._program, self._chip, computation, instruction)
        return Work(seconds, _kind(self._program, instruction), "model")


def _kind(program: hlo.Program, instruction: hlo.Instruction) -> str:
    if instruction.opcode == "custom-call":
        target = instruction.attribute(r'custom_call_target="([^"]*)"') or ""
        if target.startswith(_KERNELS):
            return KERNEL + kernels.stem(instruction.name)
        return MATRIX if "gemm" in target or "matmul" in target else ELEMENTWISE
    inner = program.inside(instruction.called[0]) if instruction.opcode == "fusion" else ()
    products = ("dot", "convolution")
    has_product = instruction.opcode in products or any(each.opcode in products for each in inner)
    return MATRIX if has_product else ELEMENTWISE


def _roofline(program: hlo.Program, chip: Chip, computation: str, instruction) -> float:
    bandwidth, peak = chip.device_hbm_bytes_per_second, chip.bf16_flops / chip.devices
    flops = 0.0
    if instruction.opcode in ("dot", "custom-call"):
        flops = _flops(program, computation, instruction)
    elif instruction.opcode == "fusion":
        flops = sum(
            _flops(program, called, each)
            for called in instruction.called
            for each in program.computations.get(called, ())
            if each.opcode == "dot"
        )
    return max(flops / peak, _moved(program, computation, instruction) / bandwidth)


def _moved(program: hlo.Program, computation: str, instruction) -> float:
    """Bytes read and written; of an operand that is picked from, no more than is made of it."""
    read = program.operand_bytes(computation, instruction)
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * (read[1] if len(read) > 1 else 0)
    if instruction.opcode == "custom-call":
        target = instruction.attribute(r'custom_call_target="([^"]*)"') or ""
        if target in ("AllocateBuffer", "AssumeGatherIndicesInBound"):
            return 0.0
        return float(sum(read) + instruction.bytes)
    if "dynamic-update-slice" in instruction.name or "scatter" in instruction.name:
        # In place: the largest operand is what is written into.
        return 2.0 * (sum(read) - max(read, default=0))
    return float(sum(min(size, instruction.bytes) for size in read) + instruction.bytes)


def _flops(program: hlo.Program, computation: str, instruction) -> float:
    """Of a product of matrices: two for each element of the result and of the contracted dims."""
    contracted = instruction.attribute(r"lhs_contracting_dim(?:ension)?s\"?[=:][\[{]([^\]}]*)[\]}]")
    known = program.defined[computation]
    if contracted is None or not instruction.operands or instruction.operands[0] not in known:
        return 0.0
    lhs = hlo.dims(known[instruction.operands[0]].shape)
    size = math.prod(lhs[int(dim)] for dim in re.findall(r"\d+", contracted))
    return 2.0 * size * math.prod(hlo.dims(instruction.shape))
