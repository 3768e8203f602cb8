"""How much of the hardware a step uses: model FLOPs utilisation, and memory."""

import resource
import sys

import jax

from hybrid_jax.config.model import ModelConfig
from hybrid_jax.model.flops import training_flops
from hybrid_jax.targets.chips import peak_flops


class Efficiency:
    """Of one run on some devices."""

    def __init__(self, model: ModelConfig, length: int, devices):
        """`length` tokens a row; `devices` are all that compute, of one kind."""
        self._flops = training_flops(model, length)
        peak = peak_flops(devices[0].device_kind)
        self._peak = None if peak is None else peak * len(devices)

    def mfu(self, tokens: int, seconds: float) -> dict[str, float]:
        """{"mfu": share of the devices' bfloat16 peak}; {} where the peak is not known.

        Counted is what the mathematics of all `tokens` positions of a step needs, padding too: a
        plan (`hybrid-jax plan`) predicts the same number.
        """
        if self._peak is None:
            return {}
        return {"mfu": self._flops * tokens / seconds / self._peak}


def peak_memory() -> int:
    """Bytes: the most that a device of this process has held, or else the process itself."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    held = [int(each["peak_bytes_in_use"]) for each in stats if "peak_bytes_in_use" in each]
    if held:
        return max(held)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
