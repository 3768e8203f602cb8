"""Lightning attention for TPUs, in Pallas Mosaic TPU."""

from pallas_kernels.lightning_attention.pallas_tpu import decode
from pallas_kernels.lightning_attention.pallas_tpu.passes import (
    backward,
    forward,
    state_backward,
    state_forward,
    why_not,
)

__all__ = ["backward", "decode", "forward", "state_backward", "state_forward", "why_not"]
