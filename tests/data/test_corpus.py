"""The standard library's own text, packed into rows of 4096 tokens: next to no padding."""

import sysconfig

import pytest

from hybrid_jax import data
from hybrid_jax.config.data import Concatenate, FirstFit, Source
from hybrid_jax.data import corpus

EXCLUDE = ("test/*", "*/test/*", "*/tests/*", "site-packages/*", "idlelib/*")


@pytest.mark.nightly
def test_rows_of_4096_tokens_are_99_percent_full(tmp_path):
    source = Source(path=sysconfig.get_paths()["stdlib"], pattern="*.py", exclude=EXCLUDE)
    tokenizer = corpus.make_tokenizer((source,), 8192, 0.05, note=lambda text: None)
    made = data.prepare(source, tmp_path / "stdlib", tokenizer)
    for packing in (Concatenate(), FirstFit()):
        windows = data.WindowIndex(made.training, 4096, 0, packing)
        filled = sum(int((row.segment_ids_BT > 0).sum()) for row in windows)
        assert filled == windows.num_pairs
        assert windows.efficiency >= 0.99
