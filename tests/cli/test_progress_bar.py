"""A bar is drawn of whatever a checkpoint calls its tensors."""

import rich.console

from hybrid_jax.cli import progress_bar


def test_a_name_is_no_markup(monkeypatch):
    monkeypatch.setattr(
        rich.console.Console, "is_terminal", property(lambda self: True), raising=True
    )
    with progress_bar.of_names() as progress:
        # As markup it would close what nobody has opened.
        progress(1, 2, "model.layers.2.[/red]")
