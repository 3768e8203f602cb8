"""A bar on a terminal (stderr), gone in the end; nothing where nobody watches."""

import contextlib


@contextlib.contextmanager
def of_bytes(total: int):
    """Yields a function to tell of bytes that have been read."""
    import rich.progress

    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.DownloadColumn())
    with _bar(columns) as bar:
        task = bar.add_task("reading", total=total)
        yield lambda count: bar.advance(task, count)


@contextlib.contextmanager
def of_names():
    """Yields a function of (done, total, name), in bytes."""
    import rich.progress

    columns = (
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
        # A tensor's name is no markup.
        rich.progress.TextColumn("{task.description}", markup=False),
    )
    with _bar(columns) as bar:
        task = bar.add_task("")
        yield lambda done, total, name: bar.update(
            task, completed=done, total=total, description=name
        )


def _bar(columns):
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    return rich.progress.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    )
