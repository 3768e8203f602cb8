"""How fast checkpoints are converted, and in how much memory, against `cp` and `sync`.

Makes a checkpoint with the names, nesting and shards of MiniMax-Text-01, scaled down to --gigabytes
of random weights that no compressor makes smaller. Copies it, converts it to Orbax and that back,
in turn, from a cold and from a warm page cache, and compares every byte of what came back. The
median counts.
"""

import argparse
import datetime
import functools
import json
import math
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import jax
import numpy as np

from hybrid_jax.checkpoint import hf_config
from hybrid_jax.checkpoint.formats.protocol import DTYPES, TensorInfo
from hybrid_jax.checkpoint.formats.safetensors_writer import SafetensorsLayout
from hybrid_jax.checkpoint.names import minimax

# Of the release: 8,243 tensors of 912 GB in so many files.
LAYERS, EXPERTS, SHARDS = 80, 32, 413


def config(scale: float, layers: int = LAYERS, experts: int = EXPERTS) -> dict:
    """config.json of MiniMax-Text-01 with all widths scaled, heads and experts as they are."""
    size = lambda width, step=8: max(step, round(width * scale / step) * step)
    return {
        "architectures": ["MiniMaxText01ForCausalLM"],
        "attn_type_list": [int((n + 1) % 8 == 0) for n in range(layers)],
        "head_dim": size(128, 4),
        "hidden_act": "silu",
        "hidden_size": size(6144),
        "intermediate_size": size(9216),
        "layernorm_full_attention_alpha": 3.5565588200778455,
        "layernorm_full_attention_beta": 1.0,
        "layernorm_linear_attention_alpha": 3.5565588200778455,
        "layernorm_linear_attention_beta": 1.0,
        "layernorm_mlp_alpha": 3.5565588200778455,
        "layernorm_mlp_beta": 1.0,
        "max_position_embeddings": 10240000,
        "model_type": "minimax_text_01",
        "num_attention_heads": 64,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "postnorm": True,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000000,
        "rotary_dim": size(128, 4) // 2,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "tie_word_embeddings": False,
        "vocab_size": size(200064),
    }


def tensors(values: dict) -> list[TensorInfo]:
    """What the release of such a model holds: routers in float32, all else in bfloat16."""
    rules = minimax.rules(hf_config.describe(values, "config.json").model)
    return [
        TensorInfo(rule.name, "F32" if minimax.is_float32(rule.name) else "BF16", rule.shape)
        for rule in rules
    ]


class Synthetic(NamedTuple):
    """What was made up."""

    infos: list[TensorInfo]
    shard_bytes: int
    """Most that one of its files holds."""

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos)

    @property
    def largest(self) -> int:
        return max(info.nbytes for info in self.infos)


def write(
    path: pathlib.Path, count: float, layers: int = LAYERS, experts: int = EXPERTS
) -> Synthetic:
    """A checkpoint of about `count` bytes in a new directory."""
    nbytes = lambda values: sum(info.nbytes for info in tensors(values))
    values = config(math.sqrt(count / nbytes(config(1.0, layers, experts))), layers, experts)
    infos = tensors(values)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    # The release's, or the share of so few layers and experts.
    shards = max(2, SHARDS * layers * experts // (LAYERS * EXPERTS))
    made = Synthetic(infos, nbytes(values) // shards)
    layout = SafetensorsLayout(infos, shard_bytes=made.shard_bytes)
    rng = np.random.default_rng(0)
    for unit in layout.units:
        layout.write(path, unit.number, (_draw(rng, info) for info in unit.infos))
    layout.finish(path, {})
    return made


def _draw(rng: np.random.Generator, info: TensorInfo) -> np.ndarray:
    """Random bits, but for one of the exponent: finite numbers of all sizes below 2."""
    bits = rng.integers(0, 1 << 16, (info.nbytes // 2,), np.uint16)
    # The last half of a little-endian number holds its exponent.
    step = DTYPES[info.dtype].itemsize // 2
    bits[step - 1 :: step] &= 0xBFFF
    return bits.view(DTYPES[info.dtype]).reshape(info.shape)


def convert(source: pathlib.Path, target: pathlib.Path, format: str, *options: str) -> dict:
    """In a process of its own: what it reports, and its seconds from begin to end."""
    report = target.with_suffix(".json")
    command = ["convert", str(source), str(target), "--format", format, "--json", str(report)]
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "hybrid_jax.cli", *command, *options], check=True)
    seconds = time.perf_counter() - begin
    return json.loads(report.read_text()) | {"with_start": seconds}


def copy(source: pathlib.Path, target: pathlib.Path) -> dict:
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(target)], check=True)
    os.sync()
    return {"seconds": time.perf_counter() - begin}


