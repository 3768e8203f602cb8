"""The loop: next batch, update, log, store, evaluate; stopped by request and continued exactly."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Sequence

import jax

from hybrid_jax import observe
from hybrid_jax.config.training import TrainConfig
from hybrid_jax.model.parallel.placement import Placement
from hybrid_jax.training import placing, starting
from hybrid_jax.training import run as run_lib
from hybrid_jax.training.checkpoints import CheckpointStore
from hybrid_jax.training.evaluate import Heldout
from hybrid_jax.training.opening import Opened, open_run
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.state import TrainState, abstract_state, initial_state
from hybrid_jax.training.step import make_evaluation_step, make_train_step
from hybrid_jax.training.stop import StopSignal
from hybrid_jax.training.supply import Supply
from sharding import processes


class Diverged(Exception):
    """The loss or the gradient is not a number any more."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    step: int
    """Updates done in all."""
    stopped_by: str | None
    """Name of the signal that ended it early, if one did."""
    heldout_loss: float | None
    """Nats a token over all held-out text at the end; None if stopped or if nothing is held out.
    This and the entropy are known in the first process only."""
    unigram_entropy: float | None
    """Entropy in nats of the held-out targets' own distribution."""


def train(
    config: TrainConfig,
    path,
    *,
    resume: bool = False,
    stream=None,
    devices: Sequence | None = None,
) -> Outcome:
    """Run `config` in the directory `path` until its last step or until a signal asks to stop.

    SIGINT and SIGTERM end the run after the step at hand with a checkpoint; a run continued with
    `resume=True` computes exactly what it would have without the interruption, or, on other devices
    or another mesh, the same but for rounding. Progress goes to `stream` (default: standard
    output). `devices` are those to compute on (default: all; several processes always take all).

    Every process of a computation that was joined with `sharding.processes.start` calls this with
    the same arguments; `path` is one directory for all, which the first one writes.

    Raises ValueError or OSError for bad input, `Diverged` if the loss stops being a number.
    """
    devices = jax.devices() if devices is None else devices
    with contextlib.ExitStack() as held:
        if not processes.is_first():
            stream = held.enter_context(open(os.devnull, "w"))
        progress = held.enter_context(observe.Progress(config.steps, stream=stream))
        stop = held.enter_context(StopSignal())
        placement = placing.choose(config, devices, progress.note)
        with open_run(config, path, resume=resume, note=progress.note) as opened:
            return Trainer(config, opened, progress, placement).run(stop)


