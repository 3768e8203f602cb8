"""Find NaN and infinity by their bits, in pieces: a check costs no second copy of a tensor."""

import numpy as np

from hybrid_jax.checkpoint.formats import protocol

# dtype tag -> (integer view, mask of the bits that are all set in a value that is not finite).
_EXPONENTS: dict[str, tuple[type, int]] = {
    "F64": (np.uint64, 0x7FF0000000000000),
    "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7C),
    # e4m3fn has no infinity; its NaN is all seven bits.
    "F8_E4M3": (np.uint8, 0x7F),
}
_PIECE = 1 << 20


def count_nonfinite(array: np.ndarray) -> int:
    """How many values are NaN or infinite; 0 for integers."""
    tag = protocol.TAGS.get(array.dtype)
    if tag not in _EXPONENTS:
        return 0
    view, ones = _EXPONENTS[tag]
    mask = view(ones)
    bits: np.ndarray = np.ascontiguousarray(array).reshape(-1).view(view)
    pieces = (bits[i : i + _PIECE] for i in range(0, bits.size, _PIECE))
    return sum(int(np.count_nonzero((piece & mask) == mask)) for piece in pieces)


def check(array: np.ndarray, name: str, where: str) -> None:
    """ValueError naming the tensor and its file if it holds NaN or infinity."""
    bad = count_nonfinite(array)
    if bad:
        raise ValueError(
            f"{where}: tensor {name!r} holds {bad} values of {array.size} that are NaN or "
            "infinite. The weights are damaged or their training diverged; check_finite=False in "
            "Python and `hybrid-jax convert --allow-nonfinite` take them as they are."
        )
