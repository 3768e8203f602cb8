"""Times of collectives: the formulas on groups whose answer is known by hand."""

import collections

import pytest

from hybrid_jax.plan.network import Network
from hybrid_jax.targets import CHIPS

Device = collections.namedtuple("Device", "coords core_on_chip slice_index")


def torus(*sizes, slices=1):
    """Devices of a slice in the order of their coordinates, the last one fastest."""
    places = [()]
    for size in sizes:
        places = [(*place, at) for place in places for at in range(size)]
    return [Device(place, 0, number) for number in range(slices) for place in places]


def network(chip, devices):
    return Network(CHIPS[chip], devices)


def test_an_all_gather_over_a_ring_uses_both_directions():
    links = network("v5p", torus(8, 8, 8))
    reach = links.reach(range(8))
    assert (reach.sizes, reach.rings, reach.dims) == ((8,), (True,), (2,))
    # Each of 8 devices lacks 7/8; two links of 100 GB/s bring it.
    assert links.seconds("all-gather", 8_000_000_000, reach) == pytest.approx(7 / 200)
    assert links.seconds("all-reduce", 8_000_000_000, reach) == pytest.approx(2 * 7 / 200)


def test_a_group_over_two_dims_uses_the_links_of_both():
    links = network("v5p", torus(8, 8, 8))
    one, two = links.reach(range(8)), links.reach(range(64))
    ratio = links.seconds("all-gather", 10**9, one) / links.seconds("all-gather", 10**9, two)
    assert ratio == pytest.approx((7 / 8 / 200) / (63 / 64 / 400))


def test_a_short_dim_is_a_line():
    v6e = network("v6e", torus(8, 8))
    assert not any(v6e.reach(range(8)).rings), "v6e wraps at 16"
    assert all(network("v6e", torus(16, 16)).reach(range(16)).rings)
    half = network("v5p", torus(8, 8, 8)).reach(range(4))
    assert half.sizes == (4,) and half.rings == (False,), "half of a ring is a line"


def test_an_exchange_crosses_a_quarter_of_a_ring():
    links = network("v5p", torus(8, 8, 8))
    # From the bisection: 4 devices send half of what they have over 2 x 2 links of 100 GB/s.
    size = 1_000_000_000
    seconds = 4 * size / 2 / (2 * 100e9)
    assert links.seconds("all-to-all", size, links.reach(range(8))) == pytest.approx(seconds)


def test_slices_are_joined_by_the_slow_network():
    links = network("v5p", torus(4, 4, 4, slices=2))
    across = links.reach([0, 64])
    assert across.slices == 2
    size = 1_000_000_000
    assert links.seconds("all-gather", size, across) == pytest.approx(size / 2 / 6.25e9)


def test_a_switch_joins_every_device_at_once():
    links = network("h200", [None] * 8)
    seconds = links.seconds("all-gather", 8_000_000_000, links.reach(range(8)))
    assert seconds == pytest.approx(7 / 450)
