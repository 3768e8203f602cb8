"""Imports point down. Adding an arrow here is a design decision: write it down first."""

import graphlib

import pytest

from tests.architecture import source

# Each row may import every row below it and nothing beside it. Packages of later issues keep their
# row here, so that their place is decided before their first line.
LEVELS = (
    ("hybrid_jax.config", "hybrid_jax.observe", "hybrid_jax.targets", "sharding", "pallas_kernels"),
    ("hybrid_jax.model",),
    ("hybrid_jax.checkpoint", "hybrid_jax.data"),
    ("hybrid_jax.training", "hybrid_jax.inference"),
    ("hybrid_jax.rl", "hybrid_jax.evaluation"),
    ("hybrid_jax.plan", "hybrid_jax.bench", "hybrid_jax.parity"),
    ("hybrid_jax.cli",),
)
MAY_IMPORT = {
    package: {lower for row in LEVELS[:level] for lower in row}
    for level, row in enumerate(LEVELS)
    for package in row
}
# The root module passes on what these packages offer, so only what stands above all of them may use
# it; its version is a constant that drags nothing in.
FACADE = {"hybrid_jax", "hybrid_jax.load", "hybrid_jax.save", "hybrid_jax.generate"}
FACADE_IS_MADE_OF = {"hybrid_jax.checkpoint", "hybrid_jax.config", "hybrid_jax.inference"}
OURS = ("hybrid_jax", "pallas_kernels", "sharding", "scripts", "tests")

# What a package may not import from outside either, and why.
FOREIGN = {
    # A laptop tool reads a config without JAX.
    "hybrid_jax.config": {"jax", "jaxlib", "flax", "optax", "orbax", "grain"},
    # Kernels and placement are arrays and meshes; they must outlive the choice of a layer library.
    "pallas_kernels": {"flax", "optax", "orbax", "grain"},
    "sharding": {"flax", "optax", "orbax", "grain"},
    # The model knows no training and no storage.
    "hybrid_jax.model": {"optax", "orbax", "grain"},
    "hybrid_jax.inference": {"optax", "grain"},
}
# Other frameworks are oracles, never dependencies: read inside a function of these packages only.
ORACLES = {"torch", "transformers"}
MAY_COMPARE = {"hybrid_jax.bench", "hybrid_jax.parity"}
NEVER = {"tensorflow", "torchvision", "haiku", "equinox", "clu"}


def package_of(module: str) -> str | None:
    """The row a module belongs to; itself if it is ours but unlisted; None if foreign."""
    rows = [package for package in MAY_IMPORT if f"{module}.".startswith(f"{package}.")]
    if rows:
        return max(rows, key=len)
    return module if module.split(".")[0] in OURS else None


def files_of(package: str):
    return source.files(package.replace(".", "/"))


def wrong_imports(package: str, wrong) -> list[str]:
    return [
        f"{source.name(file)}:{found.line} imports {found.module}"
        for file in files_of(package)
        for found in source.imports(file)
        if wrong(found)
    ]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_imports_only_what_it_may(package):
    allowed = {None, package, "hybrid_jax.__version__"} | MAY_IMPORT[package]
    if MAY_IMPORT[package] >= FACADE_IS_MADE_OF:
        allowed |= FACADE
    wrong = wrong_imports(package, lambda found: package_of(found.module) not in allowed)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_imports_no_framework_it_should_not_know(package):
    def wrong(found):
        top = found.module.split(".")[0]
        if top in ORACLES:
            return package not in MAY_COMPARE or not found.lazy
        return top in NEVER | FOREIGN.get(package, set())

    assert not (lines := wrong_imports(package, wrong)), "\n".join(lines)


def test_scripts_import_no_framework_and_no_tests():
    def wrong(found):
        top = found.module.split(".")[0]
        return top in NEVER | {"tests"} or (top in ORACLES and not found.lazy)

    assert not (lines := wrong_imports("scripts", wrong)), "\n".join(lines)


@pytest.mark.parametrize("folder", source.FOLDERS)
def test_imports_are_absolute(folder):
    wrong = wrong_imports(folder, lambda found: found.module.startswith("."))
    assert not wrong, "relative imports hide the arrow:\n" + "\n".join(wrong)


def test_every_package_has_a_row():
    inside = {
        f"hybrid_jax.{path.stem}"
        for path in (source.ROOT / "hybrid_jax").iterdir()
        if path.name != "__pycache__" and path.name != "__init__.py"
        if path.is_dir() or path.suffix == ".py"
    }
    unlisted = inside - set(MAY_IMPORT)
    assert not unlisted, f"{sorted(unlisted)} have no row in LEVELS: decide what they may import."


def test_the_packages_are_those_of_the_house():
    found = {path.parent.name for path in source.ROOT.glob("*/__init__.py")}
    assert found == {"hybrid_jax", "pallas_kernels", "sharding", "tests"}


def test_the_allowed_arrows_form_no_cycle():
    tuple(graphlib.TopologicalSorter(MAY_IMPORT).static_order())
