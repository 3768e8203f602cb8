"""A trained model out of the directory of its run."""

import pathlib

from hybrid_jax import model as model_lib
from hybrid_jax.training.checkpoints import CheckpointStore
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.run import RunDirectory


def restore_model(run_dir, step: int | None = None) -> model_lib.Model:
    """The model of RUN at checkpoint `step` (None: the newest); what LoRA learnt is merged in.

    Raises FileNotFoundError if RUN is no run, ValueError if it has no such checkpoint.
    """
    run = RunDirectory(pathlib.Path(run_dir))
    config = run.read_config()
    skeleton = Skeleton(config.model, config.tuning)
    with CheckpointStore.reading(run.checkpoints) as checkpoints:
        return skeleton.merged(checkpoints.restore_params(skeleton.abstract, step))
