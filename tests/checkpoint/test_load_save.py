"""A directory of any kind becomes the same model, and a model the same directory again."""

import dataclasses
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import hybrid_jax
from hybrid_jax import model as models
from hybrid_jax.checkpoint import convert, digests, leaves, manifest
from hybrid_jax.config import recipes, text
from hybrid_jax.config.data import Source
from hybrid_jax.config.model import ModelConfig
from tests.checkpoint import published
from tests.checkpoint.published import FP8_CONFIG, D, F, H, K, m2_config, original_config

FORMATS = ("hf-original", "hf", "orbax")


def _directory(tmp_path, config=None, dtype=np.float32, **kwargs):
    config = config or original_config()
    tensors = published.tensors(config, dtype)
    return published.write_directory(tmp_path / "src", config, tensors, **kwargs), tensors


def _random(config: ModelConfig, seed: int) -> models.Model:
    draw = np.random.default_rng(seed)
    return leaves.fill(config, lambda _, shape, dtype: draw.standard_normal(shape).astype(dtype))


def _same(one: models.Model, other: models.Model) -> None:
    a, b = leaves.arrays(one), leaves.arrays(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert np.array_equal(np.asarray(a[name]), np.asarray(b[name])), name


def test_published_values_lie_where_the_model_reads_them(tmp_path):
    directory, tensors = _directory(tmp_path, shards=3)
    model = hybrid_jax.load(directory)
    runs = model.stack.runs
    layer = "model.layers.1"
    # Row h * 3K + p * K + k of the fused projection is part p (query, key, value) of head h.
    qkv = tensors[f"{layer}.self_attn.qkv_proj.weight"].reshape(H, 3, K, D)
    assert np.array_equal(runs[0].mixer.qkv[...][0, 1], np.einsum("hpkd->dhpk", qkv))
    w3 = tensors[f"{layer}.block_sparse_moe.experts.2.w3.weight"]
    gate_up = runs[0].ffn.gate_up[...]
    assert gate_up.shape[-3:] == (D, 2, F)
    assert np.array_equal(gate_up[0, 1, 2, :, 1], w3.T)
    out = tensors["model.layers.2.self_attn.o_proj.weight"].reshape(D, H, K)
    assert np.array_equal(runs[1].mixer.out[...][0, 0], np.einsum("dhk->hkd", out))
    assert np.array_equal(model.head.kernel[...], tensors["lm_head.weight"].T)


@pytest.mark.parametrize("format", FORMATS)
def test_save_and_load_give_the_model_back(tmp_path, format):
    directory, _ = _directory(tmp_path)
    model = hybrid_jax.load(directory)
    hybrid_jax.save(model, tmp_path / "saved", format=format)
    again = hybrid_jax.load(tmp_path / "saved")
    _same(model, again)
    named = dataclasses.replace(again.config, name=model.config.name)
    assert named == model.config
    assert sorted(os.listdir(tmp_path)) == ["saved", "src"]


def test_saving_as_released_gives_the_loaded_bytes(tmp_path):
    for config in (original_config(shared_intermediate_size=5), m2_config()):
        directory, tensors = _directory(tmp_path / config["model_type"], config)
        saved = tmp_path / config["model_type"] / "saved"
        hybrid_jax.save(hybrid_jax.load(directory), saved)
        assert published.read_directory(saved) == published.stored(tensors)


def test_the_model_does_not_depend_on_the_container(tmp_path):
    directory, _ = _directory(tmp_path)
    model = hybrid_jax.load(directory)
    for format in FORMATS:
        convert(directory, tmp_path / format, format)
        again = hybrid_jax.load(tmp_path / format)
        assert again.config.layers == model.config.layers
        _same(model, again)


def test_routers_stay_float32_and_everything_else_takes_the_dtype(tmp_path):
    directory, _ = _directory(tmp_path, m2_config(), ml_dtypes.bfloat16)
    for dtype in ("float32", "bfloat16"):
        model = hybrid_jax.load(directory, dtype=dtype)
        for name, array in leaves.arrays(model).items():
            kept = name.endswith(("router", "correction_bias"))
            assert array.dtype == ("float32" if kept else dtype), name
        assert model.config.dtypes.compute == dtype
    with pytest.raises(ValueError, match="float16"):
        hybrid_jax.load(directory, dtype="float16")


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    config = original_config()
    tensors = published.tensors(config, ml_dtypes.bfloat16)
    tensors["lm_head.weight"][3, 2] = np.nan
    directory = published.write_directory(tmp_path / "src", config, tensors)
    with pytest.raises(ValueError, match=r"model.safetensors: tensor 'lm_head.weight' holds 1 val"):
        hybrid_jax.load(directory)
    head = hybrid_jax.load(directory, check_finite=False).head.kernel[...]
    assert np.isnan(head[2, 3]) and np.isnan(head).sum() == 1


def test_fp8_is_dequantised_by_the_formula(tmp_path):
    config = m2_config(quantization_config=FP8_CONFIG)
    tensors = published.quantised(published.tensors(config))
    directory = published.write_directory(tmp_path / "src", config, tensors, shards=2)
    convert(directory, tmp_path / "orbax", "orbax")
    expected = published.dequantised(tensors, "model.layers.1.self_attn.o_proj.weight")
    for place in (directory, tmp_path / "orbax"):
        model = hybrid_jax.load(place)
        out = model.stack.runs[0].mixer.out[...][1, 0]
        assert np.array_equal(out, np.einsum("dhk->hkd", expected.reshape(D, H, K)))


def test_all_parameters_of_a_loaded_model_are_trainable(tmp_path):
    directory, tensors = _directory(tmp_path)
    graph, params = nnx.split(hybrid_jax.load(directory), nnx.Param)
    sizes = [array.size for array in jax.tree.leaves(params)]
    assert sum(sizes) == sum(array.size for array in tensors.values())
    loss = lambda params: nnx.merge(graph, params)(jnp.arange(5)[None]).sum()
    # Traced only; tests of the model and of parity compute gradients.
    gradients = jax.eval_shape(jax.grad(loss), params)
    assert jax.tree.structure(gradients) == jax.tree.structure(params)


def test_orbax_takes_models_that_no_release_can_express(tmp_path):
    config = dataclasses.replace(hybrid_jax.presets.get("nano"), shift_embeddings=True)
    model = _random(config, seed=3)
    for format in ("hf", "hf-original"):
        with pytest.raises(ValueError, match=r"shifted embeddings.*orbax instead"):
            hybrid_jax.save(model, tmp_path / "saved", format=format)
        assert not os.listdir(tmp_path)
    hybrid_jax.save(model, tmp_path / "saved", format="orbax")
    again = hybrid_jax.load(tmp_path / "saved")
    assert again.config == config
    _same(model, again)
    with pytest.raises(ValueError, match="shifted embeddings"):
        convert(tmp_path / "saved", tmp_path / "hf", "hf")
    convert(tmp_path / "saved", tmp_path / "narrow", "orbax", "bfloat16")
    assert text.read_yaml(ModelConfig, tmp_path / "narrow" / "config.yaml").dtypes.parameters == (
        "bfloat16"
    )


def test_tied_embeddings_are_stored_once(tmp_path):
    directory, tensors = _directory(tmp_path, original_config(tie_word_embeddings=True))
    assert "lm_head.weight" not in tensors
    model = hybrid_jax.load(directory)
    hybrid_jax.save(model, tmp_path / "saved", format="hf")
    _same(model, hybrid_jax.load(tmp_path / "saved"))


def test_a_training_run_is_loaded_and_exported(tmp_path):
    recipe = recipes.of_preset("nano", (Source(path="text"),))
    model = _random(recipe.model, seed=1)
    run = tmp_path / "run"
    # The step before last counts: the last is damaged below.
    for step, seed in ((9, 2), (10, 1), (11, 3)):
        params = leaves.arrays(_random(recipe.model, seed))
        place = run / "checkpoints" / str(step)
        ocp.save_checkpointables(place, {"params": params, "optimizer": {"m": jnp.ones(3)}})
        held = digests.hold({f"params/{name}": array for name, array in params.items()})
        manifest.write(place, digests.describe(held))
    text.write_yaml(recipe, run / "config.yaml")
    for name in ("tokenizer.json", "environment.json", "start.json"):
        (run / name).write_text("{}")
    _same(_random(recipe.model, seed=3), hybrid_jax.load(run))
    (run / "checkpoints" / "11" / "_CHECKPOINT_METADATA").write_text("{}")
    (run / "checkpoints" / "12").mkdir()
    said = r"12 has no manifest.*Step 10 is taken instead|11 is not what was written.*Step 10"
    with pytest.warns(UserWarning, match=said):
        _same(model, hybrid_jax.load(run))
    for step in ("11", "12"):
        shutil.rmtree(run / "checkpoints" / step)
    for format in FORMATS:
        convert(run, tmp_path / format, format)
        _same(model, hybrid_jax.load(tmp_path / format))
        assert (tmp_path / format / "tokenizer.json").exists()
        assert not (tmp_path / format / "environment.json").exists()
    # Files that agree with their checksums, and arrays that do not: written so.
    place = run / "checkpoints" / "10"
    written = manifest.read(place)
    (place / manifest.NAME).unlink()
    changed = manifest.read(run / "checkpoints" / "9").arrays["params/embedding.table"]
    manifest.write(place, written.arrays | {"params/embedding.table": changed})
    with pytest.raises(ValueError, match=r"/10: .*embedding\.table has other contents"):
        hybrid_jax.load(run)


def test_sidecars_travel_with_a_saved_model(tmp_path):
    directory, _ = _directory(tmp_path)
    (directory / "tokenizer.json").write_text("{}")
    model = hybrid_jax.load(directory)
    hybrid_jax.save(model, tmp_path / "saved", sidecars=directory)
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == "{}"


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    directory, _ = _directory(tmp_path)
    model = hybrid_jax.load(directory)
    hybrid_jax.save(model, tmp_path / "saved")
    before = published.read_directory(tmp_path / "saved")
    with pytest.raises(ValueError, match="exists and is not empty"):
        hybrid_jax.save(model, tmp_path / "saved")
    real, calls = os.pwrite, []

    def full(fd, data, place):
        calls.append(place)
        if len(calls) > 10:
            raise OSError(28, "No space left on device")
        return real(fd, data, place)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left on device while writing"):
        hybrid_jax.save(model, tmp_path / "saved", overwrite=True)
    assert published.read_directory(tmp_path / "saved") == before
    assert sorted(os.listdir(tmp_path)) == ["saved", "src"]
    monkeypatch.undo()
    hybrid_jax.save(model, tmp_path / "saved", format="hf", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["saved", "src"]
