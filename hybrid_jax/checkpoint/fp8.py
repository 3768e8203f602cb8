"""FP8 weights with a scale a block: W[i, j] = stored[i, j] * scale_inv[i // 128, j // 128]."""

import itertools

import ml_dtypes
import numpy as np

from hybrid_jax.checkpoint.boxes import Box
from hybrid_jax.checkpoint.formats.protocol import TensorInfo

SCALE_SUFFIX = "_scale_inv"
FP8_TAGS = ("F8_E4M3", "F8_E5M2")
# Of M2, DeepSeek-V3 and every reader of theirs.
BLOCK = (128, 128)
_LARGEST = 448.0
# Half way to the next value that e4m3fn would have: what is below rounds to its largest.
_ROUNDS_TO_LARGEST = 464.0


def block_size(config: dict, where: str) -> tuple[int, int] | None:
    """Rows and columns of a block from config.json's `quantization_config`; None if not quantised.

    ValueError for any quantisation other than block-scaled FP8.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise ValueError(
            f"{where}: quantization_config must be a mapping; got {quantization!r:.200}."
        )
    method = quantization.get("quant_method")
    if method != "fp8":
        raise ValueError(
            f"{where}: quantization_config has quant_method {method!r:.200}; readable is 'fp8' "
            "with blocks and a weight_scale_inv beside each weight."
        )
    block = quantization.get("weight_block_size")
    if (
        not isinstance(block, list)
        or len(block) != 2
        or any(type(size) is not int or not 0 < size < 1 << 31 for size in block)
    ):
        raise ValueError(
            f"{where}: quantization_config.weight_block_size must be two positive whole numbers; "
            f"got {block!r:.200}."
        )
    kept = quantization.get("modules_to_not_convert")
    if kept is not None and not isinstance(kept, list):
        raise ValueError(
            f"{where}: quantization_config.modules_to_not_convert must be a list of names; got "
            f"{kept!r:.200}."
        )
    return block[0], block[1]


def is_excluded(name: str, config: dict) -> bool:
    """Whether config.json keeps a weight out of the quantisation, by a module in its name."""
    kept = config.get("quantization_config", {}).get("modules_to_not_convert") or ()
    return any(f".{module}." in f".{name}." for module in kept)


def scale_shape(weight: TensorInfo, block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scale of a two-dim weight; the last block of a row or column may be short."""
    rows, columns = weight.shape
    return -(-rows // block[0]), -(-columns // block[1])


def scale_part(rows: np.ndarray, columns: np.ndarray, block: tuple[int, int]) -> Box:
    """The scales that these rows and columns of a weight need; both ascending, neither empty."""
    begin = rows[0] // block[0], columns[0] // block[1]
    return Box(begin, (rows[-1] // block[0] + 1, columns[-1] // block[1] + 1))


def dequantize(
    stored: np.ndarray,
    scale: np.ndarray,
    block: tuple[int, int],
    rows: np.ndarray | None = None,
    columns: np.ndarray | None = None,
) -> np.ndarray:
    """The weight in float32. Despite its name, the stored inverse scale multiplies.

    Of a part of it: `rows` and `columns` say which, and `scale` is what `scale_part` names.
    """
    weight = stored.astype(np.float32)
    if not weight.size:
        return weight
    rows, columns = (
        np.arange(size) if index is None else index
        for size, index in zip(stored.shape, (rows, columns), strict=True)
    )
    block_of_row, block_of_column = rows // block[0], columns // block[1]
    first = np.flatnonzero(np.diff(block_of_row, prepend=-1))
    factors = scale.astype(np.float32)[:, block_of_column - block_of_column[0]]
    for begin, end in itertools.pairwise([*first, len(rows)]):
        weight[begin:end] *= factors[block_of_row[begin] - block_of_row[0]]
    return weight


def quantize(weight: np.ndarray, block: tuple[int, int] = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """A two-dim weight as (float8_e4m3fn, float32 scale a block), the inverse of `dequantize`.

    Scales are powers of two, the smallest that fit. A float keeps its relative precision under any
    scale, so nothing is lost against amax / 448 but part of one octave of numbers near zero; and
    what comes out is exact in bfloat16 too, so that quantising it again gives the same bytes.
    ValueError if a value is NaN or infinite.
    """
    rows, columns = (-(-size // part) for size, part in zip(weight.shape, block, strict=True))
    stored = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    scale = np.ones((rows, columns), np.float32)
    starts = np.arange(0, weight.shape[1], block[1])
    for i in range(rows):
        at = slice(i * block[0], (i + 1) * block[0])
        part = weight[at].astype(np.float32)
        amax = np.maximum.reduceat(np.abs(part).max(axis=0), starts)
        if not np.isfinite(amax).all():
            raise ValueError("FP8 blocks hold finite weights only; this one has NaN or infinity.")
        fraction, exponent = np.frexp(amax / np.float32(_ROUNDS_TO_LARGEST))
        # A scale below the normal numbers would itself be rounded.
        exponent = np.maximum(exponent - (fraction == 0.5), -126)
        scale[i] = np.where(amax > 0, np.ldexp(np.float32(1), exponent), 1)
        part /= np.repeat(scale[i], block[1])[None, : part.shape[1]]
        stored[at] = np.clip(part, -_LARGEST, _LARGEST).astype(stored.dtype)
    return stored, scale
