"""`hybrid-jax generate`: what it says of bad input."""

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
