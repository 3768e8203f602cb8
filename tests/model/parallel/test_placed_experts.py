"""The mixture as rules place it equals that of one device; what became of its rows is counted."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import numpy as np
import pytest

from hybrid_jax.model.ffn import moe, router
from hybrid_jax.model.parallel import placed, placement
from hybrid_jax.model.parallel.admission import Capacity
from sharding import Logical, Rules, mesh, rules

D, E, F, A = 8, 16, 8, 2
ROWS, LENGTH = 8, 16

# Experts wider apart than the rest of the model: also over the axis that only copies of it use.
_PRESET = rules.get("expert")
WIDE = Rules(
    "wide",
    "experts over data and expert",
    parameters=_PRESET.parameters,
    experts={**_PRESET.experts, Logical.EXPERTS: ("data", "expert")},
    activations={**_PRESET.activations, Logical.EXPERTS: ("data", "expert")},
)
PLACES = {
    "EP 2, EDP 4": ("data=4,expert=2", "expert"),
    "EP 4, EDP 2 over fsdp": ("fsdp=2,expert=4", "expert"),
    "EP 8": ("expert=8", "expert"),
    "EP 4, ETP 2": ("expert=4,tensor=2", "serve"),
    "EP 2, EDP 2, ETP 2": ("data=2,expert=2,tensor=2", "expert"),
    "ETP 4, EDP 2": ("data=2,tensor=4", "fsdp_tensor"),
    "EDP 8": ("fsdp=8", "fsdp"),
    "EP 2, EDP 4 over time": ("sequence=4,expert=2", "long_context"),
    "EP 8 of two axes": ("data=4,expert=2", WIDE),
}


class Arrays(NamedTuple):
    """What is differentiated."""

    x_BTD: np.ndarray
    weight_TA: np.ndarray
    gate_up_ED2F: np.ndarray
    down_EFD: np.ndarray


@functools.cache
def inputs():
    """The arrays, the chosen experts (some far more often than others), and a cotangent."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    weight_TA = rng.uniform(0.1, 1, (ROWS * LENGTH, A)).astype(np.float32)
    arrays = Arrays(draw(ROWS, LENGTH, D), weight_TA, draw(E, D, 2, F), draw(E, F, D))
    scores_TE = rng.gumbel(size=(ROWS * LENGTH, E)) - 0.2 * np.arange(E)
    expert_TA = np.argsort(-scores_TE, axis=1)[:, :A].astype(np.int32)
    return arrays, expert_TA, draw(ROWS, LENGTH, D)


def place(name: str, **options) -> placement.Placement:
    text, chosen = PLACES[name]
    chosen = chosen if isinstance(chosen, Rules) else rules.get(chosen)
    devices = mesh.make(mesh.parse(text, 8))
    return placement.Placement(devices, chosen, placement.ExpertOptions(**options))


def results(mixture):
    """Out, the load or None, and all gradients, of a mixture of (arrays, chosen experts)."""

    @jax.jit
    def run(arrays, expert_TA, cotangent):
        out, pull, load = jax.vjp(lambda arrays: mixture(arrays, expert_TA), arrays, has_aux=True)
        return out, load, pull(cotangent)[0]

    return jax.device_get(run(*inputs()))


@functools.cache
def on_one_device():
    def mixture(arrays, expert_TA):
        choice = router.Choice(expert_TA, arrays.weight_TA)
        x_TD = arrays.x_BTD.reshape(-1, D)
        out_TD = moe.expert_mixture(x_TD, choice, arrays.gate_up_ED2F, arrays.down_EFD, E, None)
        return out_TD.reshape(arrays.x_BTD.shape), None

    return results(mixture)


def on_mesh(name: str, **options):
    here = place(name, **options)

    def mixture(arrays, expert_TA):
        choice = router.Choice(expert_TA, arrays.weight_TA)
        weights = arrays.gate_up_ED2F, arrays.down_EFD
        return placed.expert_mixture(here, arrays.x_BTD, choice, *weights, E)

    return results(mixture)


def rows_by_hand(name: str) -> np.ndarray:
    """Rows that come to each device: by replica and by group of experts."""
    sizes = place(name).shape.sizes
    _, expert_TA, _ = inputs()
    expert_BTA = expert_TA.reshape(ROWS, LENGTH, A)
    batch = (sizes["data"], sizes["fsdp"], sizes["expert"])
    counts = np.zeros((*batch, sizes["sequence"], E), int)
    for b, t, a in np.ndindex(expert_BTA.shape):
        at = np.unravel_index(b * math.prod(batch) // ROWS, batch)
        counts[(*at, t * sizes["sequence"] // LENGTH, expert_BTA[b, t, a])] += 1
    # Of the devices of one group of experts each takes from those whose other places are its own.
    over = (0, 2) if name == "EP 8 of two axes" else (2,)
    groups = math.prod(counts.shape[axis] for axis in over)
    return counts.sum(axis=over).reshape(-1, groups, E // groups).sum(axis=2)


@pytest.mark.parametrize("name", PLACES)
def test_every_placement_gives_the_mixture_of_one_device_with_its_gradients(name):
    expected, _, gradients = on_one_device()
    found, load, ours = on_mesh(name)
    # float32 sums of some dozens of terms in another order, relative to the largest entry.
    for left, right in zip((found, *ours), (expected, *gradients), strict=True):
        assert np.abs(left - right).max() <= 1e-5 * np.abs(right).max()
    rows = rows_by_hand(name)
    assert rows.sum() == ROWS * LENGTH * A
    assert not load.dropped_E.any()
    assert load.rows_max == rows.max()
    assert load.rows_mean == pytest.approx(rows.mean(), rel=1e-6)


@pytest.mark.parametrize("name", ["EP 2, EDP 4 over time", "EP 2, EDP 2, ETP 2"])
def test_a_capacity_is_that_of_the_tokens_of_all_devices(name):
    factor = 1.25
    _, load, _ = on_mesh(name, capacity=Capacity(per_expert=factor), token_groups=2)
    _, expert_TA, _ = inputs()
    chosen_E = np.bincount(expert_TA.ravel(), minlength=E)
    limit = math.ceil(factor * expert_TA.size / E)
    # Experts beyond the limit lose what is beyond it, wherever their tokens are; others nothing.
    dropped_E = np.maximum(chosen_E - limit, 0)
    assert dropped_E.any() and not dropped_E.all()
    np.testing.assert_array_equal(load.dropped_E, dropped_E)
    devices = rows_by_hand(name).size
    assert load.rows_mean == pytest.approx((expert_TA.size - dropped_E.sum()) / devices, rel=1e-6)


def test_experts_are_not_split_where_tokens_are_whole(monkeypatch):
    activations = {**_PRESET.activations, Logical.EXPERTS: ("expert", "tensor")}
    twice = dataclasses.replace(_PRESET, activations=activations)
    monkeypatch.setitem(PLACES, "twice", ("expert=4,tensor=2", twice))
    with pytest.raises(ValueError, match="'expert' split experts over tensor, which splits no tok"):
        on_mesh("twice")


def test_groups_that_do_not_come_out_even_are_refused_with_numbers():
    with pytest.raises(ValueError, match="16 tokens of a device into 3 groups"):
        on_mesh("EP 8", token_groups=3)
    with pytest.raises(ValueError, match=r"token_groups .* whole number >= 1; got 0"):
        placement.ExpertOptions(token_groups=0)
