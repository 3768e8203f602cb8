"""Two models side by side: the figures are those of their logits, and what int8 may cost."""

import json
import os
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
from flax import nnx

from hybrid_jax import model as models
from hybrid_jax.config.evaluation import Perplexity
from hybrid_jax.data import TokenStore
from hybrid_jax.evaluation import comparison
from hybrid_jax.model import quantized
from scripts.quickstart import FEWEST_STEPS, NOT_WANTED
from tests.inference import answering
from tests.model import configs


def _pair():
    """A model whose weights do not amplify rounding, and itself in int8."""
    model = models.build(answering.MODELS["odd"])
    graphdef, params = nnx.split(model)
    return model, nnx.merge(graphdef, quantized.quantize_params(params, "int8"))


def test_figures_are_those_of_the_logits_and_int8_is_near():
    pair, length = _pair(), 40
    row = configs.tokens(1, length + 1)[0]
    store = TokenStore.of(row.astype(np.uint16), np.array([0, length + 1]))
    found = comparison.evaluate(
        comparison.Comparison(*pair, batch_size=1), store, Perplexity(lengths=(length,))
    )
    logits = [np.asarray(model(row[None, :-1]), np.float64)[0] for model in pair]
    one, other = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    divergence = (np.exp(one) * (one - other)).sum(-1)
    nats = [-x[np.arange(length), row[1:]].mean() for x in (one, other)]
    wanted = {
        "length": length,
        "tokens": length,
        "reference_perplexity": np.exp(nats[0]),
        "perplexity": np.exp(nats[1]),
        "ratio": np.exp(nats[1] - nats[0]),
        "divergence": divergence.mean(),
        "divergence_99": np.quantile(divergence, 0.99),
        "agreement": (one.argmax(-1) == other.argmax(-1)).mean(),
    }
    # Logits in float32, sums in another order: 1e-5 of logits of a few, and what is left of it in
    # differences of two distributions.
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    # A weight is off by 1/sqrt(12) of a step, a step is 1/127.5 of the largest of its output, and
    # that about twice a typical one in rows of 24: half a percent, and at most 1.5 % after the nine
    # matrices that stand one after another. Half of the square of what that is of the logits'
    # spread is the divergence.
    spread = np.std(logits[0], axis=-1).mean()
    assert 0 < found["divergence"] < (0.015 * spread) ** 2 / 2


@pytest.mark.nightly
def test_int8_keeps_the_perplexity_of_the_quickstart_model(tmp_path):
    # As scripts/quickstart.py trains it on a slow machine.
    run, out = tmp_path / "run", tmp_path / "out"
    corpus = sysconfig.get_paths()["stdlib"]
    train = ["train", "--preset", "quickstart", "--steps", str(FEWEST_STEPS), "--out", str(run)]
    train += ["--data", corpus, "--data.sources.0.pattern", "*.py"]
    train += ["--data.sources.0.exclude", *NOT_WANTED]
    measure = ["eval", str(run), "--out", str(out), "--task", "quantization"]
    measure += ["--perplexity.lengths", "256", "--perplexity.tokens", "16384", "--quantize"]
    # A user's process: without the tests' simulated devices.
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    reports = {}
    for options in (train, [*measure, "int8"], [*measure, "fp8"]):
        command = [sys.executable, "-m", "hybrid_jax.cli", *options]
        result = subprocess.run(command, capture_output=True, text=True, env=plain)
        assert result.returncode == 0, result.stderr
        if options[0] == "eval":
            reports[options[-1]] = json.loads((out / "quantization.json").read_text())
            print(result.stdout)
    # It has learnt something: the worst it can be is 8,192 words.
    assert reports["int8"]["reference_perplexity"] < 1000
    assert reports["int8"]["ratio"] < 1.005
    # Three bits after the point, where int8 has about six for a typical weight.
    assert reports["fp8"]["ratio"] < 1.05
