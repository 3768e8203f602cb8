"""--json: a place that cannot take the report is refused before the command does anything."""

import pytest

from hybrid_jax.cli import bench, convert, generate, parity

COMMANDS = {
    "bench": lambda json: bench.run(bench.Model(json=json)),
    "convert": lambda json: convert.run(convert.Args("absent", "dst", format="hf", json=json)),
    "generate": lambda json: generate.run(generate.Args("absent", json=json)),
    "parity": lambda json: parity.run(parity.Args("absent", json=json)),
}


@pytest.mark.parametrize("run", COMMANDS.values(), ids=COMMANDS)
def test_a_report_without_a_place_is_refused_first(tmp_path, run):
    with pytest.raises(ValueError, match=r"there is no directory .*absent; make it"):
        run(tmp_path / "absent" / "out.json")
    with pytest.raises(ValueError, match="cannot be written as a file; choose another"):
        run(tmp_path)
