"""Every preset of rules places every parameter of every model, or says what does not divide."""

import dataclasses

import pytest
from jax.sharding import PartitionSpec

from hybrid_jax.config import presets
from hybrid_jax.training.parameters import Skeleton
from sharding import Logical, MeshShape, rules

_L = Logical


def _parameter(name, axes, shape, **sizes):
    return rules.get(name).parameter(axes, shape, MeshShape(**sizes), "w")


def test_dims_go_where_the_table_says():
    qkv = (_L.LAYERS, _L.MODEL, _L.HEADS, _L.PARTS, _L.HEAD_DIM), (7, 16, 8, 3, 4)
    sizes = {"fsdp": 2, "expert": 4, "tensor": 2}
    expected = PartitionSpec(None, "fsdp", ("tensor", "expert"))
    assert _parameter("expert", *qkv, **sizes) == expected
    assert _parameter("fsdp", *qkv, **sizes) == PartitionSpec(None, "fsdp")
    assert _parameter("serve", *qkv, **sizes) == PartitionSpec(None, None, "tensor")
    assert _parameter("expert", *qkv) == PartitionSpec()


def test_experts_are_split_otherwise_than_the_rest():
    gate_up = (_L.EXPERTS, _L.MODEL, _L.PARTS, _L.FFN), (8, 16, 2, 32)
    router = (_L.MODEL, _L.EXPERTS), (16, 8)
    sizes = {"fsdp": 2, "expert": 4, "tensor": 2}
    assert _parameter("expert", *gate_up, **sizes) == PartitionSpec(
        "expert", "fsdp", None, "tensor"
    )
    # Rows, not columns, wherever they divide.
    down = _L.EXPERTS, _L.FFN, _L.MODEL
    parts = PartitionSpec("expert", ("tensor", "fsdp"))
    assert _parameter("expert", down, (8, 32, 16), **sizes) == parts
    assert _parameter("expert", down, (8, 6, 16), **sizes) == PartitionSpec(
        "expert", "tensor", "fsdp"
    )
    # The router sees all experts from everywhere.
    assert _parameter("expert", *router, **sizes) == PartitionSpec("fsdp")


def test_storage_alone_gives_way_where_a_dim_does_not_divide():
    axes, shape = (_L.MODEL, _L.HEADS), (16, 6)
    sizes = {"tensor": 2, "expert": 4}
    assert _parameter("expert", axes, shape, **sizes) == PartitionSpec(None, "tensor")
    used = rules.get("expert").used_parameter(axes, (16, 8), MeshShape(**sizes), "w")
    assert used == PartitionSpec(None, "tensor"), "at work, experts' devices have all heads"


def test_activations_have_a_table_of_their_own():
    axes, shape = (_L.BATCH, _L.TIME, None), (8, 64, 16)
    chosen = rules.get("long_context")
    spec = chosen.activation(axes, shape, MeshShape(data=2, fsdp=2, sequence=4), "x")
    assert spec == PartitionSpec(("data", "fsdp"), "sequence")


def test_what_does_not_divide_is_told_with_its_numbers():
    message = "w: its dim heads of 6 does not divide by tensor=4. Its shape is"
    with pytest.raises(ValueError, match=message):
        _parameter("expert", (_L.MODEL, _L.HEADS), (16, 6), tensor=4)
    with pytest.raises(ValueError, match="of 6 does not divide by fsdp=2 x sequence=2 = 4"):
        _parameter("long_context", (_L.MODEL,), (6,), fsdp=2, sequence=2)


def test_one_axis_cannot_split_two_dims():
    twice = dataclasses.replace(
        rules.get("fsdp"), parameters={_L.MODEL: ("fsdp",), _L.HEADS: ("fsdp",)}
    )
    with pytest.raises(ValueError, match="'fsdp' would split both model and heads"):
        twice.parameter((_L.MODEL, _L.HEADS), (4, 4), MeshShape(fsdp=2), "w")


def test_unknown_rules_name_the_known():
    with pytest.raises(ValueError, match="no rules 'best'; expected one of fsdp, "):
        rules.get("best")


@pytest.mark.parametrize("name", rules.PRESETS)
@pytest.mark.parametrize("preset", ["minimax-text-01", "minimax-m2", "quickstart"])
def test_every_parameter_of_a_model_has_a_place(name, preset):
    skeleton = Skeleton(presets.get(preset))
    mesh = MeshShape(data=2, fsdp=2, expert=2, sequence=2, tensor=2)
    for parameter, array in skeleton.abstract.items():
        rules.get(name).parameter(skeleton.all_axes(parameter), array.shape, mesh, parameter)
