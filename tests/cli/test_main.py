"""The command line itself: how it restarts, and what its usage promises."""

import os
import subprocess
import sys

from hybrid_jax import cli
from hybrid_jax.cli import huge_pages


def test_a_restart_is_the_call_as_it_was(monkeypatch, tmp_path):
    calls = []
    kernel = tmp_path / "enabled"
    kernel.write_text("always [madvise] never")
    monkeypatch.setattr(huge_pages, "_KERNEL_SETTING", kernel)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "orig_argv", ["python", "/bin/hybrid-jax", "train", "--out", "x"])
    monkeypatch.setattr(os, "execv", lambda *call: calls.append(call))
    # Set first, so that what the restart sets is taken back too.
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    huge_pages.restart_with_huge_pages()
    assert not calls
    monkeypatch.delenv("GLIBC_TUNABLES")
    huge_pages.restart_with_huge_pages()
    # No -m, which would put the working directory before the installed modules.
    assert calls == [(sys.executable, [sys.executable, "/bin/hybrid-jax", "train", "--out", "x"])]


def test_the_usage_names_every_exit_code(capsys):
    assert cli.main(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "0 ok, 1 a check failed, 2 bad input, 130 interrupted" in said


def test_a_reader_who_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "hybrid_jax.cli", "presets", "nano", "--parameters"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started.stdout.close()
    # As a shell has it for a program that SIGPIPE ended.
    assert (started.stderr.read(), started.wait()) == ("", 141)
