"""Softmax attention on rows split over 2, 4 and 8 devices is that on one: outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.model.parallel import rows

# float32 sums of some dozens of terms in another order, relative to the largest of the array: 1e-6
# was seen.
TOLERANCE = 1e-5
# Partial results rounded to 8 bits as they leave a block; dk and dv of 4 blocks, each rounded.
BF16_TOLERANCE = 2**-6

DOCUMENTS = {
    "unpacked": None,
    # At 8 devices of 8 tokens: the first crosses a border, the second spans 5 devices, and one
    # device and more is padding; then a document inside a device, one of a token, and padding.
    "packed": [(1, 11), (2, 27), (0, 14), (3, 5), (4, 1), (0, 6)],
    # An id that comes back sees its first part, on another device, and nothing between.
    "returning": [(1, 24), (2, 16), (1, 24)],
}


@pytest.fixture(scope="module")
def expected():
    """Inputs by name, and their results on one device, calculated once."""
    inputs = {name: rows.make_inputs(documents=ids) for name, ids in DOCUMENTS.items()}
    return {name: (x, rows.on_one_device(*x)) for name, x in inputs.items()}


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("method", ["ring", "all_gather", "heads"])
@pytest.mark.parametrize("name", ["unpacked", "packed"])
def test_any_number_of_devices_gives_the_results_of_one(expected, method, name, size):
    inputs, results = expected[name]
    found = rows.run(rows.make_mesh(sequence=size), inputs, method=method)
    rows.assert_close(found, results, TOLERANCE)


def test_a_document_that_returns_sees_its_first_part_on_other_devices(expected):
    inputs, results = expected["returning"]
    found = rows.run(rows.make_mesh(sequence=4), inputs)
    rows.assert_close(found, results, TOLERANCE)


def test_three_devices_and_one_are_no_special_case():
    inputs = rows.make_inputs(T=48, documents=[(1, 20), (2, 28)])
    results = rows.on_one_device(*inputs)
    for size in (1, 3):
        found = rows.run(rows.make_mesh(sequence=size), inputs)
        rows.assert_close(found, results, TOLERANCE)


@pytest.mark.parametrize("method", ["ring", "all_gather", "heads"])
def test_rows_and_heads_may_be_split_too(expected, method):
    inputs, results = expected["packed"]
    found = rows.run(rows.make_mesh(data=2, sequence=2, tensor=2), inputs, method=method)
    rows.assert_close(found, results, TOLERANCE)


def test_keys_that_every_tensor_device_holds_get_the_gradients_of_all_heads():
    # One key-value head, too few to split: dk and dv are sums over the axis it is not split over.
    inputs = rows.make_inputs(G=1, documents=DOCUMENTS["packed"])
    kv_spec = PartitionSpec(("data", "fsdp"), "sequence")
    found = rows.run(rows.make_mesh(fsdp=2, sequence=2, tensor=2), inputs, kv_spec)
    rows.assert_close(found, rows.on_one_device(*inputs), TOLERANCE)


def test_bfloat16_loses_no_more_than_its_own_rounding():
    kwargs = dict(documents=DOCUMENTS["packed"])
    inputs = rows.make_inputs(dtype=jnp.bfloat16, **kwargs)
    exact = inputs._replace(
        **{name: getattr(inputs, name).astype(jnp.float32) for name in ("q", "k", "v", "d_out")}
    )
    found = rows.run(rows.make_mesh(sequence=4), inputs)
    assert {x.dtype.name for x in found} == {"bfloat16"}
    rows.assert_close(found, rows.on_one_device(*exact), BF16_TOLERANCE)


def test_scores_too_large_for_exp_merge_without_nan(expected):
    inputs, _ = expected["packed"]
    inputs = inputs._replace(q=inputs.q * 1e3, k=inputs.k * 1e3)
    found = rows.run(rows.make_mesh(sequence=4), inputs)
    assert all(np.isfinite(x).all() for x in found)
    padding = np.asarray(inputs.ids) == 0
    assert all((np.asarray(x)[padding] == 0).all() for x in found)


def test_under_scan_and_checkpoint_the_gradient_is_the_same(expected):
    inputs, _ = expected["packed"]
    mesh = rows.make_mesh(sequence=2)

    def layer(q, scale, k, v, ids):
        return q + scale * rows.on_mesh(mesh)(q, k, v, ids)[..., : q.shape[-1]]

    def loss(layer, q, k, v, ids):
        q, _ = jax.lax.scan(lambda q, scale: (layer(q, scale, k, v, ids), None), q, jnp.ones(2))
        return jnp.sum(q**2)

    # The split op inside a checkpoint, as each layer of a training step has it.
    plain, again = (
        jax.jit(jax.grad(functools.partial(loss, layer)))(*rows.place(mesh, inputs)[:4])
        for layer in (layer, jax.checkpoint(layer))
    )
    np.testing.assert_allclose(again, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "inputs, options, message",
    [
        ({}, {"method": "ulysses"}, "no method 'ulysses'; choose one of 'ring', 'all_gather'"),
        (
            {"T": 20},
            {},
            "got 5 on each of 4 devices of 'sequence'; pad the rows to a multiple of 8",
        ),
        ({"H": 6}, {"method": "heads"}, "the 4 devices of 'sequence'.* got H=6, G=2 on a device"),
        ({"H": 12, "G": 3}, {"method": "heads"}, "a multiple or a divisor of it, got H=12, G=3"),
        ({}, {"implementation": "cudnn"}, "no implementation 'cudnn'; choose one of 'splash'"),
    ],
)
def test_a_mistake_of_the_caller_is_named(inputs, options, message):
    mesh = rows.make_mesh(sequence=4)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(rows.on_mesh(mesh, **options), *rows.make_inputs(**inputs)[:4])


def test_segments_that_were_split_with_the_tokens_are_refused():
    inputs = rows.make_inputs(documents=DOCUMENTS["packed"])
    inputs = inputs._replace(ids=inputs.ids[:, :16])
    with pytest.raises(ValueError, match=r"whole rows, \(2, 64\) for 4 .*, got \(2, 16\)"):
        jax.eval_shape(rows.on_mesh(rows.make_mesh(sequence=4)), *inputs[:4])
