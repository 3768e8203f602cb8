"""Lightning attention for NVIDIA GPUs, in Pallas Mosaic GPU."""

from pallas_kernels.lightning_attention.pallas_gpu import decode
from pallas_kernels.lightning_attention.pallas_gpu.passes import backward, forward, why_not

__all__ = ["backward", "decode", "forward", "why_not"]
