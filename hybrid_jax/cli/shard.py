"""`hybrid-jax shard`: where every parameter of a model would live on a mesh, without allocating."""

import dataclasses
import json
import math
import pathlib

from hybrid_jax.cli import json_report
from hybrid_jax.config import presets


@dataclasses.dataclass(frozen=True)
class Args:
    """Print every parameter with its shape, what its dims mean, how a mesh splits it, and its bytes
    on each device. Nothing is allocated, and no device of that kind is needed.

    Exit code 2 if the model cannot be split so; the message has the numbers."""

    preset: str
    """A name that `hybrid-jax presets` lists."""
    mesh: str
    """Size of each axis, e.g. 'data=2,fsdp=64,expert=4': data, fsdp, expert, sequence, tensor, and
    slices for the number of slices that data crosses. Axes that are not named have size 1."""
    rules: str = "expert"
    """Which mesh axes split which dims: fsdp, fsdp_tensor, expert, long_context, long_rows or
    serve."""
    json: pathlib.Path | None = None
    """Also write the table to this file."""


def run(args: Args) -> int:
    """0; ValueError for what cannot be split."""
    json_report.check_writable(args.json)
    report = examine(args.preset, args.mesh, args.rules)
    print("\n".join(_lines(report)))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def examine(preset: str, mesh: str, rules: str) -> dict:
    """The table as JSON."""
    config = presets.get(preset)
    from hybrid_jax.training.parameters import Skeleton
    from sharding import mesh as meshes
    from sharding import rules as all_rules

    shape, chosen = meshes.parse(mesh), all_rules.get(rules)
    skeleton = Skeleton(config)
    rows: list[dict] = []
    for name, array in skeleton.abstract.items():
        axes = skeleton.all_axes(name)
        spec = chosen.parameter(axes, array.shape, shape, name)
        entries = [*spec, *[None] * (len(array.shape) - len(spec))]
        placement = [[entry] if isinstance(entry, str) else [*(entry or ())] for entry in entries]
        split = math.prod(shape.sizes[axis] for axes_of_dim in placement for axis in axes_of_dim)
        size = array.size * array.dtype.itemsize
        rows.append(
            {
                "name": name,
                "shape": list(array.shape),
                "dtype": str(array.dtype),
                "axes": [axis.value for axis in axes],
                "placement": placement,
                "bytes": size,
                "bytes_per_device": size // split,
            }
        )
    return {
        "preset": preset,
        "mesh": shape.sizes | {"slices": shape.slices},
        "devices": shape.devices,
        "rules": rules,
        "parameters": rows,
        "bytes": sum(row["bytes"] for row in rows),
        "bytes_per_device": sum(row["bytes_per_device"] for row in rows),
    }


def _lines(report: dict) -> list[str]:
    """The report for a reader."""
    cells = [("parameter", "dims", "split by", "bytes a device")]
    for row in report["parameters"]:
        dims = " ".join(f"{a}={n}" for a, n in zip(row["axes"], row["shape"], strict=True))
        split = [
            f"{a}:{'+'.join(p)}" for a, p in zip(row["axes"], row["placement"], strict=True) if p
        ]
        cells.append((row["name"], dims, " ".join(split) or "-", f"{row['bytes_per_device']:,}"))
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    lines = [
        "  ".join([*(x.ljust(n) for x, n in zip(row[:3], widths[:3])), row[3].rjust(widths[3])])
        for row in cells
    ]
    sizes = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1)
    share = report["bytes_per_device"] * report["devices"] / report["bytes"]
    return [
        *lines,
        "",
        f"{report['preset']} on {report['devices']} devices ({sizes or 'one device'}), rules "
        f"{report['rules']}: {report['bytes_per_device']:,} of {report['bytes']:,} bytes a device; "
        f"every parameter is held {share:.2f} times.",
    ]
