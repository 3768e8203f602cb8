"""Recipes have the published numbers, and keep their proportions at any budget."""

import itertools

import pytest

from hybrid_jax.config import presets, recipes
from hybrid_jax.config import training as t
from hybrid_jax.config.data import Source
from hybrid_jax.config.layers import SoftmaxAttention
from hybrid_jax.config.model import DeepNorm

DATA = (Source(path="web", weight=0.7), Source(path="code", weight=0.3))
SMALL = recipes.Budget(length=64, batch_tokens=256, tokens=20_000)


def recipe(name, budget=recipes.PUBLISHED, preset="minimax-text-01", sources=DATA):
    return recipes.get(name, presets.get(preset), sources, budget)


def thetas(config):
    mixers = [layer.mixer for layer in config.model.layers]
    return {mixer.rope_theta for mixer in mixers if isinstance(mixer, SoftmaxAttention)}


def test_pre_training_has_the_reports_numbers():
    config = recipe("minimax-01")
    length = config.data.sequence_length
    assert length == 8192 and thetas(config) == {1e4}
    sizes = [(tokens, size * length) for _, tokens, size in config.phases]
    for (seen, batch), wanted in zip(sizes, (0, 69e9, 790e9, 4.7e12), strict=True):
        assert seen == pytest.approx(wanted, rel=1e-3)
        assert batch == (16 << 20) << sizes.index((seen, batch))
    assert config.tokens_before(config.steps) == pytest.approx(11.4e12, rel=1e-4)
    assert (config.schedule.peak, config.schedule.warmup_steps) == (2e-4, 500)
    assert config.model.initialization == DeepNorm()
    assert config.optimizer == t.AdamW(b1=0.9, b2=0.95, weight_decay=0.1)
    # M2 and other models are trained by the same one.
    assert recipe("minimax-01", preset="minimax-m2").steps == config.steps


@pytest.mark.parametrize(
    ("name", "length", "theta", "shares"),
    [
        ("text-01-128k", 131072, 5e6, (0.30, 0.70, 0.0)),
        ("text-01-512k", 524288, 1e7, (0.35, 0.35, 0.30)),
        ("text-01-1m", 1048576, 1e7, (0.30, 0.30, 0.40)),
    ],
)
def test_stages_mix_documents_by_length(name, length, theta, shares):
    config = recipe(name, sources=(*DATA, Source(path="questions", name="long-qa")))
    assert config.data.sequence_length == length <= config.model.max_positions
    assert thetas(config) == {theta}
    assert config.faults.spikes.rewind_after
    *buckets, questions = config.data.sources
    for progress in (0.5, 0.9):
        weights = {source.label: source.weight_at(progress) for source in buckets}
        by_length = [
            sum(w for label, w in weights.items() if label.endswith(f"-{kind}"))
            for kind in ("short", "medium", "long")
        ]
        assert by_length == pytest.approx(shares)
        assert sum(w for label, w in weights.items() if label.startswith("web")) == pytest.approx(
            0.7
        )
    assert questions.weight_at(0.79) == 0
    assert questions.weight_at(0.9) / (1 + questions.weight_at(0.9)) == pytest.approx(0.1)
    ranges = [(s.min_tokens, s.max_tokens) for s in buckets if s.label.startswith("web")]
    wanted = [(1, 32767), (32768, 131072), (131073, None)]
    assert ranges == wanted[: len(ranges)]


def test_a_stage_begins_with_the_mixture_before_it():
    for name, before in (("text-01-512k", "text-01-128k"), ("text-01-1m", "text-01-512k")):
        old = {s.label: s.weight_at(0.7) for s in recipe(before).data.sources}
        new = {s.label: s.weight_at(0.0) for s in recipe(name).data.sources}
        assert {label: w for label, w in new.items() if w} == pytest.approx(
            {label: w for label, w in old.items() if w}
        )


def test_m1_grows_in_four_smoother_stages():
    lengths = [
        recipe(name).data.sequence_length for name in ("m1-32k", "m1-128k", "m1-512k", "m1-1m")
    ]
    assert lengths[0] == 32768 and lengths[-1] == 1 << 20
    assert all(b <= 4 * a for a, b in itertools.pairwise(lengths))
    continued = recipe("m1-continued")
    assert continued.schedule.peak == 8e-5
    first, fall = continued.schedule.decay.phases
    assert (first.share, fall.share, fall.end) == (2.5, 5.0, 0.1)


def test_fine_tuning_has_the_reports_numbers():
    short, long = recipe("sft-8k"), recipe("sft-1m")
    assert (short.data.sequence_length, short.batch_size, short.schedule.peak) == (8192, 128, 1e-5)
    assert (long.data.sequence_length, long.batch_size, long.schedule.peak) == (1032192, 80, 3e-6)
    assert {source.max_epochs for source in short.data.sources} == {2.0}
    # As many steps as two epochs have.
    assert short.steps == long.steps == 0
    assert thetas(short) == thetas(long) == {1e7}


@pytest.mark.parametrize("name", recipes.names())
def test_a_budget_shrinks_all_in_proportion(name):
    config = recipe(name, SMALL, preset="nano")
    assert config.data.sequence_length == 64
    assert config.batch_size * 64 == 256
    seen = config.tokens_before(config.steps)
    assert seen == pytest.approx(20_000, rel=0.15)
    published = recipe(name)
    assert [p.start for p in getattr(config.schedule.decay, "phases", ())] == [
        p.start for p in getattr(published.schedule.decay, "phases", ())
    ]
    for old, new in zip(published.batch_ramp, config.batch_ramp, strict=True):
        assert new.tokens / 20_000 == pytest.approx(old.tokens / 11.4e12, rel=1e-2)
    assert recipes.about(name)


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"no recipe 'minimax01'. Did you mean 'minimax-01'"):
        recipe("minimax01")
    with pytest.raises(ValueError, match=r"Budget.length must be >= 1; got 0"):
        recipes.Budget(length=0)
