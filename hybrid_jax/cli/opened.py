"""What `generate` and `eval` are given: the directory of a checkpoint or of a training run."""

import pathlib

# Names under which tokenizers know the end of a text: ours, MiniMax-M2's, Text-01's.
_ENDS = ("<|end_of_document|>", "[e~[", "<end_of_sentence>")


def directory(path: str) -> pathlib.Path:
    """The directory; ValueError if it is none."""
    found = pathlib.Path(path)
    if not found.is_dir():
        raise ValueError(f"{found} is not a directory; give a checkpoint or a training run.")
    return found


def tokenizer(directory: pathlib.Path):
    """The tokenizer in a directory, as the library has it; None without a tokenizer.json.

    Raises ValueError if that file is damaged.
    """
    from hybrid_jax.data.tokenizer import read_backend

    path = directory / "tokenizer.json"
    return read_backend(path) if path.is_file() else None


def end_id(tokenizer) -> int | None:
    """The id that ends a text; None if the tokenizer is None or has no such token."""
    if tokenizer is None:
        return None
    ids = [tokenizer.token_to_id(name) for name in _ENDS]
    return next((idx for idx in ids if idx is not None), None)


def model(directory: pathlib.Path, dtype: str, mesh: str | None, rules: str, rows: int = 1):
    """(model, placement): on a mesh of all devices that decodes `rows` rows, or on one device.

    Raises what `hybrid_jax.load` does, and ValueError for a mesh that does not fit.
    """
    import hybrid_jax

    placement = None
    if mesh is not None:
        from hybrid_jax.model.parallel import placement as placements

        placement = placements.make(mesh, rules).for_decoding(rows)
    return hybrid_jax.load(directory, dtype=dtype, placement=placement), placement
