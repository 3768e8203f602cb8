"""Configuration trees from text: every mistake is named by its path."""

import os

import pytest

from hybrid_jax.config import layers, model, presets, text


def _nano_with(change):
    tree = text.to_dict(presets.get("nano"))
    change(tree)
    return tree


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(vocab_sise=3), "vocab_sise.*Did you mean 'vocab_size'"),
        (lambda t: t.pop("vocab_size"), "lacks the field 'vocab_size'"),
        (lambda t: t.update(vocab_size="many"), "vocab_size must be of type int; got 'many'"),
        (lambda t: t.update(vocab_size=-5), "vocab_size must be a positive whole number; got -5"),
        (lambda t: t.update(repeats=True), "repeats must be of type int; got True"),
        (lambda t: t.update(pattern={}), "pattern must be a list"),
        (
            lambda t: t["pattern"][0]["layer"]["mixer"].update(kind="LightningAtention"),
            r"pattern\[0\].layer.mixer needs `kind`.*Did you mean 'LightningAttention'",
        ),
        (
            lambda t: t["pattern"][0]["layer"]["mixer"].update(kind=["Lightning"]),
            r"pattern\[0\].layer.mixer needs `kind`.*got \['Lightning'\]",
        ),
        (lambda t: t.update(norm_eps=10**400), "norm_eps must be a number; got one larger"),
        (
            lambda t: t["pattern"][1]["layer"]["mixer"].update(num_kv_heads=3),
            r"pattern\[1\].layer.mixer: num_heads=4 must be a multiple of num_kv_heads=3",
        ),
        (
            lambda t: t["pattern"][1]["layer"]["mixer"].update(rotary_dim=7),
            "rotary_dim=7 must be even and at most head_dim=16",
        ),
        (
            lambda t: t["pattern"][0]["layer"]["ffn"]["router"].update(experts_per_token=9),
            "experts_per_token=9 cannot exceed num_experts=4",
        ),
        (lambda t: t["dtypes"].update(compute="float8"), "compute must be one of"),
        (lambda t: t.update(repeats=10**9), "10000 layers at most"),
    ],
)
def test_mistakes_are_named_by_their_path(change, message):
    with pytest.raises(ValueError, match=message):
        text.from_dict(model.ModelConfig, _nano_with(change))


def test_numbers_written_without_a_point_are_numbers(tmp_path):
    # YAML 1.1 takes 1e-6 for text.
    path = tmp_path / "config.yaml"
    text.write_yaml(presets.get("nano"), path)
    path.write_text(path.read_text().replace("norm_eps: 1.0e-06", "norm_eps: 1e-6"))
    assert text.read_yaml(model.ModelConfig, path) == presets.get("nano")


def test_unreadable_yaml_names_the_file(tmp_path):
    # Cut off, an impossible date, too deep.
    for content in ("a: [", "a: 2026-13-45", "[" * 20000):
        (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(ValueError, match=r"config\.yaml is not readable YAML"):
            text.read_yaml(model.ModelConfig, tmp_path / "config.yaml")


def test_an_endless_config_is_not_read(tmp_path):
    path = tmp_path / "config.yaml"
    path.touch()
    os.truncate(path, 20 << 30)
    with pytest.raises(ValueError, match="21474836480 bytes long; expected a config of"):
        text.read_yaml(model.ModelConfig, path)


def test_a_list_of_lists_of_lists_is_told_in_short():
    bomb: list = ["x"] * 10
    for _ in range(12):
        bomb = [bomb] * 10
    with pytest.raises(ValueError, match="vocab_size must be") as caught:
        text.from_dict(model.ModelConfig, _nano_with(lambda t: t.update(vocab_size=bomb)))
    assert len(str(caught.value)) < 5000


def test_folding_finds_the_shortest_pattern():
    config = presets.get("nano")
    lightning, softmax = config.layers[0], config.layers[-1]
    runs, repeats = model.fold_layers([softmax, lightning, lightning] * 3)
    assert [(run.layer, run.count) for run in runs] == [(softmax, 1), (lightning, 2)]
    assert repeats == 3
    runs, repeats = model.fold_layers([lightning, lightning, softmax, lightning])
    assert ([run.count for run in runs], repeats) == ([2, 1, 1], 1)


def test_residual_source_is_one_of_two():
    with pytest.raises(ValueError, match="'normed' or 'input'; got 'post'"):
        layers.Residual(source="post")
