"""Every head of the first and the last lightning layer of Text-01 loses no more than it may."""

import json

import numpy as np
import pytest

from pallas_kernels.lightning_attention.cases import Case
from scripts import rounding
from tests.pallas_kernels.lightning_attention import contract, oracle


def test_the_sum_over_pairs_is_the_recurrence():
    inputs = contract.make_inputs(Case(batch=1, length=40, heads=1, key_dim=8, value_dim=5))
    inputs = inputs._replace(
        log_decay=np.asarray([-0.1]), initial=0 * inputs.initial, dfinal=0 * inputs.dfinal
    )
    expected = oracle.attention(*inputs)
    one = (np.asarray(x)[0, :, 0] for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    for name, found in zip(rounding.RESULTS, rounding.exact(*one, 0.1), strict=True):
        np.testing.assert_allclose(found, getattr(expected, name)[0, :, 0], rtol=1e-12, atol=1e-12)


def test_the_first_and_the_last_lightning_layer(tmp_path, capsys):
    """The slowest heads need a thousand tokens to show what a rounded factor of a sum costs."""
    last = rounding.lightning_layers()[-1]
    assert last == 78
    assert rounding.main(rounding.Args(layers=(0, last), out=tmp_path)) == 0
    records = json.loads((tmp_path / "rounding.json").read_text())
    found = np.asarray(
        [[record["errors"][name] for name in rounding.RESULTS] for record in records]
    )
    assert found.shape == (2, 4, 64)
    # Nothing can be better than the rounded exact result, but for luck.
    assert found.min() > 0.97
    assert capsys.readouterr().out.count("\n") == 4
    assert (tmp_path / "rounding.png").read_bytes().startswith(b"\x89PNG")


def test_a_head_above_its_limit_is_named(monkeypatch, capsys):
    monkeypatch.setattr(rounding, "SLOW_LIMIT", 0.5)
    monkeypatch.setattr(rounding, "measure", _measure)
    assert rounding.main(rounding.Args(layers=(77,))) == 1
    assert "above its limit: layer 77, head 3, out: 0.700" in capsys.readouterr().err


def _measure(run, slopes_H, length, size, seed):
    return {name: np.where(np.arange(64) == 3, 0.7, 0.4) for name in rounding.RESULTS}


@pytest.mark.parametrize(("slope", "limit"), [(0.06, 1.45), (0.04, 1.1)])
def test_the_limits_of_the_forward_pass(slope, limit):
    assert rounding.limits(np.asarray([slope]))["out"] == [limit]
