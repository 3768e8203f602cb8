"""From a prompt to tokens: chunked prefill, decoding with a state, sampling."""

from hybrid_jax.inference.generate import decode as decode
from hybrid_jax.inference.generate import generate as generate
from hybrid_jax.inference.sampling import Sampling as Sampling
from hybrid_jax.inference.steps import decode_step as decode_step
from hybrid_jax.inference.steps import make_decode_step as make_decode_step
from hybrid_jax.inference.steps import make_prefill_step as make_prefill_step
from hybrid_jax.inference.steps import prefill as prefill
from hybrid_jax.inference.steps import prefill_chunk as prefill_chunk
