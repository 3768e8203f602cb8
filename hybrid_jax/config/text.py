"""Configuration trees as text: dicts and YAML both ways, and one leaf a line to read or diff."""

import dataclasses
import difflib
import pathlib
import reprlib
import types
import typing

import yaml

# A config of hundreds of different layers has some hundred kilobytes.
_MAX_BYTES = 10_000_000
_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_REPR.maxstring = _REPR.maxother = 200


def near_names(name: str, known) -> str:
    """' Did you mean ...?' with the closest of `known`, or '' if nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=2)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def to_dict(config):
    """A config as dicts, lists and scalars; a member of a union carries its class as `kind`."""
    if dataclasses.is_dataclass(config):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"kind": type(config).__name__} | fields
    if isinstance(config, tuple):
        return [to_dict(item) for item in config]
    return config


def from_dict(cls, tree, path: str = ""):
    """The inverse of `to_dict`: builds and checks a `cls`.

    Raises ValueError naming the path of an unknown, missing or mistyped field, with near names.
    """
    return _build(cls, tree, path or cls.__name__)


def dump(config, prefix: str = "") -> str:
    """One leaf a line, `pattern[0].layer.mixer.num_heads = 64`: goldens, logs and diffs."""
    return "".join(f"{path} = {value!r}\n" for path, value in _leaves(config, prefix))


def to_yaml(config) -> str:
    """A config as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def write_yaml(config, path) -> None:
    """Store a config as YAML; `read_yaml` gives it back equal."""
    pathlib.Path(path).write_text(to_yaml(config), encoding="utf-8")


def read_yaml(cls, path):
    """A config from a YAML file; ValueError names the file and what is wrong in it."""
    path = pathlib.Path(path)
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ValueError(f"{path} is {size} bytes long; expected a config of {_MAX_BYTES} at most.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable YAML: {error}") from error
    try:
        return from_dict(cls, tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _leaves(config, path):
    if dataclasses.is_dataclass(config):
        yield f"{path}.kind" if path else "kind", type(config).__name__
        for field in dataclasses.fields(config):
            inner = f"{path}.{field.name}" if path else field.name
            yield from _leaves(getattr(config, field.name), inner)
    elif isinstance(config, tuple):
        for idx, item in enumerate(config):
            yield from _leaves(item, f"{path}[{idx}]")
    else:
        yield path, config


def _build(annotation, tree, path):
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return _build_union(typing.get_args(annotation), tree, path)
    if origin is tuple:
        if not isinstance(tree, (list, tuple)):
            raise ValueError(f"{path} must be a list; got {_shown(tree)}.")
        item = typing.get_args(annotation)[0]
        return tuple(_build(item, value, f"{path}[{idx}]") for idx, value in enumerate(tree))
    if dataclasses.is_dataclass(annotation):
        return _build_dataclass(annotation, tree, path)
    return _build_scalar(annotation, tree, path)


def _build_union(members, tree, path):
    if tree is None and type(None) in members:
        return None
    members = [member for member in members if member is not type(None)]
    if len(members) == 1:
        return _build(members[0], tree, path)
    if all(not dataclasses.is_dataclass(member) for member in members):
        for member in members:
            if isinstance(tree, member) and not isinstance(tree, bool):
                return tree
        raise ValueError(
            f"{path} must be one of {[m.__name__ for m in members]}; got {_shown(tree)}."
        )
    kinds = {member.__name__: member for member in members}
    kind = tree.get("kind") if isinstance(tree, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"{path} needs `kind`, one of {sorted(kinds)}; got {_shown(kind)}."
            f"{near_names(kind, kinds) if isinstance(kind, str) else ''}"
        )
    return _build_dataclass(kinds[kind], tree, path)


def _build_dataclass(cls, tree, path):
    if not isinstance(tree, dict):
        raise ValueError(
            f"{path} must be a mapping of the fields of {cls.__name__}; got {_shown(tree)}."
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name in tree:
        if name not in fields and name != "kind":
            raise ValueError(
                f"{path} has no field {name!r}.{near_names(str(name), fields)} "
                f"Fields: {', '.join(fields)}."
            )
    if tree.get("kind", cls.__name__) != cls.__name__:
        raise ValueError(f"{path} must be a {cls.__name__}; got kind {_shown(tree['kind'])}.")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING
        if required and field.default_factory is dataclasses.MISSING and name not in tree:
            raise ValueError(f"{path} lacks the field {name!r} of {cls.__name__}.")
    values = {
        name: _build(hints[name], value, f"{path}.{name}")
        for name, value in tree.items()
        if name in fields
    }
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _build_scalar(annotation, value, path):
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{path} must be a number; got one larger than any float.") from None
    if annotation is float and isinstance(value, str):
        # YAML 1.1 reads 1e-6 (no point) as text.
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
        raise ValueError(
            f"{path} must be of type {annotation.__name__}; got {_shown(value)} "
            f"({type(value).__name__})."
        )
    return value


def _shown(value) -> str:
    """A value in a message. YAML's aliases make lists of lists whose text would fill the memory."""
    return _REPR.repr(value)
