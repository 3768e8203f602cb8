"""Shapes by name, for tests and benchmarks: sizes of the presets and of the parity bench."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call: T queries from index `offset` on, against S keys."""

    B: int
    T: int
    S: int
    H: int
    G: int
    K: int
    V: int
    offset: int = 0


def _quickstart(**sizes: int) -> Case:
    return Case(H=4, G=2, K=64, V=64, **sizes)


CASES = {
    "train": _quickstart(B=4, T=1024, S=1024),
    "prefill_first": _quickstart(B=1, T=1024, S=4096),
    "prefill_4k": _quickstart(B=1, T=4096, S=4096),
    "prefill_last_of_16k": _quickstart(B=1, T=2048, S=16384, offset=14336),
    "prefill_last_of_64k": _quickstart(B=1, T=1024, S=65536, offset=64512),
    "decode_b1": _quickstart(B=1, T=1, S=1024, offset=1023),
    "decode_b8": _quickstart(B=8, T=1, S=1024, offset=1023),
    "text_01": Case(B=1, T=1024, S=1024, H=64, G=8, K=128, V=128),
}
