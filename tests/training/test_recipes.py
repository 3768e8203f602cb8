"""Every recipe trains a few steps at nano size, on documents of every length it asks for."""

import dataclasses
import io
import json

import numpy as np
import pytest

from hybrid_jax import data, observe
from hybrid_jax.config import layers, recipes
from hybrid_jax.config.data import Source
from hybrid_jax.config.presets import own
from tests.training import small

# Rows of 32 tokens: documents count as long above 4 (of a 1M stage) to 128 (of a 32K one).
BUDGET = recipes.Budget(length=32, batch_tokens=64, tokens=64 * 5)
MODEL = own.hybrid(
    "tiny",
    vocab_size=300,
    hidden_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rotary_dim=8,
    ffn=layers.DenseFfn(hidden_dim=16),
    period=2,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Documents of 2 to 300 tokens, prepared once."""
    folder = tmp_path_factory.mktemp("recipes")
    rng = np.random.default_rng(0)
    lengths = [1, 2, 3, 5, 20, 40, 150, 300] * 4
    lines = [json.dumps({"text": "".join(rng.choice(list("abcdef"), n))}) for n in lengths]
    (folder / "a.jsonl").write_text("\n".join(lines))
    tokenizer = data.train_tokenizer(["abcdef"], 257)
    made = Source(path=str(folder / "a.jsonl"), name="made")
    data.prepare(made, folder / "prepared", tokenizer, heldout_fraction=0.0)
    return Source(path=str(folder / "prepared"), name="made")


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_trains(name, source, tmp_path):
    config = recipes.get(name, MODEL, (source,), BUDGET)
    config = dataclasses.replace(config, steps=min(config.steps, 5))
    outcome = small.train(config, tmp_path / "run", stream=io.StringIO())
    assert outcome.step == config.steps >= 2
    records = observe.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(np.isfinite(record["loss"]) for record in records)
    if len(config.batch_sizes) > 1:
        tokens = [record["tokens"] for record in records]
        assert tokens[-1] > tokens[0]
    if len(config.data.sources) > 1:
        assert len(records[0]["loss_by_source"]) == len(config.data.sources)
