"""From documents to batches: sources, tokenizer, token store, packing, mixture, pipeline."""

from hybrid_jax.data.batch import Batch
from hybrid_jax.data.corpus import Part
from hybrid_jax.data.dataset import Dataset, is_dataset, open_dataset, read_summary
from hybrid_jax.data.encoding import Encoded
from hybrid_jax.data.pipeline import Batches, evaluation_batches
from hybrid_jax.data.preparation import prepare, store_tokens
from hybrid_jax.data.split import is_heldout
from hybrid_jax.data.store import TokenStore, unigram_entropy
from hybrid_jax.data.tokenizer import END_OF_DOCUMENT, Tokenizer, train_tokenizer
from hybrid_jax.data.windows import WindowIndex

__all__ = [
    "END_OF_DOCUMENT",
    "Batch",
    "Batches",
    "Dataset",
    "Encoded",
    "Part",
    "TokenStore",
    "Tokenizer",
    "WindowIndex",
    "evaluation_batches",
    "is_dataset",
    "is_heldout",
    "open_dataset",
    "prepare",
    "read_summary",
    "store_tokens",
    "train_tokenizer",
    "unigram_entropy",
]
