"""jax.lax.ragged_dot keeps the contract (here in XLA's dense expansion; natively on TPU)."""

from tests.pallas_kernels.grouped_matmul.contract import Contract


class TestRaggedDot(Contract):
    implementation = "ragged_dot"