def same(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether both hold the same tensors, to the byte; files may divide them otherwise.

    By the format's own rules, and with no reader of the package.
    """
    here, there = stored(one), stored(other)
    return here.keys() == there.keys() and all(
        here[name][:2] == there[name][:2] and here[name][2]() == there[name][2]() for name in here
    )


def stored(directory: pathlib.Path) -> dict:
    """Name -> (dtype, shape, what reads its bytes)."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                read = functools.partial(read_bytes, path, 8 + length + begin, end - begin)
                found[name] = entry["dtype"], entry["shape"], read
    return found


def read_bytes(path: pathlib.Path, begin: int, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(count)


def forget(directory: pathlib.Path) -> None:
    """Take the files of a directory out of the page cache."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def remember(directory: pathlib.Path) -> None:
    """Read them into it."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def measure(folder: pathlib.Path, made: Synthetic, rounds: int, workers: int | None) -> dict:
    """Seconds and peak memory by (what, cache), a list of rounds each."""
    found: dict[str, list[dict]] = {}
    options = ["--shard-gb", f"{made.shard_bytes / 1e9:.9f}"]
    if workers is not None:
        options += ["--workers", str(workers)]
    source, orbax, back, copied = (folder / name for name in ("source", "orbax", "back", "copy"))
    for number in range(rounds):
        for cache in ("cold", "warm"):
            for what, begin, target, act in (
                ("cp, sync", source, copied, copy),
                ("HF to Orbax", source, orbax, lambda a, b: convert(a, b, "orbax", *options)),
                ("Orbax to HF", orbax, back, lambda a, b: convert(a, b, "hf-original", *options)),
            ):
                (forget if cache == "cold" else remember)(begin)
                found.setdefault(f"{what}, {cache}", []).append(act(begin, target))
                print(f"{number} {what}, {cache}: {found[f'{what}, {cache}'][-1]}", file=sys.stderr)
            if not same(source, back):
                sys.exit(f"{back} is not {source}.")
            for directory in (orbax, back, copied):
                shutil.rmtree(directory)
    return found


def table(found: dict[str, list[dict]], count: int) -> list[str]:
    """Lines of Markdown."""
    medians = {
        name: {key: statistics.median(each[key] for each in rounds) for key in numeric(rounds[0])}
        for name, rounds in found.items()
    }
    lines = ["| | s | MB/s | times cp, sync | peak MiB |", "|---|---|---|---|---|"]
    for name, median in medians.items():
        cache = name.rsplit(", ", 1)[1]
        ratio = median["seconds"] / medians[f"cp, sync, {cache}"]["seconds"]
        peak = f"{median['peak_rss_bytes'] / 2**20:,.0f}" if "peak_rss_bytes" in median else ""
        speed = count / 1e6 / median["seconds"]
        lines.append(f"| {name} | {median['seconds']:.1f} | {speed:,.0f} | {ratio:.2f} | {peak} |")
    return lines


def numeric(row: dict) -> list[str]:
    return [key for key, value in row.items() if type(value) in (int, float)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, help="of each conversion (default: its own choice)")
    parser.add_argument("--directory", help="where to write (default: the system's for such files)")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        folder = pathlib.Path(name)
        made = write(folder / "source", args.gigabytes * 1e9, args.layers)
        shards = len(list((folder / "source").glob("*.safetensors")))
        found = measure(folder, made, args.rounds, args.workers)
    count, largest = made.nbytes, made.largest
    peaks = [row["peak_rss_bytes"] for rows in found.values() for row in rows if len(row) > 1]
    print(*table(found, count), sep="\n")
    print(
        f"{len(made.infos):,} tensors, {count / 1e9:.2f} GB in {shards} files, the largest "
        f"{largest / 1e6:.0f} MB; every byte came back; most memory {max(peaks) / 1e6:,.0f} MB "
        f"(aim: under {(1e9 + 3 * largest) / 1e6:,.0f})."
    )
    if args.json is not None:
        machine = f"{os.cpu_count()} CPUs {platform.machine()}, jax {jax.__version__}"
        today = datetime.date.today().isoformat()
        report = {"bytes": count, "largest": largest, "date": today, "machine": machine}
        args.json.write_text(json.dumps(report | {"rounds": found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
