"""PyTorch on one thread, and each random directory written once a session."""

import numpy as np
import pytest

from tests.parity import directories


@pytest.fixture(scope="session", autouse=True)
def torch():
    """PyTorch, or skip: transformers is needed with it."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers").utils.logging.disable_progress_bar()
    # Tensors are tiny here; a second thread costs more than it gives.
    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="package", autouse=True)
def quick_compilation():
    """No optimisation by LLVM: these tests compile for a minute and run for a second."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """directory(writer, **fields): a directory by `directories.<writer>`, each written once."""
    written = {}

    def get(writer: str, **fields):
        key = (writer, *sorted(fields.items()))
        if key not in written:
            path = tmp_path_factory.mktemp(writer) / "model"
            getattr(directories, writer)(path, **fields)
            written[key] = path
        return written[key]

    return get


@pytest.fixture(scope="session")
def sides(directory):
    """sides(writer, **fields): (ours, the oracle that is right) on one directory, loaded once."""
    from hybrid_jax.parity.oracles import choose
    from hybrid_jax.parity.ours import Ours

    loaded = {}

    def get(writer: str, **fields):
        path = directory(writer, **fields)
        if path not in loaded:
            loaded[path] = Ours(path), choose(path)[0]
        return loaded[path]

    return get


@pytest.fixture(scope="session")
def tokens_BT():
    """Random ids longer than the 256-token block in which transformers computes."""
    return np.random.default_rng(0).integers(0, directories.SHAPE["vocab_size"], (2, 270))
