"""Options that a whole step is compiled with; they decide whether exchange hides behind work."""

# Without these a TPU's cores wait for every gather of parameters, every sum of gradients and every
# exchange of rows. With them the SparseCores move the data meanwhile, beside kernels too. The other
# way, pieces of a gather fused into products, is off: nothing can be fused into a kernel.
_SPARSE_CORES: dict[str, bool] = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_prefer_async_allgather_to_allreduce": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_tpu_enable_async_ragged_all_to_all": True,
}
_WITH_SPARSE_CORES = ("TPU v5", "TPU v5p", "TPU v6 lite", "TPU7x")


def compiler_options(device) -> dict[str, bool]:
    """For `jax.jit(..., compiler_options=)` of a program for this kind of `jax.Device`."""
    return dict(_SPARSE_CORES) if device.device_kind in _WITH_SPARSE_CORES else {}