class Trainer:
    """The parts of one run, put together; `run` is the loop."""

    def __init__(self, config: TrainConfig, opened: Opened, progress, placement: Placement | None):
        self._config = config
        self._run = opened.run
        self._progress = progress
        self._placement = placement
        self._skeleton = Skeleton(config.model, config.tuning)
        self._optimizer = Optimizer(config, self._skeleton.axes)
        parts = (config, self._skeleton, self._optimizer, placement)
        self._train_step = processes.Together(
            make_train_step(*parts, num_sources=len(opened.parts))
        )
        self._evaluation_step = processes.Together(
            make_evaluation_step(config, self._skeleton, placement)
        )
        self._supply = Supply(config, opened.parts, placement)
        progress.note(f"{self._supply.efficiency:.1%} of the places in rows hold tokens.")
        self._fingerprint = opened.fingerprint
        self._heldout = Heldout(config, opened.parts, placement)
        self._unigram_entropy = None
        if self._heldout and processes.is_first():
            self._unigram_entropy = self._heldout.unigram_entropy()

    def run(self, stop: StopSignal) -> Outcome:
        """Continue from the newest checkpoint, or begin."""
        config = self._config
        with CheckpointStore(
            self._run.checkpoints, config.checkpoints.keep, self._progress.note
        ) as checkpoints:
            state = self._starting_state(checkpoints)
            if processes.is_first():
                # Only now: a resume that is refused changes nothing.
                run_lib.store_config(self._run, config)
            step = int(state.step)
            self._progress.start(step)
            self._progress.note("Compiling the update; the first step takes longer ...")
            supplied, position = self._supply.next(), None
            with self._metrics_file(step) as metrics:
                while step < config.steps and stop.name is None:
                    begin = time.monotonic()
                    stop.ask()
                    state, values = self._train_step(state, supplied.batch)
                    position = supplied.position
                    # Fetched while the device computes; its position counts from the next step on.
                    supplied = self._supply.next()
                    step += 1
                    record = self._record(step, values, begin, checkpoints)
                    if self._is_time(step, config.evaluation.every) or step == config.steps:
                        self._evaluate(state, step, record)
                    if metrics is not None:
                        metrics.append(record)
                    self._progress.update(step, record["loss"], record["tokens_per_second"])
                    if self._is_time(step, config.checkpoints.every) or step == config.steps:
                        checkpoints.save(step, state, position, self._fingerprint)
            if stop.name is not None and step:
                checkpoints.save(step, state, position, self._fingerprint)
            checkpoints.wait()
        return self._finish(step, stop.name)

    def _metrics_file(self, step: int):
        """The run's metrics from `step` on; None in processes that do not write."""
        if not processes.is_first():
            return contextlib.nullcontext()
        return observe.MetricsFile(self._run.metrics, keep_until_step=step)

    def _starting_state(self, checkpoints: CheckpointStore) -> TrainState:
        parts = (self._config, self._skeleton, self._optimizer, self._placement)
        if checkpoints.latest_step is None and self._config.start is not None:
            state, origin = starting.begin(*parts, self._progress.note, self._run.tokenizer)
            if processes.is_first():
                origin.write(self._run.origin)
            return state
        if checkpoints.latest_step is None:
            return initial_state(*parts)
        abstract = abstract_state(self._skeleton, self._optimizer, self._placement)
        restored = checkpoints.restore(abstract)
        if restored.fingerprint != self._fingerprint:
            raise ValueError(
                f"The checkpoint belongs to other data than {self._run.tokens} holds (fingerprint "
                f"{restored.fingerprint}, now {self._fingerprint}). Put the old data back, or "
                "start a new run."
            )
        if int(restored.state.step) > self._config.steps:
            raise ValueError(
                f"steps={self._config.steps}, but {self._run.path} has already done "
                f"{int(restored.state.step)}. Give --steps that many or more."
            )
        self._supply.seek(restored.position)
        self._progress.note(f"Resuming at step {int(restored.state.step)}.")
        return restored.state

    def _record(self, step: int, values, begin: float, checkpoints: CheckpointStore) -> dict:
        """One line of metrics.jsonl; waits for the device. Raises Diverged."""
        # Numbers, and lists of them for what is told by source or position.
        values = {name: value.tolist() for name, value in jax.device_get(values).items()}
        seconds = time.monotonic() - begin
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            checkpoints.wait()
            good = checkpoints.latest_step
            where = f"the last good checkpoint is {self._run.checkpoints / str(good)}"
            raise Diverged(
                f"Step {step}: loss {values['loss']}, gradient norm {values['gradient_norm']}; "
                f"{where if good else 'there is no checkpoint yet'}. Try a lower --schedule.peak, "
                "a longer --schedule.warmup-steps or a smaller --optimizer.clip-norm in a new run."
            )
        tokens = int(values.pop("tokens"))
        return {
            "step": step,
            "loss": values.pop("loss"),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
        } | values

    def _evaluate(self, state: TrainState, step: int, record: dict) -> None:
        """Adds the held-out loss to `record`: over all windows after the last step."""
        if not self._heldout:
            return
        last = step == self._config.steps
        limit = None if last else self._config.evaluation.batches
        record |= self._heldout.losses(self._evaluation_step, state.params, limit)

    def _finish(self, step: int, stopped_by: str | None) -> Outcome:
        """Draw the curve and say how it ended."""
        # What the first process has written, other machines may not see yet.
        records = observe.read_metrics(self._run.metrics) if processes.is_first() else []
        if records:
            observe.draw_losses(
                records,
                self._run.curve,
                title=self._config.model.name,
                unigram_entropy=self._unigram_entropy,
            )
        if step < self._config.steps:
            return Outcome(step, stopped_by, None, self._unigram_entropy)
        # Read back, so that a run with nothing left to do says what it reached.
        loss = records[-1].get("heldout_loss") if records else None
        return Outcome(step, None, loss, self._unigram_entropy)

    def _is_time(self, step: int, every: int) -> bool:
        return step % every == 0
