"""Presets: golden text for each, exact parameter counts, round trips, near names."""

import os
import pathlib

import pytest

from hybrid_jax import model as models
from hybrid_jax.config import model as model_config
from hybrid_jax.config import presets, text

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", presets.names())
def test_preset_equals_its_golden_text(name):
    path = GOLDEN / f"{name}.txt"
    dumped = text.dump(presets.get(name))
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(dumped, encoding="utf-8")
    assert dumped == path.read_text(encoding="utf-8"), (
        "a preset changed; if it should: UPDATE_GOLDEN=1 pytest tests/config, and read the diff"
    )


@pytest.mark.parametrize(
    ("name", "parameters", "layers"),
    [
        ("minimax-text-01", 456_089_655_296, 80),
        ("minimax-m1-40k", 456_089_655_296, 80),
        ("minimax-m1-80k", 456_089_655_296, 80),
        ("minimax-m2", 228_689_764_864, 62),
        ("minimax-m2.7", 228_689_764_864, 62),
    ],
)
def test_published_models_have_their_published_size(name, parameters, layers):
    config = presets.get(name)
    assert config.num_layers == layers == len(config.layers)
    assert models.count(models.abstract(config)) == parameters


def test_own_models_have_the_size_their_names_promise():
    sizes = {
        name: models.count(models.abstract(presets.get(name)))
        for name in ("study-70m", "study-410m", "study-1b", "quickstart", "nano")
    }
    promised = dict(zip(sizes, (70e6, 410e6, 1e9, 30e6, 1e6), strict=True))
    assert {n: abs(sizes[n] / promised[n] - 1) < 0.2 for n in sizes} == dict.fromkeys(sizes, True)


@pytest.mark.parametrize("name", presets.names())
def test_preset_survives_yaml_and_folds_to_itself(name, tmp_path):
    config = presets.get(name)
    text.write_yaml(config, tmp_path / "config.yaml")
    assert text.read_yaml(model_config.ModelConfig, tmp_path / "config.yaml") == config
    assert model_config.fold_layers(config.layers) == (config.pattern, config.repeats)


def test_unknown_preset_names_the_near_one():
    with pytest.raises(ValueError, match="Did you mean 'minimax-text-01'"):
        presets.get("minimax-text-1")
