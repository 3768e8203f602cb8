"""All sources of a run, tokenised by one tokenizer: made once, then opened by every process."""

import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from hybrid_jax.config.data import Data, Source
from hybrid_jax.config.text import near_names
from hybrid_jax.data import chat, encoding, sources
from hybrid_jax.data.dataset import Dataset, is_dataset, open_dataset
from hybrid_jax.data.preparation import prepare, tokenizer_hash
from hybrid_jax.data.split import is_heldout
from hybrid_jax.data.store import TokenStore
from hybrid_jax.data.tokenizer import Tokenizer, train_tokenizer

# Up to so many bytes are held against their checksums whenever they are opened: about a second.
# More is left to `hybrid-jax data verify`.
_VERIFIED_BYTES = 1 << 32
# A tokenizer learns nothing more from more text than this.
_SAMPLE_CHARACTERS = 1 << 28

Note = Callable[[str], None]


class Part(NamedTuple):
    """One source, tokenised."""

    source: Source
    training: TokenStore
    heldout: TokenStore | None
    """None if nothing is held out."""


def make(config: Data, directory: pathlib.Path, vocab_size: int, tokenizer_file, note: Note):
    """Tokenise what is not prepared yet into `directory`; returns the parts, as `load` does.

    `tokenizer_file` is used if it is there, else made: from `config.tokenizer`, from the prepared
    sources, or trained on the text with `vocab_size` entries. Raises ValueError or OSError.
    """
    prepared = {s.label: open_dataset(s.path) for s in config.sources if is_dataset(s.path)}
    tokenizer = _tokenizer(config, prepared, vocab_size, pathlib.Path(tokenizer_file), note)
    for number, source in enumerate(config.sources):
        if source.label in prepared:
            _check_prepared(source, prepared[source.label], config, tokenizer)
            continue
        note(f"Tokenising {source.label} ...")
        made = prepare(
            source,
            place_of(directory, number),
            tokenizer,
            heldout_fraction=config.heldout_fraction,
            deduplicate=config.deduplicate,
        )
        _tell(made, note)
    return load(config, directory, verify=True)


def load(config: Data, directory: pathlib.Path, *, verify: bool = False) -> tuple[Part, ...]:
    """What `make` made. Raises ValueError if it is missing or damaged, or nothing is left of it."""
    return tuple(
        _part(source, place_of_source(source, directory, number), verify)
        for number, source in enumerate(config.sources)
    )


def chat_template(config: Data) -> str | None:
    """How others write conversations to what learned from these; None if from none, or several."""
    names = {source.template for source in config.sources}
    texts = {chat.published(name) for name in names if name is not None}
    return texts.pop() if len(texts) == 1 else None


def place_of(directory: pathlib.Path, number: int) -> pathlib.Path:
    """Where source `number` is tokenised to if it is not prepared."""
    return directory / f"{number:02}"


def place_of_source(source: Source, directory: pathlib.Path, number: int) -> pathlib.Path:
    """Where the tokens of a source are."""
    return pathlib.Path(source.path) if is_dataset(source.path) else place_of(directory, number)


def _part(source: Source, place: pathlib.Path, verify: bool) -> Part:
    dataset = open_dataset(place)
    if verify and dataset.num_bytes <= _VERIFIED_BYTES:
        try:
            dataset.verify()
        except ValueError as error:
            raise ValueError(f"{error}. Delete {dataset.path} to tokenise again.") from error
    training, heldout = (
        store.select(source.min_tokens, source.max_tokens)
        for store in (dataset.training, dataset.heldout)
    )
    if not training.num_documents:
        count = dataset.training.num_documents + dataset.heldout.num_documents
        if not dataset.training.num_documents:
            raise ValueError(
                f"All {count} documents of {source.label} fell into the held-out part. Give more "
                "documents, or --data.heldout-fraction 0."
            )
        raise ValueError(
            f"{source.label} has no document of {source.min_tokens} to {source.max_tokens} tokens "
            f"to learn from; its longest has {int(dataset.training.lengths.max())}."
        )
    return Part(source, training, heldout if (heldout.lengths > 1).any() else None)


