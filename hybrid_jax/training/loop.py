"""The loop: next batch, update, log, store, evaluate; stopped by request and continued exactly."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Sequence

import jax

from hybrid_jax import observe
from hybrid_jax.config.training import TrainConfig
from hybrid_jax.data import WindowIndex
from hybrid_jax.model.parallel.placement import Placement
from hybrid_jax.observe import tensorboard
from hybrid_jax.observe.profile import Profile
from hybrid_jax.training import bad_batches, environment, lasting, placing, starting
from hybrid_jax.training import run as run_lib
from hybrid_jax.training.checkpoints import CheckpointStore
from hybrid_jax.training.diverged import diverged
from hybrid_jax.training.efficiency import Efficiency, peak_memory
from hybrid_jax.training.evaluate import Heldout
from hybrid_jax.training.history import History
from hybrid_jax.training.opening import Opened, open_run
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.recorder import Recorder
from hybrid_jax.training.saving import Saver
from hybrid_jax.training.state import TrainState, abstract_state, initial_state
from hybrid_jax.training.state_norms import StateNorms
from hybrid_jax.training.step import make_evaluation_step, make_train_step
from hybrid_jax.training.stop import StopSignal
from hybrid_jax.training.supply import Supplied, Supply, windows_of
from hybrid_jax.training.watchdog import Watchdog
from sharding import processes


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

    Raises ValueError or OSError for bad input, OSError too if the newest state could not be stored,
    `Diverged` if too many updates in a row had to be skipped. A step that hangs ends the process
    with exit code 75 (`config.faults.hang_seconds`).
    """
    if config.observation.tensorboard:
        tensorboard.require()
    devices = jax.devices() if devices is None else devices
    with contextlib.ExitStack() as held:
        if not processes.is_first():
            stream = held.enter_context(open(os.devnull, "w"))
        progress = held.enter_context(observe.Progress(stream))
        stop = held.enter_context(StopSignal())
        placement = placing.choose(config, devices, progress.note)
        with open_run(config, path, resume=resume, note=progress.note) as opened:
            windows = windows_of(config, opened.parts)
            config = lasting.with_steps(config, windows)
            return Trainer(config, opened, windows, progress, placement, devices).run(stop)


