"""Grouped matmul for TPUs, in Pallas Mosaic TPU: only tiles with rows are multiplied."""

from pallas_kernels.grouped_matmul.pallas_tpu.products import (
    forward,
    input_gradient,
    weight_gradient,
    why_not,
)

__all__ = ["forward", "input_gradient", "weight_gradient", "why_not"]