def _check_prepared(source: Source, dataset: Dataset, config: Data, tokenizer: Tokenizer) -> None:
    if dataset.summary["tokenizer"] != tokenizer_hash(tokenizer):
        raise ValueError(
            f"{source.path} was prepared with another tokenizer than this run uses. Prepare it "
            "with the same one, or give --data.tokenizer "
            f"{dataset.path / 'tokenizer.json'} if all sources were."
        )


def _tell(dataset: Dataset, note: Note) -> None:
    summary = dataset.summary
    note(
        f"{dataset.training.num_documents:,} documents, {dataset.training.num_tokens:,} tokens, "
        f"vocabulary {dataset.tokenizer.vocab_size}; {dataset.heldout.num_documents} held out."
    )
    if summary["duplicates"]:
        note(f"{summary['duplicates']} duplicates left out.")
    if summary["skipped"]:
        what = ", ".join(f"{count} {reason}" for reason, count in summary["skipped"].items())
        note(f"Left out: {what}; see {dataset.path / 'skipped.jsonl'}.")


def _tokenizer(config: Data, prepared: dict[str, Dataset], vocab_size: int, file, note: Note):
    if file.exists():
        try:
            return Tokenizer.load(file)
        except ValueError as error:
            raise ValueError(f"{error} Delete it to have one made from the text again.") from error
    if config.tokenizer is not None:
        tokenizer = Tokenizer.load(config.tokenizer)
    elif prepared:
        tokenizer = next(iter(prepared.values())).tokenizer
    else:
        tokenizer = make_tokenizer(config.sources, vocab_size, config.heldout_fraction, note)
    tokenizer.save(file)
    return tokenizer


def make_tokenizer(
    wanted: tuple[Source, ...],
    vocab_size: int,
    heldout_fraction: float,
    note: Note,
    template: str | None = None,
) -> Tokenizer:
    """One trained on what is learned from, with the control tokens that its templates need.

    And those of `template`, for what is learned later. Raises ValueError if there is none such.
    """
    if template not in (None, *chat.CONTROL):
        raise ValueError(
            f"There is no template {template!r}.{near_names(str(template), chat.CONTROL)} "
            f"Templates: {', '.join(chat.CONTROL)}."
        )
    templates = [each for each in (template, *(s.template for s in wanted)) if each is not None]
    control = dict.fromkeys(token for name in templates for token in chat.CONTROL[name])
    note(f"Training a tokenizer with {vocab_size} entries ...")
    texts = (text for source in wanted for text in _texts(source, heldout_fraction, len(wanted)))
    return train_tokenizer(texts, vocab_size, control=tuple(control))


def _texts(source: Source, heldout_fraction: float, shares: int) -> Iterator[str]:
    """Text to train a tokenizer on: all of it, or of units evenly spread over the source."""
    left = _SAMPLE_CHARACTERS // shares
    units = sources.units(source)
    # Every 16th unit, then those between: whatever there is room for is spread.
    for unit in (unit for start in range(16) for unit in units[start::16]):
        for record in sources.read(unit):
            if isinstance(record, sources.Skipped) or is_heldout(record.name, heldout_fraction):
                continue
            for text in _texts_of(source, record):
                left -= len(text)
                yield text
        if left <= 0:
            return


def _texts_of(source: Source, record: sources.Record) -> list[str]:
    if source.template is None:
        text = encoding.text_of(source, record)
        return [text] if isinstance(text, str) else []
    conversation = encoding.conversation_of(record)
    if isinstance(conversation, sources.Skipped):
        return []
    return [piece.text for piece in chat.render(source.template, conversation)]


def fingerprint(parts: tuple[Part, ...]) -> str:
    """Identifies the data of a run."""
    return "-".join(part.training.fingerprint() for part in parts)


def check_vocabulary(parts: tuple[Part, ...], vocab_size: int) -> None:
    """Raise ValueError if an id of any part does not fit the model."""
    for part in parts:
        part.training.check_vocabulary(vocab_size, part.source.label)
