"""A digest tells parameters apart by their values and places, and not by how they are cut."""

import jax
import ml_dtypes
import numpy as np
import pytest

from hybrid_jax.checkpoint.boxes import Box
from hybrid_jax.training.fingerprint import Fingerprint


@pytest.fixture
def params():
    draw = np.random.default_rng(0)
    return {
        "stack": draw.normal(size=(2, 3, 8, 16)).astype(np.float32),
        "scale": draw.normal(size=(8,)).astype(ml_dtypes.bfloat16),
        "one": np.asarray(1.5, np.float32),
    }


def _digest(params, cut=lambda shape: [Box.whole(shape)]):
    found = Fingerprint()
    for name, array in params.items():
        for place in cut(array.shape):
            found.add(name, array.shape, place, array[place.slices])
    forms = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in params.items()}
    return found.digest(forms)


@pytest.mark.parametrize("dim, sizes", [(0, (1, 1)), (2, (5, 3)), (3, (1, 8, 7))])
def test_how_it_is_cut_and_in_which_order_makes_no_difference(params, dim, sizes):
    def cut(shape):
        if len(shape) < 4:
            return [Box.whole(shape)]
        places, begin = [], 0
        for size in sizes:
            low, high = [0] * 4, list(shape)
            low[dim], high[dim] = begin, begin + size
            places.append(Box(tuple(low), tuple(high)))
            begin += size
        return places[::-1]

    assert _digest(params, cut) == _digest(params)


def test_whatever_differs_is_told(params):
    stack = params["stack"]
    flipped, swapped, turned = stack.copy(), stack.copy(), stack.copy()
    flipped.view(np.uint32)[1, 2, 3, 4] ^= 1
    swapped[0, 1], swapped[1, 0] = stack[1, 0], stack[0, 1]
    turned[0, 0, 0] = stack[0, 0, 0, ::-1]
    others = [params | {"stack": each} for each in (flipped, swapped, turned)]
    # Zeros of both signs are other bits.
    others += [params | {"one": np.asarray(each, np.float32)} for each in (0.0, -0.0)]
    others.append(params | {"stack": stack.reshape(3, 2, 8, 16)})
    others.append({("other" if name == "one" else name): a for name, a in params.items()})
    assert len({_digest(each) for each in [params, *others]}) == 1 + len(others)
