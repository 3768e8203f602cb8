"""Array kernels: local arrays in, local arrays out; one op a folder with its implementations."""

# A folder has the name of its op. Importing every op here binds the functions for good: a folder
# imported for the first time later would put its module where the function belongs.
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_swiglu.api import grouped_swiglu
from pallas_kernels.grouped_swiglu.stacked import grouped_swiglu_of_layer
from pallas_kernels.lightning_attention.api import lightning_attention
from pallas_kernels.lightning_attention.decode_api import (
    lightning_decode,
    lightning_decode_slots,
    lightning_extend,
)
from pallas_kernels.lightning_attention.state_api import lightning_state, lightning_state_gradient
from pallas_kernels.softmax_attention.api import softmax_attention
from pallas_kernels.softmax_attention.block import (
    softmax_attention_block,
    softmax_attention_block_gradients,
)

__all__ = [
    "grouped_matmul",
    "grouped_swiglu",
    "grouped_swiglu_of_layer",
    "lightning_attention",
    "lightning_decode",
    "lightning_decode_slots",
    "lightning_extend",
    "lightning_state",
    "lightning_state_gradient",
    "softmax_attention",
    "softmax_attention_block",
    "softmax_attention_block_gradients",
]
