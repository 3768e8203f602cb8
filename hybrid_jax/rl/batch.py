"""What a policy is updated on."""

from typing import NamedTuple

import numpy as np


class PolicyBatch(NamedTuple):
    """Rows of packed prompts and sampled answers: a `data.Batch`, and how each token fared.

    `weights_BT` is 1 for targets of answers, 0 for prompts and padding: what is learnt from, and
    the number that the sum is divided by.
    """

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    segment_ids_BT: np.ndarray | None
    positions_BT: np.ndarray
    weights_BT: np.ndarray
    sources_BT: np.ndarray | None
    advantages_BT: np.ndarray
    """float32; of the answer that a target belongs to, against others of its prompt."""
    old_logprobs_BT: np.ndarray
    """float32; of each target, in nats, under the policy that it was sampled with."""
