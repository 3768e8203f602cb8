"""How a run is split over devices: the sizes of the mesh's axes, and the rules that use them."""

import dataclasses
import re

from hybrid_jax.config.text import near_names

# This package reads no JAX, so it repeats what `sharding` knows; a test holds the two together.
AXES = ("data", "fsdp", "expert", "sequence", "tensor", "slices")
RULES = ("fsdp", "fsdp_tensor", "expert", "long_context", "long_rows", "serve")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel:
    """A mesh of devices and what is split over its axes; without a capacity it changes no result
    beyond rounding."""

    mesh: str
    """Size of each axis, e.g. 'data=2,fsdp=4'; one may be -1, what is left of the devices."""
    rules: str = "fsdp"
    """Which axes split what: fsdp, fsdp_tensor, expert, long_context, long_rows or serve."""
    capacity_per_expert: float | None = None
    """Most rows of an expert, as a multiple of an even share of all tokens; the rest is dropped.
    None drops none."""
    capacity_per_device: float | None = None
    """Most rows of a device's experts, as a multiple of an even share; bounds memory, which
    otherwise holds the worst case. None drops none."""
    token_groups: int = 1
    """Parts that a device's tokens travel to experts in: one may travel while another is
    multiplied."""

    def __post_init__(self):
        parts = [part.strip() for part in self.mesh.split(",")]
        for part in parts:
            axis, _, size = (word.strip() for word in part.partition("="))
            if axis not in AXES:
                raise ValueError(
                    f"Parallel.mesh {self.mesh!r} names the axis {axis!r}; expected "
                    f"{', '.join(AXES)}, as in 'data=2,fsdp=4'.{near_names(axis, AXES)}"
                )
            if not re.fullmatch(r"-1|[1-9][0-9]*", size):
                raise ValueError(
                    f"Parallel.mesh {self.mesh!r} gives {axis} the size {size!r}; expected a whole "
                    "number >= 1, or -1 for what is left of the devices."
                )
            if sum(other.partition("=")[0].strip() == axis for other in parts) > 1:
                raise ValueError(f"Parallel.mesh {self.mesh!r} names the axis {axis!r} twice.")
        for name in ("capacity_per_expert", "capacity_per_device"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(
                    f"Parallel.{name} is a multiple of the even share and must be > 0; "
                    f"got {value!r}."
                )
        if type(self.token_groups) is not int or self.token_groups < 1:
            raise ValueError(
                f"Parallel.token_groups must be a whole number >= 1; got {self.token_groups!r}."
            )
        if self.rules not in RULES:
            raise ValueError(
                f"Parallel.rules must be one of {', '.join(RULES)}; got {self.rules!r}."
                f"{near_names(self.rules, RULES)}"
            )
