"""Checks that configurations of training share."""


def check_at_least(config, minimum, *names: str, strict: bool = False) -> None:
    """Raise unless every named number of `config` is >= minimum (> minimum if strict)."""
    for name in names:
        value = getattr(config, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not (value > minimum if strict else value >= minimum):
            raise ValueError(
                f"{type(config).__name__}.{name} must be {'>' if strict else '>='} {minimum}; "
                f"got {value!r}."
            )


def check_fraction(config, name: str) -> None:
    value = getattr(config, name)
    if not 0 <= value < 1:
        raise ValueError(f"{type(config).__name__}.{name} must be in [0, 1); got {value!r}.")
