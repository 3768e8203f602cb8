"""The definition keeps the contract."""

from tests.pallas_kernels.grouped_matmul.contract import Contract


class TestReference(Contract):
    implementation = "reference"
