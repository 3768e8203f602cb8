"""The tokenizer gives every text back, is the same every time, and keeps its special token."""

import copy
import json
import pathlib

import pytest

from hybrid_jax import data
from hybrid_jax.data import tokenizer as tokenizer_lib

TEXTS = ["def f(x):\n    return x\n" * 5, "for idx in range(10):\n    print(idx)\n" * 5]


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(TEXTS, 300)


def test_every_text_comes_back(tokenizer, tmp_path):
    awkward = "\t tabs\r\n  é 漢字 🙂 \x00 <|end_of_document|> trailing  "
    ids = tokenizer.encode(awkward)
    assert tokenizer.decode(ids) == awkward
    # Spelled out in a text, the special token ends no document.
    assert tokenizer.end_id not in ids
    assert tokenizer.encode_batch([awkward, ""]) == [ids, []]
    tokenizer.save(tmp_path / "tokenizer.json")
    assert data.Tokenizer.load(tmp_path / "tokenizer.json").encode(awkward) == ids


def test_training_is_deterministic_and_counts_its_vocabulary(tokenizer):
    again = data.train_tokenizer(TEXTS, 300)
    assert again.backend.to_str() == tokenizer.backend.to_str()
    assert 257 < tokenizer.vocab_size <= 300
    with pytest.raises(ValueError, match=r"vocab_size=256 is too small.*need 257"):
        data.train_tokenizer(TEXTS, 256)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        data.Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json is not a tokenizer.json"):
        data.Tokenizer.load(tmp_path / "bad.json")


def test_a_torn_file_never_bears_the_name(tokenizer, tmp_path):
    class FullDisk:
        def save(self, path):
            pathlib.Path(path).write_text("{")
            raise OSError(28, "No space left on device")

    torn = copy.copy(tokenizer)
    torn.backend = FullDisk()
    with pytest.raises(OSError, match="No space left"):
        torn.save(tmp_path / "tokenizer.json")
    assert not (tmp_path / "tokenizer.json").exists()


def test_transformers_reads_the_exported_tokenizer(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer_lib.write_hugging_face(tokenizer, tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXTS[0])["input_ids"] == tokenizer.encode(TEXTS[0])
    assert theirs.eos_token_id == tokenizer.end_id
