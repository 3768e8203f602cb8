"""Slices and hosts against published tables."""

import pytest

from hybrid_jax.targets import chips, hosts


@pytest.mark.parametrize(
    ("target", "number", "machines"),
    [
        # Chips and hosts of https://cloud.google.com/tpu/docs/v5p.
        ("v5p:2x2x1", 4, 1),
        ("v5p:2x4x4", 32, 8),
        ("v5p:4x8x8", 256, 64),
        ("v5p:8x8x8", 512, 128),
        ("v5p:16x16x24", 6144, 1536),
        # Chips and machines of https://cloud.google.com/tpu/docs/v6e.
        ("v6e:1x1", 1, 1),
        ("v6e:2x4", 8, 2),
        ("v6e:16x16", 256, 64),
        ("tpu7x:4x4x4", 64, 16),
        ("h200:8", 8, 1),
        ("h200:3", 3, 1),
        ("b200:64", 64, 8),
        # The smallest.
        ("v5p", 4, 1),
    ],
)
def test_published_slices(target, number, machines):
    found = hosts.parse_slice(target)
    assert (found.chips, found.hosts) == (number, machines)
    assert found.chips_per_host * found.hosts == found.chips


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("v9:2x2", "There is no target 'v9:2x2'"),
        ("v5p:8x8", "have 3 sides.* got '8x8'"),
        ("v6e:8x8x8", "have 2 sides.* got '8x8x8'"),
        ("v6e:3x5", "not offered as 3x5; expected one of 1x1, 2x2"),
        ("v5p:6x8x8", "not offered as 6x8x8; .* multiples of 4"),
        ("v5p:8x8x4", "not offered as 8x8x4; .* ascending"),
        ("v5p:16x24x24", "at most 6144 chips"),
        ("v5p:0x8x8", "have 3 sides"),
        ("h200:12", "12 chips do not fill hosts of 8.* 8 or 16"),
        ("h200:2x4", "comes by the number"),
        ("h200:0", "comes by the number"),
    ],
)
def test_what_nobody_offers_is_refused(target, message):
    with pytest.raises(ValueError, match=message):
        hosts.parse_slice(target)


def test_shapes_of_the_same_size():
    assert hosts.shapes(chips.CHIPS["v5p"], 512) == ["4x4x32", "4x8x16", "8x8x8"]
    assert hosts.shapes(chips.CHIPS["v5p"], 8) == ["2x2x2"]
    assert hosts.shapes(chips.CHIPS["v6e"], 256) == ["16x16"]
    assert hosts.shapes(chips.CHIPS["v6e"], 12) == []
