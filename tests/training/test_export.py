"""What was trained here computes the same where others read it."""

import io

import numpy as np
import pytest

from hybrid_jax import checkpoint, training
from tests.training import small

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# The run of `test_resume` and `test_faults`, whose programs are there if these came before.
pytestmark = pytest.mark.usefixtures("compiled_once")


def test_transformers_computes_what_was_trained_here(tmp_path):
    (tmp_path / "text").mkdir()
    config = small.small_run(small.write_text(tmp_path / "text"))
    small.train(config, tmp_path / "run", stream=io.StringIO())
    checkpoint.convert(tmp_path / "run", tmp_path / "hf", "hf")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype="float32", output_loading_info=True
    )
    assert not any(report.values()), report
    tokens = np.random.default_rng(0).integers(0, small.VOCAB, (2, 12))
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens)).logits.numpy()
    # The run's own way to its weights, which knows nothing of published names.
    found = training.restore_model(tmp_path / "run")(tokens)
    assert np.abs(expected).max() > 0.1
    # float32 on both sides, sums in another order: 1e-5 of the largest logit.
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
