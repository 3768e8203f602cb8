"""`hybrid-jax train`: from options to a whole configuration, and bad input to exit code 2."""

import pytest

from hybrid_jax import cli, training
from hybrid_jax.cli import train
from hybrid_jax.config import recipes, text
from hybrid_jax.config import training as t
from hybrid_jax.config.data import parse_sources
from hybrid_jax.config.faults import Faults, Spikes
from hybrid_jax.config.parallel import Parallel
from tests.training import small


def parsed(*options) -> t.TrainConfig:
    return train.parse(["--out", "run", *options]).train


def failing(capsys, *options) -> str:
    """What a command that must fail with exit code 2 says."""
    try:
        code = cli.main(["train", *map(str, options)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    return " ".join(capsys.readouterr().err.split())


def test_every_field_is_an_option():
    config = parsed(
        *("--preset", "quickstart", "--data", "text", "--data.sources.0.exclude", "a/*", "b/*"),
        *("--steps", "7", "--schedule.peak", "0.5", "--model.pattern.0.layer.ffn.num-experts", "4"),
        *("--optimizer.clip-norm", "None", "--data.sources.0.pattern", "*.md"),
    )
    (source,) = config.data.sources
    assert source.path == "text" and source.exclude == ("a/*", "b/*") and source.pattern == "*.md"
    assert (config.steps, config.schedule.peak, config.optimizer.clip_norm) == (7, 0.5, None)
    assert config.model.pattern[0].layer.ffn.num_experts == 4
    recipe = recipes.of_preset("quickstart", parse_sources(["text"]))
    assert config.schedule.warmup_steps == recipe.schedule.warmup_steps
    assert config.model.pattern[1] == recipe.model.pattern[1]


def test_kinds_are_chosen_by_name():
    config = parsed(
        *("--preset", "nano", "--data", "text", "--schedule.decay.kind", "ExponentialTail"),
        *("--schedule.decay.tail-fraction", "0.3", "--loss.balance.kind=None"),
    )
    assert config.schedule.decay == t.ExponentialTail(tail_fraction=0.3)
    assert config.loss.balance is None
    spikes = ("--faults.spikes.kind", "Spikes", "--faults.spikes.sigmas", "4")
    config = parsed("--preset", "nano", "--data", "text", *spikes)
    assert config.faults == Faults(spikes=Spikes(sigmas=4.0))
    with pytest.raises(ValueError, match=r"got 'linear'. Did you mean 'Linear'\?"):
        parsed("--preset", "nano", "--data", "text", "--schedule.decay.kind", "linear")
    with pytest.raises(ValueError, match=r"no field 'schedule.deca' to choose a kind for"):
        parsed("--preset", "nano", "--data", "text", "--schedule.deca.kind", "Linear")


def test_fine_tuning_is_a_matter_of_options():
    config = parsed(
        *("--preset", "nano", "--data", "text", "--start-from", "RUN", "--start.step", "3"),
        "--start.moments",
        *("--tuning.kind", "LoRA", "--tuning.rank", "4", "--tuning.targets", "*.q", "*.v"),
        *("--optimizer.kind", "Muon", "--model.initialization.kind", "DeepNorm"),
    )
    assert config.start == t.Start(path="RUN", step=3, moments=True)
    assert config.tuning == t.LoRA(rank=4, targets=("*.q", "*.v"))
    assert config.optimizer == t.Muon()
    assert config.model.initialization.gain(2) == 0.5
    frozen = ("--tuning.kind", "Frozen", "--tuning.train", "*.ffn.*")
    config = parsed("--preset", "nano", "--data", "text", *frozen)
    assert config.tuning == t.Frozen(train=("*.ffn.*",)) and config.start is None


def test_a_file_is_the_default_that_options_change(tmp_path):
    config = small.small_run("text")
    text.write_yaml(config, tmp_path / "config.yaml")
    source = ("--config", str(tmp_path / "config.yaml"))
    assert parsed(*source) == config
    mixed = parsed(*source, "--data", "other", "more=0.5").data.sources
    assert [(each.path, each.weight) for each in mixed] == [("other", 1.0), ("more", 0.5)]
    with pytest.raises(ValueError, match="--preset or --config, not both"):
        parsed(*source, "--preset", "nano")


def test_a_mesh_is_two_short_options_and_a_resume_may_change_it(tmp_path):
    new = ("--preset", "nano", "--data", "text")
    assert parsed(*new).parallel is None
    assert parsed(*new, "--mesh", "data=2,fsdp=4").parallel == Parallel(mesh="data=2,fsdp=4")
    rules = parsed(*new, "--rules", "expert").parallel
    assert rules == Parallel(mesh="fsdp=-1", rules="expert")
    (tmp_path / "run").mkdir()
    text.write_yaml(
        small.small_run("text", parallel=rules, steps=5), tmp_path / "run" / "config.yaml"
    )
    argv = ["--out", str(tmp_path / "run"), "--resume", "--mesh", "expert=2", "--steps", "9"]
    resumed = train.parse(argv).train
    assert resumed.parallel == Parallel(mesh="expert=2", rules="expert") and resumed.steps == 9


def test_bad_input_exits_with_2_and_a_way_out(capsys, tmp_path):
    out = ("--out", tmp_path / "run")
    said = failing(capsys, *out, "--preset", "nanno", "--data", "x")
    assert "no preset 'nanno'. Did you mean 'nano'" in said
    assert "needs --preset NAME and --data PATH" in failing(capsys, *out)
    assert "holds no run to resume" in failing(capsys, *out, "--resume")
    some = (*out, "--preset", "nano", "--data", tmp_path / "absent")
    assert "There is no file or directory" in failing(capsys, *some)
    assert "schedule.peak" in failing(capsys, *some, "--schedule.peek", "1")
    assert "must be > 0; got -1.0" in failing(capsys, *some, "--schedule.peak", "-1")
    assert "seed must be in [0, 2**32); got 4294967296" in failing(
        capsys, *some, "--seed", str(2**32)
    )
    assert "multiple of accumulate=3" in failing(capsys, *some, "--accumulate", "3")
    assert "Did you mean 'tensor'" in failing(capsys, *some, "--mesh", "tensr=2")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("stopped_by", "code"), [(None, 0), ("SIGINT", 0), ("SIGTERM", 75)])
def test_launchers_learn_from_the_exit_code_whether_to_start_again(
    stopped_by, code, capsys, monkeypatch, tmp_path
):
    outcome = training.Outcome(3, stopped_by, None, None)
    monkeypatch.setattr(training, "train", lambda *_, **__: outcome)
    some = ("--out", str(tmp_path / "run"), "--preset", "nano", "--data", str(tmp_path))
    assert cli.main(["train", *some]) == code
    said = capsys.readouterr().out
    assert ("nothing is lost" in said and "--resume" in said) == (stopped_by is not None)


def test_help_names_fields_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "--optimizer.weight-decay",
        "--loss.balance.coefficient",
        "Exit code 0",
        "75: ended by SIGTERM",
        "--faults.hang-seconds",
        "--observation.profile-at",
        "--mesh",
        "JAX_PROCESS_ID",
    ):
        assert words in said


def test_half_an_environment_of_processes_is_bad_input(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    some = ("--out", tmp_path / "run", "--preset", "nano", "--data", tmp_path)
    assert "JAX_NUM_PROCESSES missing from the environment" in failing(capsys, *some)
