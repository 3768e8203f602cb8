"""Linear attention with one fixed decay a head: a state is carried, time is linear in length."""

from pallas_kernels.lightning_attention.api import lightning_attention
from pallas_kernels.lightning_attention.decode_api import (
    lightning_decode,
    lightning_decode_slots,
    lightning_extend,
)
from pallas_kernels.lightning_attention.state_api import lightning_state, lightning_state_gradient

__all__ = [
    "lightning_attention",
    "lightning_decode",
    "lightning_decode_slots",
    "lightning_extend",
    "lightning_state",
    "lightning_state_gradient",
]
