"""Options that a whole step is compiled with; they decide whether exchange hides behind work."""

# Without these a TPU waits for every all-gather and exchange. All-reduces stay as they are: run
# beside products over several steps they made NaN of an attention kernel's results on v6e (jax
# 0.10.2, github.com/AI-Hypercomputer/maxdiffusion, issue 429).
_TPU = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_tpu_enable_async_ragged_all_to_all": True,
}
_OPTIONS: dict[str, dict[str, bool]] = {"tpu": _TPU}


def compiler_options(platform: str) -> dict[str, bool]:
    """For `jax.jit(..., compiler_options=)` on devices of this platform ("tpu", "gpu", "cpu")."""
    return dict(_OPTIONS.get(platform, {}))
