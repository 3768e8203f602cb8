"""Try remat policies, batches and meshes around a request, and rank them."""

import dataclasses
from collections.abc import Callable, Iterator

from hybrid_jax import targets
from hybrid_jax.config import presets
from hybrid_jax.config.model import REMAT_POLICIES
from hybrid_jax.plan.request import Request
from hybrid_jax.plan.run import plan
from sharding import mesh as meshes
from sharding import rules as all_rules


def candidates(request: Request) -> Iterator[Request]:
    """The request itself, then one change at a time: remat, batch, then mesh."""
    yield request
    if request.step in ("train", "rl"):
        own = request.remat or presets.get(request.preset).remat
        for policy in REMAT_POLICIES:
            if policy not in ("none", own):
                yield dataclasses.replace(request, remat=policy)
    for factor in (2, 4):
        yield dataclasses.replace(request, batch=request.batch * factor)
    for shape, rules in _meshes(request):
        yield dataclasses.replace(request, mesh=str(shape), rules=rules)


def _meshes(request: Request) -> Iterator[tuple[meshes.MeshShape, str]]:
    """Twice and half the experts' devices, taken from or given to the axis beside it."""
    devices = len(targets.devices(request.target))
    shape = meshes.parse(request.mesh, devices)
    for larger, smaller in (("expert", "fsdp"), ("fsdp", "expert"), ("tensor", "fsdp")):
        sizes = {**shape.sizes, "slices": shape.slices}
        if sizes[smaller] % 2:
            continue
        sizes[larger] *= 2
        sizes[smaller] //= 2
        changed = meshes.MeshShape(**sizes)
        used = {axis for axis, size in changed.sizes.items() if size > 1}
        names = [request.rules, *all_rules.PRESETS]
        name = next((name for name in names if used <= all_rules.get(name).axes), None)
        if name is not None:
            yield changed, name


def search(
    request: Request, note: Callable[[str], object], price: float | None = None
) -> tuple[list[dict], list[tuple[str, str]]]:
    """(reports, best first; what could not be compiled, and why). One after the other."""
    reports, failures = [], []
    tried = list(dict.fromkeys(candidates(request)))
    for number, each in enumerate(tried, 1):
        what = f"{each.mesh}, batch {each.batch}, remat {each.remat or 'as the preset'}"
        note(f"[{number}/{len(tried)}] {what}")
        try:
            reports.append(plan(each, price))
        except ValueError as error:
            failures.append((what, str(error).splitlines()[0]))
    reports.sort(key=lambda each: (not each["fits"], -(each["predicted_mfu"] or 0)))
    return reports, failures
