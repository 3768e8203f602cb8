"""From text files to batches: documents, tokenizer, token store, windows, pipeline."""

from hybrid_jax.data.batch import Batch
from hybrid_jax.data.documents import Document, find_documents
from hybrid_jax.data.pipeline import Batches, evaluation_batches
from hybrid_jax.data.split import is_heldout
from hybrid_jax.data.store import TokenStore, unigram_entropy
from hybrid_jax.data.tokenizer import END_OF_DOCUMENT, Tokenizer, train_tokenizer
from hybrid_jax.data.windows import WindowIndex

__all__ = [
    "END_OF_DOCUMENT",
    "Batch",
    "Batches",
    "Document",
    "TokenStore",
    "Tokenizer",
    "WindowIndex",
    "evaluation_batches",
    "find_documents",
    "is_heldout",
    "train_tokenizer",
    "unigram_entropy",
]
