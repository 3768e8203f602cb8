"""How long a save holds up training, how long it takes, and how much of it is hashing.

Saves a state of random float32 numbers, --rounds times in turn with Orbax alone, which writes the
same arrays without checksums. Then restores it, and in turn without verification. The median
counts.
"""

import argparse
import contextlib
import datetime
import json
import logging
import os
import pathlib
import platform
import shutil
import statistics
import sys
import tempfile
import time

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from hybrid_jax.checkpoint import digests, manifest
from hybrid_jax.training.checkpoints import CheckpointStore
from hybrid_jax.training.state import TrainState

_ARRAYS = 12


def make_state(gigabytes: float) -> TrainState:
    """A third parameters, two thirds moments, as AdamW has them."""
    rng = np.random.default_rng(0)
    rows = round(gigabytes * 1e9 / 4 / 1024 / _ARRAYS)
    draw = lambda: rng.standard_normal((rows, 1024), np.float32)
    params = {f"layer_{i}.kernel": draw() for i in range(_ARRAYS // 3)}
    moments = {m: {name: draw() for name in params} for m in ("mu", "nu")}
    return jax.block_until_ready(jax.device_put(TrainState(np.int32(1), params, moments)))


@contextlib.contextmanager
def timed(into: dict, name: str):
    begin = time.perf_counter()
    yield
    into[name] = time.perf_counter() - begin


def ours(state: TrainState, directory: pathlib.Path) -> dict[str, float]:
    seconds: dict[str, float] = {}
    with CheckpointStore(directory, keep=1) as checkpoints, timed(seconds, "save"):
        with timed(seconds, "blocked"):
            checkpoints.save(1, state, 1, "data")
        checkpoints.wait()
    trees = {"params": state.params, "optimizer": state.optimizer}
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(trees)
    }
    # What the save does of both, by itself: the files come from the page cache there, too.
    with timed(seconds, "hash_arrays"):
        digests.describe(digests.hold(named))
    with timed(seconds, "hash_files"):
        manifest.hash_files(directory / "1")
    return seconds


def theirs(state: TrainState, directory: pathlib.Path) -> dict[str, float]:
    seconds: dict[str, float] = {}
    trees = {"params": state.params, "optimizer": state.optimizer}
    with timed(seconds, "save"):
        with timed(seconds, "blocked"):
            response = ocp.save_checkpointables_async(directory / "1", trees)
        response.result()
    return seconds


def restores(state: TrainState, directory: pathlib.Path, rounds: int) -> list[dict[str, float]]:
    """Seconds of a restore, of one without verification, and of reading all files once."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        {"params": abstract.params, "optimizer": abstract.optimizer},
    )
    found = []
    for _ in range(rounds):
        seconds: dict[str, float] = {}
        with timed(seconds, "restore"), CheckpointStore.reading(directory) as checkpoints:
            jax.block_until_ready(checkpoints.restore(abstract).state)
        with timed(seconds, "orbax"):
            jax.block_until_ready(ocp.load_checkpointables(directory / "1", placed))
        with timed(seconds, "verify"):
            manifest.verify(directory / "1")
        found.append(seconds)
    return found


def measure(state: TrainState, place: str | None, rounds: int) -> dict:
    runs: dict[str, list] = {"ours": [], "orbax": []}
    for number in range(rounds + 1):
        # Who goes first changes with every round; the first round warms up.
        for name, save in sorted({"ours": ours, "orbax": theirs}.items(), reverse=number % 2 == 1):
            directory = pathlib.Path(tempfile.mkdtemp(dir=place))
            runs[name].append(save(state, directory))
            if name == "ours" and number == rounds:
                runs["restore"] = restores(state, directory, rounds)
            shutil.rmtree(directory)
            print(f"{number} {name}: {_line(runs[name][-1])}", file=sys.stderr, flush=True)
    medians = {}
    for name, each in runs.items():
        counted = each if name == "restore" else each[1:]
        medians[name] = {k: statistics.median(run[k] for run in counted) for k in counted[0]}
    mine = medians["ours"]
    return {
        "blocked_share": mine["blocked"] / mine["save"],
        "hashing_share": (mine["hash_arrays"] + mine["hash_files"]) / mine["save"],
        "save_over_orbax": mine["save"] / medians["orbax"]["save"],
        "seconds": medians,
        "rounds": runs,
    }


def _line(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="where to write (default: the system's for such files)")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    state = make_state(args.gigabytes)
    result = measure(state, args.directory, args.rounds)
    result["bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    result["date"] = datetime.date.today().isoformat()
    result["machine"] = f"{os.cpu_count()} CPUs {platform.machine()}, jax {jax.__version__}"
    for name, seconds in result["seconds"].items():
        print(f"{name}: {_line(seconds)}")
    print(
        f"{result['bytes'] / 1e9:.2f} GB: blocked {result['blocked_share']:.1%} of the save, "
        f"hashing {result['hashing_share']:.1%}, {result['save_over_orbax']:.2f}x Orbax alone."
    )
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
