"""What every test runs under: strict JAX, the CPU unless asked otherwise, and loud skips."""

import collections
import os
import re

# Set before anything imports JAX, and inherited by the programs tests start. A device test is run
# with the platform named: JAX_PLATFORMS=cuda pytest -m gpu_device.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices for what is split over several; one device computes as before.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# matplotlib must not look for a display, and nothing may look for the network.
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

TORCH_TESTS = "tests that compare with PyTorch"
# A minute or more each: begun last, one of them would keep one worker busy alone.
LONG_MODULES = (
    "tests/training/test_processes.py",
    "tests/training/test_mesh.py",
    "tests/training/test_sharded.py",
    "tests/training/test_recipes.py",
    "tests/training/test_resume.py",
    "tests/inference/test_mesh.py",
)


@pytest.fixture
def key():
    """A fixed random key; split it, never reuse it."""
    import jax

    return jax.random.key(0)


def pytest_collection_modifyitems(items):
    """Long modules first (scripts/test.sh keeps xdist from sorting them again)."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG_MODULES))


def pytest_runtest_setup(item):
    """A device test without its device says so instead of passing on the CPU."""
    for marker, platform in (("gpu_device", "gpu"), ("tpu_device", "tpu")):
        if item.get_closest_marker(marker):
            import jax

            if jax.default_backend() != platform:
                pytest.skip(f"needs a {platform.upper()}; JAX runs on {jax.default_backend()}")


def pytest_addoption(parser):
    group = parser.getgroup("hybrid-jax")
    group.addoption(
        "--require-torch",
        action="store_true",
        help=f"fail if {TORCH_TESTS} were skipped or none ran",
    )
    group.addoption(
        "--at-least",
        type=int,
        default=0,
        metavar="N",
        help="fail unless N tests passed (a run in which everything was skipped proves nothing)",
    )
    group.addoption(
        "--require-passed",
        action="append",
        default=[],
        metavar="PATTERN",
        help="fail unless a test passed whose id matches this regular expression; repeatable",
    )


def _torch_skips(terminal) -> collections.Counter:
    """How many tests of each file were skipped because PyTorch or transformers is missing."""
    return collections.Counter(
        report.nodeid.partition("::")[0]
        for report in terminal.stats.get("skipped", ())
        if "'torch'" in str(report.longrepr) or "'transformers'" in str(report.longrepr)
    )


def _complaints(config, terminal) -> list[str]:
    """Why a green run still is not a proof."""
    passed = terminal.stats.get("passed", ())
    complaints = []
    if len(passed) < config.option.at_least:
        complaints.append(f"{len(passed)} tests passed; --at-least {config.option.at_least}")
    for pattern in config.option.require_passed:
        if not any(re.search(pattern, report.nodeid) for report in passed):
            complaints.append(f"no test like {pattern} passed; --require-passed")
    if config.option.require_torch:
        if _torch_skips(terminal):
            complaints.append(f"{TORCH_TESTS} were skipped; --require-torch")
        if not any(report.nodeid.startswith("tests/parity/") for report in passed):
            complaints.append("no test in tests/parity passed; --require-torch")
    return complaints


# Around everything else: the exit code is settled before pytest reads it, and what did not run is
# the last thing on the screen.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    if hasattr(session.config, "workerinput"):
        return (yield)
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    complaints = _complaints(session.config, terminal)
    if exitstatus == pytest.ExitCode.OK and complaints:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    result = yield
    if skips := _torch_skips(terminal):
        files = ", ".join(f"{file} {count}" for file, count in sorted(skips.items()))
        terminal.line(f"PyTorch is missing: {TORCH_TESTS} did NOT run: {files}", yellow=True)
    for complaint in complaints:
        terminal.line(f"FAILED: {complaint}", red=True)
    return result
