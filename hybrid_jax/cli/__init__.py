"""The command line: `hybrid-jax COMMAND ...`; exit codes: see `_usage`."""

import importlib
import os
import select
import sys

from hybrid_jax.cli.huge_pages import restart_with_huge_pages

# Commands that compute for long.
_HEAVY = ("train", "generate", "eval", "bench")

# One module a command, imported when it is called, so that --help answers at once.
_COMMANDS = {
    "train": "Train a preset on text; resume an interrupted run.",
    "data": "Tokenise text, JSON Lines, Parquet, ... ahead of time; look at it, check it.",
    "report": "Draw one run, or several side by side, into one HTML page.",
    "generate": "Continue a prompt with a checkpoint or a training run.",
    "eval": "Measure perplexity by length, needles, recall, or a task of lm_eval.",
    "convert": "Convert checkpoints between Hugging Face safetensors and Orbax.",
    "inspect": "Show what a checkpoint holds, and what is missing, unknown or damaged.",
    "parity": "Compare a Hugging Face directory in transformers (or PyTorch) and here.",
    "bench": "Measure the model here against transformers, or predict kernels on a TPU.",
    "verify": "Read a checkpoint again: is it what was written? Compare two of any formats.",
    "doctor": "Say what is installed, and which kernels each kind of chip would get, and why.",
    "shard": "Say where every parameter would live on a mesh of devices.",
    "plan": "Compile a step for a pod that is not here: does it fit, how fast will it be?",
    "presets": "List the presets, or print one in full.",
    "recipes": "List the recipes of training, or print one in full.",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    if argv is None:
        argv = sys.argv[1:]
        # Names of files and tensors are not always text that can be printed.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        if argv and argv[0] in _HEAVY and "--help" not in argv:
            restart_with_huge_pages()
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        import hybrid_jax

        print(hybrid_jax.__version__)
        return 0
    if argv[0] not in _COMMANDS:
        from hybrid_jax.config.text import near_names

        near = near_names(argv[0], _COMMANDS)
        print(f"error: there is no command {argv[0]!r}.{near}\n\n{_usage()}", file=sys.stderr)
        return 2
    return _run(argv[0], argv[1:])


def _run(name: str, argv: list[str]) -> int:
    import tyro

    command = importlib.import_module(f"hybrid_jax.cli.{name}")
    parse = getattr(command, "parse", None)
    try:
        if parse is not None:
            args = parse(argv)
        else:
            args = tyro.cli(command.Args, args=argv, prog=f"hybrid-jax {name}")
        code = command.run(args)
        # Here, where a reader who is gone can still be told from an error.
        sys.stdout.flush()
        return code
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141
        if os.environ.get("HYBRID_JAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _nobody_reads() -> bool:
    """Whether it was standard output that broke, as by `hybrid-jax ... | head`: no error to tell.

    Then it leads nowhere from here on, or Python would try, and complain, as it ends.
    """
    pipe = sys.stdout.fileno()
    ask = select.poll()
    ask.register(pipe, 0)
    if not ask.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), pipe)
    return True


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    rows = [f"  {name:<{width}}  {about}" for name, about in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: hybrid-jax COMMAND [options]",
            "",
            "Hybrid linear-attention mixture-of-experts language models in JAX.",
            "",
            "commands:",
            *rows,
            "",
            "`hybrid-jax COMMAND --help` tells every option. HYBRID_JAX_TRACEBACK=1 shows where an",
            "error came from. Exit codes: 0 ok, 1 a check failed, 2 bad input, 130 interrupted;",
            "75: start `train` again with --resume.",
        ]
    )
