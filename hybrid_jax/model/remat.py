"""What the backward pass may keep of a layer, by name; everything else it computes again.

Kept in each lightning layer of Text-01 with 8,192 tokens a device in bfloat16, beside the layer's
input of 12 KiB a token, and what then is not done twice:

* full: nothing, and the whole forward runs again, with all its exchanges.
* save_dots: 76 KiB a token. The products of the mixer with its weights, and the exchange of states.
* save_mixer: 28 KiB a token and 4 MiB a row. Attention, what it exchanges, its output projection
  and the sum of that over `tensor`. Projections before it and experts run again.
* save_collectives: 36 KiB a token of what mixers and experts gave, and 24 KiB times
  `Capacity.per_device` of what experts were sent; dropless it is the whole buffer for the worst
  case, 12 KiB times the lesser of a token's and a device's experts, times devices. No row travels
  again, no state is gathered again, no ring goes round again, and of the experts' products only the
  first is done again. Lightning attention itself runs again: it takes less than its result would.

Parameters that are stored in parts are gathered again whatever is kept: they are not kept whole.
"""

import jax

from pallas_kernels.softmax_attention.api import SOFTMAX_RESULTS

STATE = "lightning_state"
"""The state that a shard of a row starts from: gathered from all shards."""
ATTENDED = "attended"
"""What softmax attention gives, before its projection."""
RECALLED = "recalled"
"""What lightning attention gives, before its norm, gate and projection."""
MIXED = "mixed"
"""What a mixer adds to the residual stream: summed over the devices that share its heads."""
DEALT = "dealt"
"""Queries, keys and values of a ring, as they were dealt to its devices."""
COUNTS = "expert_counts"
"""How many rows each device has for each expert."""
ARRIVED = "expert_rows"
"""Rows that came to this device's experts."""
RETURNED = "expert_results"
"""What the experts made of this device's rows."""

_MIXERS = STATE, ATTENDED, RECALLED, MIXED, SOFTMAX_RESULTS
_COLLECTIVES = *(name for name in _MIXERS if name != RECALLED), DEALT, COUNTS, ARRIVED, RETURNED

_policies = jax.checkpoint_policies
KEEP = {
    "full": _policies.nothing_saveable,
    "save_dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(STATE)
    ),
    "save_mixer": _policies.save_only_these_names(*_MIXERS),
    "save_collectives": _policies.save_only_these_names(*_COLLECTIVES),
}
"""Policies of `jax.checkpoint` by `ModelConfig.remat`; "none" needs no checkpoint."""
