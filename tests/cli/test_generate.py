"""`hybrid-jax generate`: what it says of bad input, and that a mesh changes nothing."""

import json

import pytest

from hybrid_jax import cli
from hybrid_jax.cli import generate
from tests.checkpoint import published


def test_a_damaged_tokenizer_is_one_sentence(tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_text("{")
    assert cli.main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "tokenizer.json is not a tokenizer.json: EOF" in capsys.readouterr().err


def test_a_token_id_beyond_32_bits_is_outside_the_vocabulary(tmp_path):
    config = published.original_config()
    published.write_directory(tmp_path / "m", config, published.tensors(config))
    with pytest.raises(ValueError, match=r"below vocab_size=.*; got 99999999999"):
        generate.run(generate.Args(str(tmp_path / "m"), token_ids=(99999999999,)))


def test_a_mesh_of_another_size_is_refused(tmp_path, capsys):
    config = published.original_config()
    published.write_directory(tmp_path / "m", config, published.tensors(config))
    options = ["generate", str(tmp_path / "m"), "--token-ids", "1", "2", "--mesh", "tensor=3"]
    assert cli.main(options) == 2
    assert "has 3 devices; there are 8" in capsys.readouterr().err


def test_quantised_weights_are_held_and_said(tmp_path, capsys):
    config = published.original_config()
    path = published.write_directory(tmp_path / "m", config, published.tensors(config))
    out = tmp_path / "out.json"
    args = generate.Args(
        str(path), token_ids=(1, 2, 3), max_new_tokens=2, quantize="int8", json=out
    )
    assert generate.run(args) == 0
    report = json.loads(out.read_text())
    assert len(report["tokens"]) == 2
    # Of float32 a quarter, and what is not quantised; rows of 12 have many scales.
    held, whole = report["weight_bytes"], report["unquantised_weight_bytes"]
    assert whole / 4 < held < whole / 2
    assert f"{held / 1e9:.3f} GB; {whole / 1e9:.3f} GB in float32" in capsys.readouterr().err
    assert cli.main(["generate", str(path), "--token-ids", "1", "--quantize", "int4"]) == 2
    assert "one of int8, fp8; got 'int4'" in capsys.readouterr().err


@pytest.mark.nightly
def test_tokens_are_the_same_on_a_mesh(tmp_path):
    config = published.original_config()
    published.write_directory(tmp_path / "m", config, published.tensors(config))
    tokens = []
    for mesh in (None, "data=4,tensor=2"):
        out = tmp_path / "out.json"
        args = generate.Args(
            str(tmp_path / "m"), token_ids=(1, 2, 3), max_new_tokens=4, mesh=mesh, json=out
        )
        assert generate.run(args) == 0
        tokens.append(json.loads(out.read_text())["tokens"])
    assert tokens[0] == tokens[1]
