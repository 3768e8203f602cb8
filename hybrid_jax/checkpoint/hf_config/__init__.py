"""config.json in its dialects: Text-01, M1 and VL-01 as released, transformers' `minimax`, M2."""

from hybrid_jax.checkpoint.hf_config.dialects import Description as Description
from hybrid_jax.checkpoint.hf_config.dialects import describe as describe
from hybrid_jax.checkpoint.hf_config.dialects import dump as dump
from hybrid_jax.checkpoint.hf_config.dialects import has_sigmoid_router as has_sigmoid_router
from hybrid_jax.checkpoint.hf_config.dialects import prefix as prefix
from hybrid_jax.checkpoint.hf_config.dialects import read_from as read_from
from hybrid_jax.checkpoint.hf_config.dialects import with_dtype as with_dtype
from hybrid_jax.checkpoint.hf_config.dialects import with_fp8 as with_fp8
from hybrid_jax.checkpoint.hf_config.dialects import write as write
