"""Shapes by name, for tests and benchmarks: the experts of the quickstart preset and of Text-01."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call: R routed rows over E groups of matrices [D, F]."""

    R: int
    E: int
    D: int
    F: int


def _gate_up(R: int) -> Case:
    return Case(R=R, E=8, D=256, F=1024)


def _down(R: int) -> Case:
    return Case(R=R, E=8, D=512, F=256)


CASES = {
    "train_gate_up": _gate_up(8192),
    "train_down": _down(8192),
    "prefill_1k_gate_up": _gate_up(2048),
    "prefill_1k_down": _down(2048),
    "prefill_16k_gate_up": _gate_up(32768),
    "prefill_16k_down": _down(32768),
    "decode_b1_gate_up": _gate_up(2),
    "decode_b1_down": _down(2),
    "decode_b8_gate_up": _gate_up(16),
    "decode_b8_down": _down(16),
    "text_01_gate_up": Case(R=4096, E=32, D=6144, F=18432),
    "text_01_down": Case(R=4096, E=32, D=9216, F=6144),
}
