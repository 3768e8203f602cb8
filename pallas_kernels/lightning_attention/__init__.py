"""Linear attention with one fixed decay a head: a state is carried, time is linear in length."""

from pallas_kernels.lightning_attention.api import lightning_attention, lightning_decode

__all__ = ["lightning_attention", "lightning_decode"]
