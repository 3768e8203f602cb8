"""`hybrid-jax convert --dry-run`: the mapping of every stored tensor, or why it is refused."""

import dataclasses
import json


def run(args) -> int:
    """Print the mapping; 0 if the conversion would go through. Raises ValueError if not."""
    from hybrid_jax.checkpoint import rehearsal

    found = rehearsal.rehearse(
        args.src, args.format, args.dtype, language_only=args.language_only, full=args.full
    )
    for line in _table(found.rows):
        print(line)
    for note in found.notes:
        print(f"note: {note}")
    if args.json is not None:
        report = dataclasses.asdict(found) | {"format": args.format, "dtype": args.dtype}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if found.problems:
        raise ValueError(f"{args.src} would not be converted. {' '.join(found.problems)}")
    stored = sum(row.count for row in found.rows)
    print(
        f"{stored:,} stored tensors have their place. {args.format} would hold {found.written:,}, "
        f"{found.bytes:,} bytes; {len(found.dropped):,} stored ones would not be in it."
    )
    return 0


def _table(rows) -> list[str]:
    """`stored [shape] -> leaf[index]`, and how a tensor is split and turned on the way."""
    if not rows:
        return []
    cells = [
        (
            row.name,
            "?" if row.shape is None else str(list(row.shape)),
            f"{row.count:,}",
            _target(row),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {count:>{widths[2]}}  {target}"
        for name, shape, count, target in cells
    ]


_USES = {
    "scale": "multiplies its weight",
    "derived": "is not read: it follows from the config, or is no part of the model",
    "vision": "is not converted: nothing here computes the vision part",
    "unknown": "HAS NO PLACE in the model",
}


def _target(row) -> str:
    if row.leaf is None:
        return _USES[row.use]
    split = f", split to {list(row.split)}" if row.split else ""
    order = f", dims in order {list(row.order)}" if row.order else ""
    return f"-> {row.leaf}{row.index}{split}{order}"
