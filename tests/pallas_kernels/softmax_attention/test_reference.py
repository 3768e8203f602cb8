"""The definition keeps the contract."""

from tests.pallas_kernels.softmax_attention import contract


class TestReference(contract.Contract):
    """Every score at once."""

    implementation = "reference"
