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


def model(
    directory: pathlib.Path,
    dtype: str,
    mesh: str | None,
    rules: str,
    rows: int = 1,
    quantize: str | None = None,
):
    """(model, placement): on a mesh of all devices that decodes `rows` rows, or on one device.

    `quantize` as in `hybrid_jax.load`. Raises what that does, and ValueError for a mesh that does
    not fit.
    """
    import hybrid_jax

    placement = None
    if mesh is not None:
        from hybrid_jax.model.parallel import placement as placements

        placement = placements.make(mesh, rules).for_decoding(rows)
    loaded = hybrid_jax.load(directory, dtype=dtype, quantize=quantize, placement=placement)
    return loaded, placement


def weights(model) -> dict[str, int]:
    """Bytes of a model's weights, and what they would be if none were quantised."""
    from hybrid_jax import model as models

    whole = models.size_in_bytes(models.abstract(model.config))
    return {"weight_bytes": models.size_in_bytes(model), "unquantised_weight_bytes": whole}
