"""Compile in tests for chips that are not there; for tests marked `aot`.

    @pytest.mark.aot
    def test_forward_compiles():
        compiled = aot.compile_for("v5p", lightning_attention, q, k, v, log_decay)
        assert aot.tpu_kernels(compiled)

Without the compiler's wheels such a test is skipped and says so; where CI is set it fails.
"""

import os
from typing import Any

import pytest

from hybrid_jax import targets


def compile_for(target: str, function, *arguments) -> Any:
    """`hybrid_jax.targets.compile_for`, or a skip."""
    with_compiler(target)
    return targets.compile_for(target, function, *arguments)


def devices(target: str) -> list:
    """Compile-only devices of "v5p", "v5p:2x2x1", "h100:8"; or a skip."""
    with_compiler(target)
    return targets.devices(target)


def with_compiler(target: str) -> None:
    """Skip the test unless the compiler for a target is installed; fail instead where CI is set."""
    try:
        targets.require(targets.parse(target)[0].platform)
    except targets.CompilerMissing as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))


def tpu_kernels(compiled) -> list[str]:
    """Names of the Pallas kernels in a program for a TPU."""
    return [
        line.split("=")[0].strip().removeprefix("ROOT ").lstrip("%").strip()
        for line in compiled.as_text().splitlines()
        if 'custom_call_target="tpu_custom_call"' in line
    ]


def temporary_bytes(compiled) -> int:
    """Memory the program takes beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes
