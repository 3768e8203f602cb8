"""What the links between chips carry, with sources; nominal rates, which nothing exceeds."""

import dataclasses

_CLOUD = "https://docs.cloud.google.com/tpu/docs/"


@dataclasses.dataclass(frozen=True)
class Links:
    """The network of one kind of chip."""

    torus_dims: int
    """Dims of the torus that joins the chips of a slice; 0 where a switch joins them."""
    link_bytes_per_second: float
    """Of one link (two a torus dim), or of a device's port to the switch; in each direction."""
    wraps_at: int
    """A torus dim of this many chips, or a multiple of it, is a ring; a shorter one is a line."""
    network_bytes_per_second: float
    """A chip's share of the data-centre network, in each direction."""
    sources: tuple[str, ...]


# Cloud TPU states both directions of all links of a chip together: 1200 GB/s on v5p are 6 links of
# 100 GB/s each way.
LINKS = {
    "v4": Links(
        torus_dims=3, link_bytes_per_second=50e9, wraps_at=4, network_bytes_per_second=3.1e9,
        sources=(_CLOUD + "v4", "300 GB/s of each direction over 6 links"),
    ),
    "v5e": Links(
        torus_dims=2, link_bytes_per_second=50e9, wraps_at=16, network_bytes_per_second=3.1e9,
        sources=(_CLOUD + "v5e", "400 GB/s of both directions over 4 links"),
    ),
    "v5p": Links(
        torus_dims=3, link_bytes_per_second=100e9, wraps_at=4, network_bytes_per_second=6.25e9,
        sources=(_CLOUD + "v5p", "1200 GB/s of both directions over 6 links; 50 Gbit/s of DCN"),
    ),
    "v6e": Links(
        torus_dims=2, link_bytes_per_second=100e9, wraps_at=16, network_bytes_per_second=12.5e9,
        sources=(_CLOUD + "v6e", "800 GB/s of both directions over 4 links; 25.6 Tbit/s a pod"),
    ),
    "tpu7x": Links(
        torus_dims=3, link_bytes_per_second=100e9, wraps_at=4, network_bytes_per_second=12.5e9,
        sources=(_CLOUD + "tpu7x", "1200 GB/s of both directions over 6 links; DCN as v6e"),
    ),
    "h100": Links(
        torus_dims=0, link_bytes_per_second=450e9, wraps_at=1, network_bytes_per_second=50e9,
        sources=("NVIDIA H100 datasheet: NVLink 900 GB/s both ways; 400 Gbit/s of InfiniBand",),
    ),
    "h200": Links(
        torus_dims=0, link_bytes_per_second=450e9, wraps_at=1, network_bytes_per_second=50e9,
        sources=("NVIDIA H200 datasheet: NVLink 900 GB/s both ways; 400 Gbit/s of InfiniBand",),
    ),
    "b200": Links(
        torus_dims=0, link_bytes_per_second=900e9, wraps_at=1, network_bytes_per_second=50e9,
        sources=("NVIDIA DGX B200 datasheet: NVLink 14.4 TB/s for 8; 400 Gbit/s of InfiniBand",),
    ),
}  # fmt: skip
