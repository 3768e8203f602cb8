"""Measure the rates of `kernels`: schedules of one call of each kernel on each TPU generation.

    python -m hybrid_jax.plan.rates [v5p ...]

Compiles for absent chips (the extra `aot`); about a minute a generation.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

import pallas_kernels
from hybrid_jax import targets
from hybrid_jax.plan import kernels
from hybrid_jax.targets.schedule import schedule_of
from pallas_kernels.grouped_matmul.pallas_tpu import visits
from pallas_kernels.grouped_swiglu import pallas_tpu as swiglu
from pallas_kernels.softmax_attention import splash
from sharding import tpu_rows

TARGETS = ("v5e", "v5p", "v6e", "tpu7x")
LENGTH, HEADS, KV_HEADS, HEAD_DIM = 8192, 64, 8, 128
WIDTH, HIDDEN, EXPERTS, ROWS = 6144, 9216, 4, 4096


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _lightning(heads: int):
    """Packed rows, as in training; states too."""
    x = _array(1, LENGTH, heads, HEAD_DIM)
    decay, ids = _array(heads, dtype=jnp.float32), _array(1, LENGTH, dtype=jnp.int32)

    def both(q, k, v, decay, ids, dout):
        attend = lambda q, k, v: pallas_kernels.lightning_attention(
            q, k, v, decay, segment_ids=ids, implementation="pallas_tpu"
        )[0]
        out, pull = jax.vjp(attend, q, k, v)
        state = pallas_kernels.lightning_state(k, v, decay, segment_ids=ids)
        dstate = pallas_kernels.lightning_state_gradient(q, dout, decay, segment_ids=ids)
        return out, pull(dout), state, dstate

    return both, (x, x, x, decay, ids, x)


def _splash(heads: int):
    q, kv = _array(1, LENGTH, heads, HEAD_DIM), _array(1, LENGTH, KV_HEADS, HEAD_DIM)
    ids = _array(1, LENGTH, dtype=jnp.int32)
    return (lambda q, k, v, ids: splash.forward(q, k, v, ids, ids, None)), (q, kv, kv, ids)


def _experts(heads: int):
    even = visits.Even(EXPERTS, ROWS)
    rows = EXPERTS * ROWS
    x, gate_up = _array(rows, WIDTH), _array(EXPERTS, WIDTH, 2 * HIDDEN)
    down = _array(EXPERTS, HIDDEN, WIDTH)

    def both(x, gate_up, down, dout):
        out, hidden, act = swiglu.forward(x, gate_up, down, even, None)
        return out, swiglu.backward(x, gate_up, down, even, None, hidden, act, dout)

    return both, (x, gate_up, down, x)


def _rows(heads: int):
    """Rows to words and back, as they travel between devices."""
    rows = EXPERTS * ROWS

    def both(x, is_kept):
        return tpu_rows.unpack(tpu_rows.pack(x), is_kept, WIDTH)

    return both, (_array(rows, WIDTH), _array(rows, dtype=jnp.bool_))


# By name: this file may be run as a script.
_BUILD = "hybrid_jax.plan.rates:build"
_CALLS: dict[str, Callable] = {
    "lightning": _lightning, "splash": _splash, "experts": _experts, "rows": _rows
}  # fmt: skip


def build(call: str, name: str):
    """What `schedule_of` compiles: a call in `jax.shard_map`, where kernels see their chip."""
    chip, _ = targets.parse(name)
    function, arguments = _CALLS[call](HEADS // chip.devices)
    mesh = Mesh(np.array(targets.devices(name)[:1]), ("device",))
    whole = PartitionSpec()
    placed = jax.shard_map(function, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    return placed, arguments


def measure(target: str) -> dict[str, float]:
    """Seconds a unit of every kernel on one target."""
    chip, _ = targets.parse(target)
    heads = HEADS // chip.devices
    elements = float(LENGTH * heads * HEAD_DIM)
    products = float(EXPERTS * ROWS * WIDTH * HIDDEN)
    found: dict[str, float] = {}
    for call in _CALLS:
        for kernel in schedule_of(_BUILD, target, call=call, name=target).kernels:
            name = kernels.family(kernels.stem(kernel.name))
            if call == "lightning":
                units = elements
            elif call == "splash":
                # The schedule goes into every tile, for which to skip depends on a table.
                units = float(heads * LENGTH * LENGTH)
            elif call == "rows":
                units = float(EXPERTS * ROWS * WIDTH)
            else:
                units = products * (2 if "gate_up" in name or name.endswith("dx") else 1)
            found[name] = max(found.get(name, 0.0), kernel.predicted_ms / 1e3 / units)
    # Their schedules branch in a way that is not read: products go at the forward's rate.
    found["splash_mha_dq"] = found["splash_mha_fwd"] * 3 / 2
    found["splash_mha_dkv"] = found["splash_mha_fwd"] * 2
    return found


def main(names: list[str]) -> int:
    """Write the table, the targets that are not named as they were."""
    before = json.loads(kernels.RATES.read_text("utf-8")) if kernels.RATES.exists() else {}
    found = before.get("seconds_per_unit", {})
    for target in names or TARGETS:
        print(f"{target} ...", file=sys.stderr, flush=True)
        found[target] = {name: float(f"{value:.4g}") for name, value in measure(target).items()}
    table = {
        "command": "python -m hybrid_jax.plan.rates",
        "libtpu": targets.found("tpu")["libtpu"],
        "seconds_per_unit": found,
    }
    kernels.RATES.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
