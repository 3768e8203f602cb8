"""Byte-level BPE: training, storing and using it; every text goes there and back unchanged."""

import json
import pathlib

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_DOCUMENT = "<|end_of_document|>"
# What ends a document in our own tokenizers, in those of Text-01 and M1, and in those of M2.
_ENDS = (END_OF_DOCUMENT, "<end_of_document>", "[e~[")


class Tokenizer:
    """Text to ids and back, with the id that ends a document."""

    def __init__(self, backend: tokenizers.Tokenizer, source: str = "the tokenizer"):
        ends = [backend.token_to_id(token) for token in _ENDS]
        end = next((idx for idx in ends if idx is not None), None)
        if end is None:
            raise ValueError(
                f"{source} has none of the tokens {', '.join(map(repr, _ENDS))}, one of which "
                "separates documents. Train one with hybrid-jax, or add that token to the file."
            )
        # A document that spells out a special token must not end there. Not stored in the file.
        backend.encode_special_tokens = True
        self.backend = backend
        self.end_id: int = end

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """Read a tokenizer.json. Raises FileNotFoundError or ValueError."""
        return cls(read_backend(path), str(path))

    def save(self, path) -> None:
        """Write tokenizer.json, whole or not at all."""
        path = pathlib.Path(path)
        beside = path.with_name(f"{path.name}.new")
        self.backend.save(str(beside))
        beside.replace(path)

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to this, exclusive."""
        return self.backend.get_vocab_size()

    def id_of(self, token: str) -> int:
        """Id of a special token. Raises ValueError if there is none."""
        idx = self.backend.token_to_id(token)
        if idx is None:
            raise ValueError(f"The tokenizer has no token {token!r}.")
        return idx

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; the name of a special token inside it is plain text."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [item.ids for item in encoded]

    def decode(self, ids) -> str:
        """Text of ids; an end of document is dropped, broken UTF-8 becomes U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)


def read_backend(path) -> tokenizers.Tokenizer:
    """The library's tokenizer in a tokenizer.json. Raises FileNotFoundError or ValueError."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no tokenizer at {path}.")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer.json: {error}.") from error


def train_tokenizer(
    texts, vocab_size: int, progress: bool = False, control: tuple[str, ...] = ()
) -> Tokenizer:
    """A byte-level BPE tokenizer with at most `vocab_size` ids; the same texts give the same one.

    A small corpus may give fewer. `control` are tokens that templates of conversations write.
    Raises ValueError if `vocab_size` cannot hold all bytes and those.
    """
    special = [END_OF_DOCUMENT, *control]
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: 256 bytes and {', '.join(map(repr, special))} "
            f"need {smallest}."
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    backend.train_from_iterator(iter(texts), trainer=trainer)
    return Tokenizer(backend)


def write_hugging_face(tokenizer: Tokenizer, directory) -> None:
    """tokenizer.json and tokenizer_config.json, as transformers' AutoTokenizer wants them."""
    directory = pathlib.Path(directory)
    tokenizer.save(directory / "tokenizer.json")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
