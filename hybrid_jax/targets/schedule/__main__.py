"""`python -m hybrid_jax.targets.schedule FILE.py:FUNCTION v5p [name=value ...]`: a kernel in work.

FUNCTION returns (function to compile, tuple of jax.ShapeDtypeStruct); see `schedule_of`. A value is
JSON where it can be read so (`chunk=128`), else text.
"""

import json
import sys

from hybrid_jax.targets.schedule import predict, schedule_of


def _value(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main(argv: list[str]) -> int:
    """Print the table and the use of every unit."""
    if len(argv) < 2:
        print(__doc__)
        return 2
    pairs = (pair.partition("=") for pair in argv[2:])
    arguments = {name: _value(value) for name, _, value in pairs}
    report = schedule_of(argv[0], argv[1], **arguments)
    print(predict.table(report))
    for kernel in report.kernels:
        use = ", ".join(f"{unit} {share:.0%}" for unit, share in kernel.use.items())
        print(f"{kernel.name}: {kernel.program_bundles} bundles of code; {use}")
    print(f"temporaries {report.temporary_bytes / 2**20:.0f} MiB; XLA {report.xla_cycles}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
