"""What an update exchanges as the TPU compiler has it, where the one for CPUs knows no better."""

import dataclasses
import functools
import re
from collections import Counter

import jax
import pytest

from hybrid_jax.config import layers
from hybrid_jax.config.model import Dtypes
from hybrid_jax.config.presets import own
from hybrid_jax.model.parallel import placement as placements
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.state import abstract_state, shardings
from hybrid_jax.training.step import make_train_step
from tests import aot
from tests.training import small

pytestmark = pytest.mark.aot
# No dim of a parameter is as long as a row.
ROWS, LENGTH, D, F, E, H, K = 8, 1024, 256, 256, 8, 4, 128


def _text(target: str, mesh: str, rules: str, kinds: slice, remat: str = "none") -> str:
    """Of one update; a loop over two layers of each kind, so that nothing is merged with its twin
    of another pass."""
    moe = layers.MoeFfn(num_experts=E, hidden_dim=F, router=layers.SoftmaxTopK(experts_per_token=2))
    sizes = dict(vocab_size=768, hidden_dim=D, num_heads=H, num_kv_heads=2, head_dim=K)
    model = own.hybrid("small", ffn=moe, num_layers=2, period=2, rotary_dim=64, **sizes)
    pattern = tuple(dataclasses.replace(run, count=2) for run in model.pattern[kinds])
    dtypes = Dtypes(parameters="bfloat16", compute="bfloat16")
    model = dataclasses.replace(model, pattern=pattern, dtypes=dtypes, remat=remat)
    config = small.small_run(model=model, batch_size=ROWS)
    skeleton = Skeleton(config.model)
    optimizer = Optimizer(config, skeleton.axes)
    place = placements.make(mesh, rules, aot.devices(target))

    def abstract(array, sharding):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    live = shardings(skeleton, optimizer, place)
    state = jax.tree.map(abstract, abstract_state(skeleton, optimizer), live)
    tokens = place.sharding(*placements.ROWS)
    batch = jax.tree.map(lambda x: abstract(x, tokens), small.random_batch(ROWS, LENGTH))
    return (
        make_train_step(config, skeleton, optimizer, place).lower(state, batch).compile().as_text()
    )


@functools.cache
def _split_rows(remat: str) -> tuple[Counter, str]:
    """How often what an update repeats stands in its program, and the program."""
    text = _text("v5p:2x2x2", "expert=2,sequence=4", "long_context", slice(None), remat)
    kinds = {
        # Of 4 rows a device and 4 shards.
        "states": rf"= f32\[16,{H},{K},{K}\]\S* all-gather(?:-start)?\(",
        "rows": r" ragged-all-to-all(?:-start)?\(",
        "lightning": r"%lightning_attention_forward[.\d]* = .* custom-call\(",
        "splash": r"%splash_mha_fwd\w*[.\d]* = .* custom-call\(",
    }
    return Counter({kind: len(re.findall(regex, text)) for kind, regex in kinds.items()}), text


def test_split_rows_exchange_each_thing_once_in_each_direction():
    found, text = _split_rows("save_collectives")
    # States forward and backward; rows there and back, both ways, in two kinds of layer. Lightning
    # attention goes forward again, and once more for the states inside a shard. A ring has three
    # pairs of blocks: a device's own, those of the loop, and the last.
    assert found == {"states": 2, "rows": 8, "lightning": 3, "splash": 3}
    gathered = re.findall(r"= \(?(?:bf16|f32)\[([\d,]*)\]\S* all-gather", text)
    assert gathered
    # No activation of a whole row, and no scores of its tokens.
    assert not [dims for dims in gathered if str(LENGTH) in dims.split(",")]


@pytest.mark.nightly
def test_without_anything_kept_all_is_exchanged_again():
    found, _ = _split_rows("full")
    assert found == {"states": 3, "rows": 12, "lightning": 3, "splash": 6}


def test_gradients_of_stored_parts_are_reduce_scattered():
    # Where all axes of a v5p's torus are split as one, its compiler sums everything whole.
    text = _text("v6e:2x4", "fsdp=8", "fsdp", slice(1))
    scattered = set(re.findall(r"= (bf16\[[\d,]*\])\S* reduce-scatter\(", text))
    experts = {f"bf16[{E},{F // 8},{D}]", f"bf16[{E},{D // 8},{2 * F}]"}
    mixers = {f"bf16[{D // 8},{H},{K}]", f"bf16[{H},{K},{D // 8}]"}
    assert experts | mixers | {f"bf16[{D // 8},768]"} <= scattered
    # All experts are on each device: no row travels.
    assert "ragged-all-to-all" not in text
