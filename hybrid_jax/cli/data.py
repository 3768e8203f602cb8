"""`hybrid-jax data`: tokenise a source ahead of time, look at it, check it."""

import dataclasses
import json
import os
import pathlib
import typing

import tyro

from hybrid_jax.config.data import Packing, Source


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Tokenise a source into a directory that `hybrid-jax train --data` takes.

    Several processes share the work; what was done is kept when it is interrupted, and the same
    command goes on there. Bad records are left out, counted, and named in OUT/skipped.jsonl. Leaves
    OUT/dataset.json (what is in it), lengths.png, tokenizer.json and shards/, the same ones however
    many processes made them.
    """

    path: tyro.conf.Positional[str]
    """A directory, one file, a glob, or a Hugging Face data set on disk: text, .jsonl(.gz),
    .parquet, .array_record or .arrow."""
    out: pathlib.Path
    """Directory to make, or to go on with."""
    tokenizer: pathlib.Path | None = None
    """A tokenizer.json; left out, one with --vocab-size entries is trained on the source."""
    vocab_size: int = 32768
    """Entries of a tokenizer that is trained here."""
    format: str = "auto"
    """auto, text, jsonl, parquet, arrayrecord or arrow."""
    pattern: str = "*"
    """Names of the files to take from a directory, e.g. '*.jsonl'."""
    exclude: tuple[str, ...] = ()
    """Paths below the directory to leave out, as globs."""
    field: str = "text"
    """The field of a record that holds its text."""
    template: str | None = None
    """How conversations become text: minimax-text-01, minimax-m1 or minimax-m2."""
    control: str | None = None
    """A template whose control tokens a tokenizer that is trained here gets as well, for
    conversations that a later run learns from."""
    heldout_fraction: float = 0.05
    """Share of the documents kept for evaluation."""
    deduplicate: bool = False
    """Leave out documents whose text was there before."""
    workers: int = -1
    """Processes to share the work; 0 uses none but this one, -1 as many as there are cores."""

    def run(self) -> int:
        from rich import progress

        from hybrid_jax import data, observe
        from hybrid_jax.data import corpus

        source = Source(
            path=self.path,
            format=self.format,
            pattern=self.pattern,
            exclude=self.exclude,
            field=self.field,
            template=self.template,
        )
        if self.tokenizer is not None:
            tokenizer = data.Tokenizer.load(self.tokenizer)
        elif (self.out / "tokenizer.json").is_file():
            tokenizer = data.Tokenizer.load(self.out / "tokenizer.json")
        else:
            tokenizer = corpus.make_tokenizer(
                (source,), self.vocab_size, self.heldout_fraction, print, self.control
            )
        with progress.Progress(
            progress.TextColumn("tokenising"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[tokens]:,} tokens"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("/"),
            progress.TimeRemainingColumn(),
        ) as shown:
            task = shown.add_task("", total=None, tokens=0)
            made = data.prepare(
                source,
                self.out,
                tokenizer,
                heldout_fraction=self.heldout_fraction,
                deduplicate=self.deduplicate,
                num_workers=(os.cpu_count() or 1) if self.workers < 0 else self.workers,
                report=lambda done, total, tokens: shown.update(
                    task, completed=done, total=total, tokens=tokens
                ),
            )
        observe.draw_lengths(made.summary["lengths"], self.out / "lengths.png", title=source.label)
        print(_described(made))
        return 0


@dataclasses.dataclass(frozen=True)
class Show:
    """Say what is in a prepared source, how full rows of it are, and show one as text."""

    path: tyro.conf.Positional[pathlib.Path]
    """What `hybrid-jax data prepare` made."""
    sequence_length: int = 4096
    """Tokens a row."""
    packing: typing.Literal["Concatenate", "FirstFit", "Aligned"] = "Concatenate"
    """How documents share rows."""
    row: int | None = None
    """A row to show, as text: ⟦...⟧ is not learned, │ separates documents."""

    def run(self) -> int:
        from hybrid_jax import data

        opened = data.open_dataset(self.path)
        print(_described(opened))
        packing = {kind.__name__: kind for kind in typing.get_args(Packing)}[self.packing]()
        windows = data.WindowIndex(opened.training, self.sequence_length, 0, packing)
        print(
            f"{len(windows):,} rows of {self.sequence_length}, packed by {self.packing}: "
            f"{windows.efficiency:.2%} of the places hold tokens."
        )
        if self.row is not None:
            print(_row_text(opened, windows[self.row]))
        return 0


@dataclasses.dataclass(frozen=True)
class Verify:
    """Read all of a prepared source and hold it against its checksums; exit code 1 if it is not as
    it was written."""

    path: tyro.conf.Positional[pathlib.Path]
    """What `hybrid-jax data prepare` made."""

    def run(self) -> int:
        from hybrid_jax import data

        opened = data.open_dataset(self.path)
        try:
            opened.verify()
        except ValueError as error:
            print(f"failed: {error}. Delete the directory to tokenise again.")
            return 1
        print(f"{self.path}: {opened.summary['shards']} shards are as they were written.")
        return 0


Args = (
    typing.Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | typing.Annotated[Show, tyro.conf.subcommand("show")]
    | typing.Annotated[Verify, tyro.conf.subcommand("verify")]
)


def run(args) -> int:
    """The exit code of the chosen subcommand."""
    return args.run()


def _described(dataset) -> str:
    summary, lengths = dataset.summary, dataset.summary["lengths"]
    lines = [
        f"{dataset.path}: {summary['documents'] - summary['duplicates']:,} documents, "
        f"{dataset.training.num_tokens + dataset.heldout.num_tokens:,} tokens in "
        f"{summary['shards']} shards, vocabulary {dataset.tokenizer.vocab_size}.",
        f"To learn from: {dataset.training.num_documents:,} documents, "
        f"{dataset.training.num_tokens:,} tokens; held out: {dataset.heldout.num_documents:,}, "
        f"{dataset.heldout.num_tokens:,}.",
        f"Tokens in a document: median {lengths['median']:,}, mean {lengths['mean']:,.0f}, "
        f"99% below {lengths['p99']:,}, longest {lengths['longest']:,}.",
    ]
    if summary["duplicates"]:
        lines.append(f"Duplicates left out: {summary['duplicates']:,}.")
    if summary["skipped"]:
        lines.append(
            f"Bad records left out: {json.dumps(summary['skipped'])}; the first of them are in "
            "skipped.jsonl."
        )
    return "\n".join(lines)


def _row_text(dataset, row) -> str:
    """Targets of a row, decoded stretch by stretch."""
    text, decode = "", dataset.tokenizer.backend.decode
    kinds = list(zip(row.segment_ids_BT.tolist(), (row.weights_BT > 0).tolist(), strict=True))
    begin = 0
    for end in range(1, len(kinds) + 1):
        if end < len(kinds) and kinds[end] == kinds[begin]:
            continue
        segment, learned = kinds[begin]
        piece = decode(row.targets_BT[begin:end].tolist(), skip_special_tokens=False)
        if segment:
            text += "│" * (begin > 0 and kinds[begin - 1][0] != segment)
            text += piece if learned else f"⟦{piece}⟧"
        begin = end
    return text
