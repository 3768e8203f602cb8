"""A source, tokenised ahead of time: in parallel, continued where it was interrupted.

The directory of a prepared source holds plan.json (what is made of what), tokenizer.json, shards/
(`shards`, one for each unit), and last of all kept.npy and dataset.json. What it holds depends on
the source alone, not on how many workers made it or how often they were interrupted.
"""

import functools
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import xxhash

from hybrid_jax.config import text as config_text
from hybrid_jax.config.data import Source
from hybrid_jax.data import chat, encoding, shards, sources, workers
from hybrid_jax.data.dataset import FORMAT, Dataset, open_dataset
from hybrid_jax.data.tokenizer import Tokenizer

_RECORDS_AT_A_TIME = 256
_TOKENS_A_SHARD = 1 << 26

Report = Callable[[int, int, int], None]
"""(units done, units in all, tokens so far)"""


def prepare(
    source: Source,
    directory,
    tokenizer: Tokenizer,
    *,
    heldout_fraction: float = 0.05,
    deduplicate: bool = False,
    num_workers: int = 0,
    report: Report = lambda done, total, tokens: None,
) -> Dataset:
    """Tokenise `source` into `directory`, or go on with what is there.

    With `num_workers` as many processes share the work, else this one does it. Raises
    FileNotFoundError or ValueError if there is nothing to take, ValueError if the directory holds
    something else or the files have changed since, OSError if workers die again and again.
    """
    if source.template is not None:
        chat.check_tokenizer(source.template, tokenizer)
    directory = pathlib.Path(directory)
    plan = _plan(source, tokenizer, heldout_fraction, deduplicate)
    _claim(directory, plan, tokenizer)
    units = [sources.Unit(*unit) for unit in plan["units"]]
    place = directory / "shards"
    missing = [n for n in range(len(units)) if shards.read_facts(place, n) is None]
    if not missing and (directory / "dataset.json").is_file():
        return open_dataset(directory)
    task = functools.partial(_make_shard, source, str(directory), heldout_fraction)
    done = len(units) - len(missing)
    tokens = sum(_facts(place, n).tokens for n in range(len(units)) if n not in set(missing))
    report(done, len(units), tokens)
    jobs = [(number, units[number]) for number in missing]
    for made in workers.run(task, jobs, num_workers, _names):
        done, tokens = done + 1, tokens + made
        report(done, len(units), tokens)
    _finish(source.path, directory, len(units), plan["tokenizer"], deduplicate)
    return open_dataset(directory)


def store_tokens(
    documents: Iterable[encoding.Encoded],
    directory,
    tokenizer: Tokenizer,
    *,
    heldout_fraction: float = 0.05,
) -> Dataset:
    """Documents that are tokens already, as a prepared source in a new directory.

    `tokenizer` is the one that their ids are of. Raises ValueError if the directory holds anything
    or there is no document.
    """
    directory = pathlib.Path(directory)
    _claim_new(directory, tokenizer)
    place, count = directory / "shards", 0
    for count, group in enumerate(_groups(documents), start=1):
        shards.write(
            place,
            count - 1,
            group,
            vocab_size=tokenizer.vocab_size,
            heldout_fraction=heldout_fraction,
        )
    plan = {"version": FORMAT, "settings": "stored", "units": [[]] * count}
    shards.write_whole(directory / "plan.json", json.dumps(plan) + "\n")
    _finish(str(directory), directory, count, tokenizer_hash(tokenizer), False)
    return open_dataset(directory)


def _groups(documents: Iterable[encoding.Encoded]) -> Iterator[list[encoding.Encoded]]:
    """Documents of about a shard's size together."""
    group: list[encoding.Encoded] = []
    tokens = 0
    for document in documents:
        group.append(document)
        tokens += len(document.ids)
        if tokens >= _TOKENS_A_SHARD:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _names(job) -> str:
    _, unit = job
    return ", ".join(path for _, path in unit.files[:3])


def _plan(source: Source, tokenizer: Tokenizer, heldout_fraction: float, deduplicate: bool) -> dict:
    """All that decides what the directory will hold."""
    kept = {"format", "pattern", "exclude", "field", "template"}
    settings = {k: v for k, v in config_text.to_dict(source).items() if k in kept}
    units = sources.units(source)
    files = {path for unit in units for _, path in unit.files}
    stats = {path: pathlib.Path(path).stat() for path in sorted(files)}
    return {
        "version": FORMAT,
        "settings": settings | {"heldout_fraction": heldout_fraction, "deduplicate": deduplicate},
        "tokenizer": tokenizer_hash(tokenizer),
        "files": {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()},
        "units": [[unit.format, unit.files, unit.begin, unit.end] for unit in units],
    }


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Equal if and only if the tokenizers are."""
    return xxhash.xxh3_128_hexdigest(tokenizer.backend.to_str().encode())


def _claim(directory: pathlib.Path, plan: dict, tokenizer: Tokenizer) -> None:
    """Make the directory for this plan, or find that it already is. Raises ValueError."""
    file = directory / "plan.json"
    if file.is_file():
        try:
            old = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}). {_START_AGAIN}") from error
        new = json.loads(json.dumps(plan))
        if changed := [key for key in new if old.get(key) != new[key]]:
            raise ValueError(
                f"{directory} was begun with other {', '.join(changed)}. {_START_AGAIN}"
            )
        return
    _claim_new(directory, tokenizer)
    shards.write_whole(file, json.dumps(plan) + "\n")


def _claim_new(directory: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Make the directory with a tokenizer in it. Raises ValueError if it holds anything."""
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} already holds other files. Choose another directory.")
    (directory / "shards").mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory / "tokenizer.json")


_START_AGAIN = "Delete it to tokenise again, or choose another directory."


def _make_shard(source: Source, directory: str, heldout_fraction: float, job) -> int:
    """Tokenise one unit; the number of its tokens. Runs in a worker."""
    number, unit = job
    tokenizer = _tokenizer(f"{directory}/tokenizer.json")
    facts = shards.write(
        pathlib.Path(directory) / "shards",
        number,
        _encoded(source, unit, tokenizer),
        vocab_size=tokenizer.vocab_size,
        heldout_fraction=heldout_fraction,
    )
    return facts.tokens


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return Tokenizer.load(path)


def _encoded(source: Source, unit: sources.Unit, tokenizer: Tokenizer) -> Iterator:
    waiting: list[sources.Record] = []
    for item in sources.read(unit):
        if isinstance(item, sources.Skipped):
            yield item
            continue
        waiting.append(item)
        if len(waiting) == _RECORDS_AT_A_TIME:
            yield from encoding.encode(source, waiting, tokenizer)
            waiting = []
    yield from encoding.encode(source, waiting, tokenizer)


def _facts(place: pathlib.Path, number: int) -> shards.Facts:
    facts = shards.read_facts(place, number)
    if facts is None:
        raise OSError(f"{place / f'{number:05}.json'} has vanished; run the same command again.")
    return facts


def _histogram(lengths: np.ndarray) -> dict:
    """Documents and their tokens by length, in bins that double, and a few quantiles."""
    edges = 1 << np.arange(0, max(2, int(lengths.max()).bit_length() + 1))
    documents, _ = np.histogram(lengths, edges)
    tokens, _ = np.histogram(lengths, edges, weights=lengths)
    names = ("shortest", "median", "p90", "p99", "longest")
    quantiles = np.quantile(lengths, (0, 0.5, 0.9, 0.99, 1)).astype(int).tolist()
    return {
        "edges": edges.tolist(),
        "documents": documents.tolist(),
        "tokens": tokens.astype(int).tolist(),
        "mean": float(lengths.mean()),
    } | dict(zip(names, quantiles, strict=True))


def _finish(
    name: str, directory: pathlib.Path, count: int, tokenizer: str, deduplicate: bool
) -> None:
    """Count, mark duplicates, and say that all of the `count` shards are there."""
    place = directory / "shards"
    facts = [_facts(place, number) for number in range(count)]
    skipped: Counter[str] = Counter()
    for each in facts:
        skipped.update(each.skipped)
    lines = [json.dumps(named) + "\n" for each in facts for named in each.named]
    shards.write_whole(directory / "skipped.jsonl", "".join(lines))
    documents = sum(each.documents for each in facts)
    if not documents:
        what = ", ".join(f"{number} {reason}" for reason, number in skipped.items()) or "no record"
        first = f" The first: {json.loads(lines[0])}." if lines else ""
        raise ValueError(f"{name} holds nothing to learn from: {what}.{first}")
    tables = [shards.load(place, number).documents for number in range(count)]
    kept = np.ones(documents, bool)
    if deduplicate:
        hashes = np.ascontiguousarray(np.concatenate([table["hash"] for table in tables]))
        kept[:] = False
        kept[np.unique(hashes, return_index=True)[1]] = True
    np.save(directory / "kept.npy", kept)
    summary = {
        "version": FORMAT,
        "documents": documents,
        "duplicates": int((~kept).sum()),
        "tokens": sum(each.tokens for each in facts),
        "shards": count,
        "skipped": dict(skipped),
        "tokenizer": tokenizer,
        "lengths": _histogram(np.concatenate([table["length"] for table in tables])[kept]),
    }
    shards.write_whole(directory / "dataset.json", json.dumps(summary, indent=2) + "\n")
