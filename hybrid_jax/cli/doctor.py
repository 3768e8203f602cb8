"""`hybrid-jax doctor`: what this installation is, and which kernels it would use where."""

import dataclasses
import importlib
import importlib.metadata
import json
import pathlib
import platform

from hybrid_jax import targets
from hybrid_jax.cli import json_report


@dataclasses.dataclass(frozen=True)
class Args:
    """Say what is installed, which devices there are, and which implementation of each operation a
    program compiled for each kind of chip gets, and why it does not get the faster ones.

    The operations themselves are asked, for calls of MiniMax-Text-01's sizes; another call
    (float64, odd head sizes) may get another implementation. Exit code 0."""

    json: pathlib.Path | None = None
    """Also write all of it to this file."""


# Beside our own. PyTorch and transformers are wanted for comparisons alone.
_PACKAGES = (
    "hybrid-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokamax",
    "torch", "transformers",
)  # fmt: skip


def run(args: Args) -> int:
    """0; raises ValueError for a path that cannot be written."""
    json_report.check_writable(args.json)
    report = examine()
    print("\n".join(_lines(report)))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def examine() -> dict:
    """Everything `doctor` knows, as JSON."""
    from hybrid_jax.cli import huge_pages

    # Before the compilers: looking for those may put them where JAX takes them for devices.
    devices = _devices()
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
        "devices": devices,
        "compilers": {name: targets.found(name) for name in ("tpu", "cuda")},
        "huge_pages": huge_pages.state(),
        "operations": operations(),
    }


def operations() -> dict:
    """{operation: {target: {"implementation", "declined": {name: why}}}}, as dispatch decides."""
    report = {}
    for name, (module, arguments, options) in _calls().items():
        choices = importlib.import_module(f"pallas_kernels.{module}").choices(*arguments, **options)
        report[name] = {
            target: {"implementation": choice.name, "declined": dict(choice.refusals)}
            for target, choice in choices.items()
        }
    return report


def _calls() -> dict:
    """By name: the module that chooses, and the arguments of a representative call."""
    import jax
    import jax.numpy as jnp

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    batch, length, heads, kv_heads, head_dim = 1, 8192, 64, 8, 128
    x = array(batch, length, heads, head_dim)
    decay = array(heads, dtype=jnp.float32)
    segments = array(batch, length, dtype=jnp.int32)
    token, few = array(256, heads, head_dim), array(256, 8, heads, head_dim)
    state = array(256, heads, head_dim, head_dim, dtype=jnp.float32)
    first_state = array(batch, heads, head_dim, head_dim, dtype=jnp.float32)
    slots = array(256, dtype=jnp.int32)
    keys = array(batch, length, kv_heads, head_dim)
    cache = array(256, length, kv_heads, head_dim)
    packed = {"q_segment_ids": segments, "kv_segment_ids": segments}
    at = {"q_offset": slots}
    rows, experts, sizes = array(16384, 6144), array(32, 6144, 9216), array(32, dtype=jnp.int32)
    lightning, steps = "lightning_attention.api", "lightning_attention.decode_api"
    gate_up, down = array(32, 6144, 2 * 9216), array(32, 9216, 6144)
    softmax, matmul = "softmax_attention.api", "grouped_matmul.api"
    swiglu, states = "grouped_swiglu.api", "lightning_attention.state_api"
    block = "softmax_attention.block"
    attend = (x, x, x, decay, first_state)
    return {
        "lightning_attention": (lightning, (*attend, None), {}),
        "lightning_attention, packed": (lightning, (*attend, segments), {}),
        "lightning_state": (states, (x, x, x), {}),
        "lightning_state_gradient": (states, (x, x, x), {}),
        "lightning_decode": (steps, (token, token, token, decay, state), {}),
        "lightning_decode_slots": (steps, (token, token, token, decay, state, slots), {}),
        "lightning_extend": (steps, (few, few, few, decay, state), {}),
        "softmax_attention": (softmax, (x, keys, keys), {}),
        "softmax_attention, packed": (softmax, (x, keys, keys), packed),
        "softmax_attention, decode": (softmax, (array(256, 1, heads, head_dim), cache, cache), at),
        "softmax_attention_block": (block, (x, keys, keys, None, None, None), {"causal": True}),
        "softmax_attention_block_gradients": (
            block,
            (x, keys, keys, None, None, None),
            {"causal": True},
        ),
        "grouped_matmul": (matmul, (rows, experts, sizes), {}),
        "grouped_swiglu": (swiglu, (rows, gate_up, down, sizes, None), {}),
        # Hands one layer to grouped_swiglu.
        "grouped_swiglu_of_layer": (swiglu, (rows, gate_up, down, sizes, None), {}),
    }


def _devices() -> list[dict]:
    import jax

    try:
        found = jax.devices()
    except RuntimeError as error:
        return [{"error": str(error)}]
    return [{"platform": each.platform, "kind": each.device_kind} for each in found]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(report: dict) -> list[str]:
    """The report for a reader."""
    versions = [f"{name} {found or '-'}" for name, found in report["versions"].items()]
    kinds = [each.get("kind") or f"none ({each['error']})" for each in report["devices"]]
    counted = [f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)]
    lines = [_row("versions", ", ".join(versions)), _row("devices", ", ".join(counted))]
    for name, wheels in report["compilers"].items():
        lines.append(_row(f"for {name}", _compiler(wheels)))
    lines += [_row("huge pages", report["huge_pages"]), ""]
    for operation, choices in report["operations"].items():
        lines.append(operation)
        for target, choice in choices.items():
            declined = "; ".join(f"not {name}: {why}" for name, why in choice["declined"].items())
            lines.append(_row(f"  {target}", f"{choice['implementation']:<12}{declined}".rstrip()))
    tpus = ", ".join(chip.name for chip in targets.CHIPS.values() if chip.platform == "tpu")
    gpus = "hopper is sm_90 (H100, H200), blackwell sm_100 (B200), cuda every other"
    return [*lines, "", f"tpu is {tpus}; {gpus}."]


def _row(label: str, text: str) -> str:
    return f"{label:<13}{text}"


def _compiler(wheels: dict[str, str | None]) -> str:
    missing = [wheel for wheel, version in wheels.items() if version is None]
    if missing:
        return f"cannot compile without the chip; missing: {', '.join(missing)}"
    have = ", ".join(f"{wheel} {version}" for wheel, version in wheels.items())
    return f"can compile without the chip: {have}"
