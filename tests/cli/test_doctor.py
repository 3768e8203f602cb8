"""What doctor says is what a compiled program holds; it knows every operation."""

import json

import jax
import pytest

import pallas_kernels
from hybrid_jax import cli
from hybrid_jax.cli import doctor

# Implementations that are a Pallas kernel in a program for a TPU.
TPU_KERNELS = {"pallas_tpu", "splash"}


@pytest.fixture(scope="module")
def operations():
    return doctor.operations()


def test_every_operation_is_examined(operations):
    assert {name.partition(",")[0] for name in operations} == set(pallas_kernels.__all__)


def test_a_declined_implementation_has_its_reason(operations):
    for name, choices in operations.items():
        for target, choice in choices.items():
            assert all(choice["declined"].values()), (name, target)
            assert choice["implementation"] not in choice["declined"]
    # No chip gets the kernel of another.
    assert "pallas_tpu" in operations["lightning_attention"]["cpu"]["declined"]


@pytest.mark.parametrize("name", ["lightning_attention", "lightning_decode", "softmax_attention"])
def test_the_program_for_a_tpu_holds_what_doctor_says(operations, name):
    _, arguments, _ = doctor._calls()[name]
    function = getattr(pallas_kernels, name)
    # The public function takes its initial state and segments by keyword.
    arguments = arguments[:4] if name == "lightning_attention" else arguments
    traced = jax.jit(function).trace(*arguments)
    for platform in ("tpu", "cpu"):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        wanted = operations[name][platform]["implementation"] in TPU_KERNELS
        assert ("tpu_custom_call" in program) == wanted, platform


def test_doctor_prints_and_writes_its_report(tmp_path, capsys):
    path = tmp_path / "doctor.json"
    assert cli.main(["doctor", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["versions"]["jax"] == jax.__version__
    assert {"tpu", "cuda"} == set(report["compilers"])
    printed = capsys.readouterr().out
    for operation in report["operations"]:
        assert f"\n{operation}\n" in printed
    assert cli.main(["doctor", "--json", str(tmp_path / "nowhere" / "x.json")]) == 2
