"""Meshes multiply out to the devices, or say by how much they do not."""

import jax
import pytest

from sharding import mesh


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", {}),
        ("data=2,fsdp=4", {"data": 2, "fsdp": 4}),
        (" tensor = 8 ", {"tensor": 8}),
        ("fsdp=-1,expert=2", {"fsdp": 4, "expert": 2}),
        ("data=8,slices=2", {"data": 8, "slices": 2}),
    ],
)
def test_text_to_shape(text, sizes):
    devices = None if text == "" else 8
    assert mesh.parse(text, devices) == mesh.MeshShape(**sizes)


def test_a_shape_prints_as_what_makes_it():
    shape = mesh.MeshShape(data=4, expert=2, slices=2)
    assert mesh.parse(str(shape)) == shape and shape.devices == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsdp=2,fsdp=4", "names the axis 'fsdp' twice"),
        ("tensr=8", "names the axis 'tensr'.*Did you mean 'tensor'"),
        ("data=two", "gives data the size 'two'; expected a whole number"),
        ("data", "gives data the size ''"),
        ("data=0", "data must be a whole number >= 1; got 0"),
        ("data=-2", "data must be a whole number >= 1; got -2"),
        ("data=2,fsdp=3", r"data=2 x fsdp=3 x .* has 6 devices; there are 8"),
        ("data=-1,fsdp=-1", "data and fsdp of size -1; only one axis may be"),
        ("data=-1,fsdp=3", "leaves 8 / 3 devices for data"),
        ("data=-1,fsdp=0", "leaves 8 / 0 devices for data"),
        ("data=8,slices=3", "data=8 does not divide into slices=3"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        mesh.parse(text, 8)


def test_the_rest_needs_a_number_of_devices():
    with pytest.raises(ValueError, match="the number of devices is not known"):
        mesh.parse("data=-1")


def test_a_mesh_of_all_axes_in_order():
    made = mesh.make(mesh.MeshShape(), jax.devices()[:1])
    assert made.axis_names == mesh.AXES and made.devices.shape == (1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="has 2 devices; there are 1"):
        mesh.make(mesh.MeshShape(fsdp=2), jax.devices()[:1])
