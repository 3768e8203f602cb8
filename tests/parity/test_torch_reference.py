"""The PyTorch reference: against transformers where that is right, and against the formulas."""

import math

import pytest

from hybrid_jax.parity import oracles, published, torch_reference
from hybrid_jax.parity.measure import difference, gradient_differences

CASES = pytest.mark.parametrize(
    ("writer", "fields"),
    [("save_minimax", {"pattern": "llslls"}), ("save_minimax_m2", {})],
    ids=["minimax", "minimax_m2"],
)


@CASES
def test_reference_equals_transformers_in_layers_and_logits(directory, tokens_BT, writer, fields):
    path = directory(writer, **fields)
    oracle = oracles.TransformersOracle(path, published.read_spec(path))
    logits, layers = oracle.trace(tokens_BT)
    ours, our_layers = oracles.ReferenceOracle(path).trace(tokens_BT)
    # Measured 2e-6: two orders of float32 summation.
    assert difference(ours, logits).max_rel < 1e-5
    assert len(layers) == len(our_layers)
    for a, b in zip(our_layers, layers, strict=True):
        assert difference(a, b).max_rel < 1e-5


@CASES
def test_reference_equals_transformers_in_every_gradient(directory, tokens_BT, writer, fields):
    path = directory(writer, **fields)
    oracle = oracles.TransformersOracle(path, published.read_spec(path))
    found = gradient_differences(
        oracles.ReferenceOracle(path).gradients(tokens_BT), oracle.gradients(tokens_BT)
    )
    assert found[0][1].max_rel < 1e-4, found[:3]


@CASES
def test_reference_continues_text_as_transformers_does(directory, tokens_BT, writer, fields):
    path = directory(writer, **fields)
    oracle = oracles.TransformersOracle(path, published.read_spec(path))
    prompt_BT = tokens_BT[:, :8]
    text = oracle.greedy(prompt_BT, 12)
    assert text.shape == (2, 12)
    assert (oracles.ReferenceOracle(path).greedy(prompt_BT, 12) == text).all()


def test_unpatched_decay_of_transformers_is_off_by_its_denominator(directory, tokens_BT, torch):
    """1e-5 in the denominator: l/(L-1) * 1e-5/(L-1) of a factor that itself falls to 1e-5."""
    from transformers import AutoModelForCausalLM

    path = directory("save_minimax", pattern="lllsll")
    spec = published.read_spec(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    notes = oracles.recompute_decay(model, spec)
    # The last layer is a lightning layer here: its factor 1e-5 becomes 1.2e-5 in transformers.
    assert len(notes) == 1
    assert "layer 5 by slopes up to 2.0e-01" in notes[0]
    assert not oracles.recompute_decay(model, spec)


def test_slopes_follow_the_original_rule_for_every_head_count():
    # minimax.md, 1.2: 64 heads, and the 12 that transformers gets wrong.
    assert torch_reference.slopes(64)[0] == pytest.approx(0.917004, abs=1e-6)
    assert torch_reference.slopes(64)[63] == pytest.approx(0.00390625)
    twelve = torch_reference.slopes(12)
    assert twelve[:8] == [0.5 ** (h + 1) for h in range(8)]
    assert twelve[8:] == pytest.approx([0.7071, 0.3536, 0.1768, 0.0884], abs=1e-4)
    assert torch_reference.slopes(1) == [2.0**-8]


def test_layer_factors_count_from_the_absolute_layer():
    assert torch_reference.layer_factor(0, 80) == pytest.approx(1.00001)
    assert torch_reference.layer_factor(40, 80) == pytest.approx(0.493681, abs=1e-6)
    assert torch_reference.layer_factor(79, 80) == pytest.approx(1e-5)
    assert torch_reference.layer_factor(0, 1) == pytest.approx(1.00001)


def test_rotation_leaves_the_rest_of_the_head_and_depends_on_distance_alone(torch):
    x = torch.randn(1, 1, 1, 16, dtype=torch.float64)
    y = torch.randn(1, 1, 1, 16, dtype=torch.float64)

    def turned(x, position):
        return torch_reference.rotate(x, torch.tensor([[position]]), 8, 10000.0)

    assert torch.equal(turned(x, 5)[..., 8:], x[..., 8:])
    dots = [(turned(x, a) * turned(y, b)).sum().item() for a, b in ((7, 3), (104, 100))]
    assert dots[0] == pytest.approx(dots[1], abs=1e-12)
    # Half-split: the first pair is (0, 4), turned by `position` radians.
    unit = torch.zeros(1, 1, 1, 16)
    unit[..., 0] = 1
    assert turned(unit, 2)[0, 0, 0, 4].item() == pytest.approx(math.sin(2), abs=1e-6)


@pytest.mark.parametrize("writer", ["save_original", "save_minimax_m2"])
def test_packed_and_padded_segments_equal_separate_rows(directory, tokens_BT, torch, writer):
    model = torch_reference.load(directory(writer))
    tokens = torch.from_numpy(tokens_BT)
    one, two = tokens[:1, :11], tokens[1:, :7]
    packed = torch.cat([one, two, tokens[:1, :3]], 1)
    ids = torch.tensor([[1] * 11 + [2] * 7 + [0] * 3])
    with torch.no_grad():
        logits = model(packed, ids)
        assert torch.isfinite(logits).all()
        # Same formulas on other shapes: float32 summation only.
        torch.testing.assert_close(logits[:, :11], model(one), atol=2e-5, rtol=0)
        torch.testing.assert_close(logits[:, 11:18], model(two), atol=2e-5, rtol=0)


def test_fp8_blocks_are_multiplied_by_their_scales(tmp_path, torch):
    from safetensors.torch import save_file

    weight = torch.full((3, 5), 2.0).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 10.0, 100.0], [0.5, 5.0, 50.0]])
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({name: weight, f"{name}_scale_inv": scale}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"weight_block_size": [2, 2]}}')
    spec = type("OneLayer", (), {"num_layers": 1})
    read = published.read_weights(tmp_path, spec, "float32")
    assert list(read) == [name]
    assert read[name].tolist() == [[2, 2, 20, 20, 200]] * 2 + [[1, 1, 10, 10, 100]]