class Trainer:
    """The parts of one run, put together; `run` is the loop."""

    def __init__(
        self,
        config: TrainConfig,
        opened: Opened,
        windows: Sequence[WindowIndex],
        progress: observe.Progress,
        placement: Placement | None,
        devices: Sequence,
    ):
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
        self._supply = Supply(config, windows, placement)
        progress.note(f"{self._supply.efficiency:.1%} of the places in rows hold tokens.")
        self._state_norms = StateNorms(config, self._skeleton, placement, progress.note)
        self._history = History(config.faults)
        computing = devices[:1] if placement is None else placement.mesh.devices.flatten()
        self._efficiency = Efficiency(config.model, config.data.sequence_length, computing)
        self._fingerprint = opened.fingerprint
        self._heldout = Heldout(config, opened.parts, placement)
        self._unigram_entropy = None
        if self._heldout and processes.is_first():
            self._unigram_entropy = self._heldout.unigram_entropy()

    def run(self, stop: StopSignal) -> Outcome:
        """Continue from the newest checkpoint, or begin."""
        config = self._config
        with contextlib.ExitStack() as held:
            checkpoints = held.enter_context(
                CheckpointStore(self._run.checkpoints, config.checkpoints.keep, self._progress.note)
            )
            state = self._starting_state(checkpoints)
            step, position = int(state.step), self._supply.position
            self._recall(step)
            self._progress.start(step, config.steps)
            if step < config.steps:
                self._progress.note("Compiling the update; the first step takes longer ...")
            saver, watchdog, profile, recorder = self._around(checkpoints, step, held)
            ahead = self._next(step)
            while ahead is not None and stop.name is None:
                begin = time.monotonic()
                stop.ask()
                profile.before(step + 1)
                state, values = self._train_step(state, ahead.batch, self._history.limits())
                step, position = step + 1, ahead.position
                # The next is fetched while the device computes.
                taken, ahead = ahead, self._next(step)
                record = self._record(step, values, begin, taken)
                watchdog.alive()
                profile.after(step)
                self._history.add(record)
                bad = self._keep_bad(record, taken) if record["skipped"] else None
                if self._history.wants_rewind:
                    state = self._rewind(state, record, checkpoints, saver)
                if (failed := saver.poll()) is not None:
                    record["checkpoint_failed"] = failed
                if self._is_time(step, config.evaluation.every) or step == config.steps:
                    self._evaluate(state, step, record, watchdog)
                recorder.append(record, self._history.skipped)
                if bad is not None and self._history.is_hopeless:
                    saver.settle()
                    raise diverged(record, self._history, bad, checkpoints.latest_path)
                if self._is_time(step, config.checkpoints.every) or step == config.steps:
                    saver.save(step, state, position)
                    watchdog.alive()
            watchdog.slow("writing the last checkpoint")
            if stop.name is not None and step:
                saver.save(step, state, position)
            saver.finish()
        return self._finish(step, stop.name)

    def _around(self, checkpoints: CheckpointStore, step: int, held: contextlib.ExitStack):
        """What attends to the loop from `step` on, entered into `held`."""
        run, faults, observation = self._run, self._config.faults, self._config.observation
        saver = Saver(checkpoints, self._fingerprint, self._progress.note)
        watchdog = Watchdog(faults.hang_seconds, faults.slow_seconds, run.path)
        first = observation.profile_at if processes.is_first() else None
        profile = Profile(run.profile, first, observation.profile_steps, self._progress.note)
        recorder = Recorder(self._config, run, step, self._progress)
        for each in (watchdog, profile, recorder):
            held.enter_context(each)
        watchdog.slow("compiling and the first step")
        return saver, watchdog, profile, recorder

    def _next(self, step: int) -> Supplied | None:
        """The batch of the update after `step`; None after the last, for the data may end there."""
        return self._supply.next() if step < self._config.steps else None

    def _recall(self, step: int) -> None:
        """What the steps up to this one were like, as the first process's metrics have it.

        Only here is the start of a run stored: a resume that is refused changes nothing.
        """

        def recall() -> str:
            for record in observe.read_metrics(self._run.metrics):
                if record["step"] <= step:
                    self._history.add(record)
            run_lib.store_config(self._run, self._config)
            environment.store(self._run.environment, step, self._progress.note)
            return json.dumps(self._history.to_json())

        past = json.loads(processes.from_first(recall))
        if not processes.is_first():
            self._history.load(past)

    def _starting_state(self, checkpoints: CheckpointStore) -> TrainState:
        parts = (self._config, self._skeleton, self._optimizer, self._placement)
        if checkpoints.latest_step is None and self._config.start is not None:
            state, origin = starting.begin(*parts, self._progress.note, self._run.tokenizer)
            if processes.is_first():
                origin.write(self._run.origin)
            return state
        if checkpoints.latest_step is None:
            return initial_state(*parts)
        restored = checkpoints.restore(self._abstract_state())
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

    def _abstract_state(self) -> TrainState:
        return abstract_state(self._skeleton, self._optimizer, self._placement)

    def _record(self, step: int, values, begin: float, taken: Supplied) -> dict:
        """One line of metrics.jsonl; waits for the device."""
        # Numbers, and lists of them for what is told by source or position.
        values = {name: value.tolist() for name, value in jax.device_get(values).items()}
        seconds = time.monotonic() - begin
        tokens = values.pop("tokens")
        # Weights that are no numbers are counted nowhere; the update has been skipped.
        tokens = int(tokens) if math.isfinite(tokens) else 0
        return {
            "step": step,
            "loss": values.pop("loss"),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            **self._efficiency.mfu(taken.batch.tokens_BT.size, seconds),
            "peak_memory_bytes": peak_memory(),
        } | values

    def _keep_bad(self, record: dict, taken: Supplied) -> pathlib.Path:
        """Write out the batch of an update that was skipped; where it is, or should be."""
        step = record["step"]
        self._progress.note(
            f"Step {step}: loss {record['loss']:.6g}, gradient norm "
            f"{record['gradient_norm']:.6g}; the update is skipped."
        )
        try:
            return bad_batches.write(self._run.bad_batches, step, taken)
        except OSError as error:
            self._progress.note(f"Its batch could not be written: {error}")
            return self._run.bad_batches

    def _rewind(self, state: TrainState, record: dict, checkpoints, saver: Saver) -> TrainState:
        """Back to the parameters before the updates that were skipped; step and data go on.

        The steps after that checkpoint are lost. Their data is not read again, nor is that of the
        bad updates.
        """
        good = record["step"] - self._history.skipped_in_a_row
        # Not one that an interruption left: a run without it would not have it.
        last = good - good % self._config.checkpoints.every
        saver.settle()
        if not checkpoints.has_before(last + 1):
            self._progress.note(f"There is no checkpoint up to step {last} to go back to.")
            return state
        # First away with what it replaces: two states may not fit.
        for leaf in jax.tree.leaves((state.params, state.optimizer)):
            leaf.delete()
        restored = checkpoints.restore(self._abstract_state(), before=last + 1).state
        record["rewound_to"] = int(restored.step)
        self._history.rewound()
        self._progress.note(
            f"The parameters go back to those of step {record['rewound_to']}; data and steps go on."
        )
        return TrainState(state.step, restored.params, restored.optimizer)

    def _evaluate(self, state: TrainState, step: int, record: dict, watchdog: Watchdog) -> None:
        """Adds what held-out text tells to `record`: all of it after the last step."""
        if not self._heldout:
            return
        last = step == self._config.steps
        limit = None if last else self._config.evaluation.batches
        watchdog.slow("compiling and the first batch of an evaluation")
        record |= self._heldout.losses(
            self._evaluation_step, state.params, limit, after_batch=watchdog.alive
        )
        watchdog.slow("measuring the memories of lightning layers")
        record |= self._state_norms(state.params, self._heldout)
        watchdog.alive()

    def _finish(self, step: int, stopped_by: str | None) -> Outcome:
        """Draw the curve and say how it ended."""
        # What the first process has written, other machines may not see yet.
        records = observe.read_metrics(self._run.metrics) if processes.is_first() else []
        if any(record["loss"] is not None for record in records):
            try:
                observe.draw_losses(
                    records,
                    self._run.curve,
                    title=self._config.model.name,
                    unigram_entropy=self._unigram_entropy,
                )
            except OSError as error:
                self._progress.note(f"The curve could not be drawn: {error}")
        if step < self._config.steps:
            return Outcome(step, stopped_by, None, self._unigram_entropy)
        # Read back, so that a run with nothing left to do says what it reached.
        loss = records[-1].get("heldout_loss") if records else None
        return Outcome(step, None, loss, self._unigram_entropy)

    def _is_time(self, step: int, every: int) -> bool:
        return step % every == 0
