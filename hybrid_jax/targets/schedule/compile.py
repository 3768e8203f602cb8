"""Compile one function for an absent TPU, in a process started with the flags that dump schedules.

    python -m hybrid_jax.targets.schedule.compile MODULE_OR_FILE:FUNCTION TARGET ARGUMENTS OUT

FUNCTION is called with ARGUMENTS (a JSON object) and returns a function and its abstract arguments.
"""

import hashlib
import importlib
import importlib.util
import json
import pathlib
import re
import sys

from hybrid_jax import targets


def load(where: str):
    """The object named "package.module:name" or "path/to/file.py:name"."""
    module_name, _, name = where.rpartition(":")
    if module_name.endswith(".py"):
        spec = importlib.util.spec_from_file_location("scheduled", module_name)
        if spec is None or spec.loader is None:
            raise ValueError(f"{module_name} is not a Python file.")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(module_name)
    return getattr(module, name)


def describe(compiled) -> dict:
    """The Pallas kernels by name, and what XLA does beside them, in cycles as it estimates."""
    entry = compiled.as_text().partition("\nENTRY ")[2]
    kernels, around = {}, {}
    for line in entry.splitlines():
        name = re.match(r"\s*(?:ROOT )?%([\w.-]+) = ", line)
        if name and 'custom_call_target="tpu_custom_call"' in line:
            # The compiler compiles equal kernels once.
            body = line.partition("backend_config=")[2]
            kernels[name[1]] = hashlib.sha256(body.encode()).hexdigest()
        elif name and (cycles := re.search(r'"?estimated_cycles"?:"?(\d+)', line)):
            around[name[1]] = int(cycles[1])
    everywhere = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    memory = compiled.memory_analysis()
    return {
        "kernels": kernels,
        "kernels_in_loops": everywhere - len(kernels),
        "xla_cycles": around,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def main(where: str, target: str, arguments: str, out: str) -> None:
    """Compile and leave a description as JSON in `out`."""
    function, abstract = load(where)(**json.loads(arguments))
    description = describe(targets.compile_for(target, function, *abstract))
    pathlib.Path(out).write_text(json.dumps(description), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
