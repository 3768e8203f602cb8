"""TPU VMs under a gcloud that records what it is asked for, and never the real one."""

import pathlib
import shlex
import subprocess
import tarfile

import pytest

from scripts.launch import tpu_vm
from tests.scripts.recorder import Recorder

OUT = """/data/it's "mine" $HOME"""
TRAIN = ["train", "--preset", "nano", "--data", "/data/text", "--out", OUT]
# Says what the next line of a file says when it is asked for the state; fails when there is none.
GCLOUD = """
states = {states!r}
verb = sys.argv[4]
if verb == "describe":
    lines = open(states).read().splitlines()
    if not lines or lines[0] == "absent":
        open(states, "w").write("\\n".join(lines[1:]))
        sys.exit(1)
    print(lines[0])
    open(states, "w").write("\\n".join(lines[1:]))
if verb == {broken!r}:
    sys.exit(4)
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A function that sets which states are told and which verb fails, and returns the record."""
    programs = Recorder(tmp_path, monkeypatch)
    monkeypatch.setattr(tpu_vm, "_POLL_SECONDS", 0.0)

    def make(*states: str, broken: str = "") -> Recorder:
        (tmp_path / "states").write_text("\n".join(states))
        programs.add("gcloud", GCLOUD.format(states=str(tmp_path / "states"), broken=broken))
        return programs

    return make


def options(target: str, *more: str) -> list[str]:
    return ["--name", "text", "--target", target, "--zone", "us-east5-b", *more]


def verbs(programs: Recorder) -> list[str]:
    return [call["argv"][3] for call in programs.calls("gcloud")]


def dry_run(capsys, target: str, *more: str) -> list[list[str]]:
    assert tpu_vm.main(options(target, "--dry-run", *more)) == 0
    lines = capsys.readouterr().out.splitlines()
    return [shlex.split(line) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize(
    ("target", "accelerator", "runtime"),
    [
        # v5p counts TensorCores, two a chip; v6e chips. Both from their documentation's tables.
        ("v5p:8x8x8", "v5p-1024", "v2-alpha-tpuv5"),
        ("v5p:2x2x1", "v5p-8", "v2-alpha-tpuv5"),
        ("v5p:4x4x12", "v5p-384", "v2-alpha-tpuv5"),
        ("v6e:16x16", "v6e-256", "v2-alpha-tpuv6e"),
        ("v5e:4x4", "v5litepod-16", "v2-alpha-tpuv5-lite"),
    ],
)
def test_slices_have_the_names_of_the_api(target, accelerator, runtime, cloud, capsys):
    programs = cloud()
    create, *_ = dry_run(capsys, target, "--", "true")
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "text"]
    assert set(create[6:]) == {
        f"--accelerator-type={accelerator}",
        f"--runtime-version={runtime}",
        "--node-id=text",
        "--zone=us-east5-b",
    }
    assert not programs.calls("gcloud")


def test_a_dry_run_shows_every_command(cloud, capsys):
    more = ["--slices", "2", "--spot", "--project", "mine", "--bucket", "store", "--", *TRAIN]
    commands = dry_run(capsys, "v6e:4x4", *more)
    create, describe, pack, send, install, run = commands
    assert {"--node-count=2", "--node-prefix=text", "--spot"} <= set(create)
    assert pack[0] == "git" and pack[-1] == "HEAD"
    assert [command[4] for command in (describe, send, install, run)] == [
        "describe", "scp", "ssh", "ssh",
    ]  # fmt: skip
    for command in (create, describe, send, install, run):
        assert {"--zone=us-east5-b", "--project=mine"} <= set(command)
    for command in (send, install, run):
        assert {"--node=all", "--worker=all"} <= set(command)
    # All at once: in batches the first hosts would wait for the last.
    assert "--batch-size=all" in run
    scripts = [_script(command) for command in (install, run)]
    assert scripts[0].endswith("tpu_vm_setup.sh store /data")
    # What the host's shell makes of it.
    assert shlex.split(scripts[1])[-len(TRAIN) - 1 :] == ["scripts/launch/resume.sh", *TRAIN]


def _script(command: list[str]) -> str:
    (word,) = [word for word in command if word.startswith("--command=")]
    return word.partition("=")[2]


def test_a_launch_waits_installs_and_runs(cloud, capsys):
    programs = cloud("absent", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    assert tpu_vm.main(options("v6e:2x2", "--", *TRAIN)) == 0
    waiting = ["describe"] * 3
    assert verbs(programs) == ["describe", "create", *waiting, "scp", "ssh", "ssh"]
    assert "queued-resources delete text --force" in capsys.readouterr().out


def test_slices_that_are_there_are_used(cloud):
    programs = cloud("ACTIVE", "ACTIVE")
    assert tpu_vm.main(options("v6e:2x2", "--", *TRAIN)) == 0
    assert "create" not in verbs(programs)


@pytest.mark.parametrize(
    ("states", "broken", "code", "last", "message"),
    [
        (["PROVISIONING", "FAILED"], "", 1, "describe", "text is FAILED; delete it"),
        (["PROVISIONING", "PROVISIONING"], "", 1, "describe", "text is gone"),
        (["absent"], "create", 4, "create", "exit code 4"),
        (["ACTIVE", "ACTIVE"], "ssh", 4, "ssh", "exit code 4"),
    ],
)
def test_a_step_that_fails_is_the_last(states, broken, code, last, message, cloud, capsys):
    programs = cloud(*states, broken=broken)
    assert tpu_vm.main(options("v6e:2x2", "--", *TRAIN)) == code
    assert verbs(programs)[-1] == last and message in capsys.readouterr().err


@pytest.mark.parametrize(("restarts", "runs"), [("2", 3), ("0", 1)])
def test_a_run_that_ended_to_be_continued_is_started_again(restarts, runs, cloud, monkeypatch):
    """So often and no more, with nothing installed again. Who stopped it may mean it for good."""
    cloud("ACTIVE", "ACTIVE")
    started = []

    def call(step):
        started.append(step.comment.startswith("Run on every host"))
        return 75 if started[-1] else 0

    monkeypatch.setattr(tpu_vm, "_call", call)
    arguments = options("v6e:2x2", "--max-restarts", restarts, "--", *TRAIN)
    assert tpu_vm.main(arguments) == 75
    assert started == [False] * 3 + [True] * runs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (options("v9:2x2", "--", "true"), "There is no target"),
        (options("v6e:3x5", "--", "true"), "not offered as 3x5"),
        (options("v6e:2x2"), "nothing to run"),
        (options("v6e:2x2", "--slices", "0", "--", "true"), "at least 1; got 0"),
        (options("tpu7x:2x2x1", "--", "true"), "tpu7x does not. Use scripts/launch/gke.py"),
        (options("h200:8", "--", "true"), "h200 does not"),
        (options("v5p:4x8x16", "--", "true"), "v5p-1024 is the slice 8x8x8; 4x8x16 cannot"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, cloud, capsys):
    programs = cloud()
    assert tpu_vm.main(arguments) == 2
    assert message in capsys.readouterr().err and not programs.calls("gcloud")


def test_without_gcloud_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tpu_vm.main(options("v6e:2x2", "--", "true")) == 2
    assert "gcloud and git must be on PATH" in capsys.readouterr().err
    assert tpu_vm.main(options("v6e:2x2", "--dry-run", "--", "true")) == 0


def test_the_last_commit_is_packed_as_the_host_unpacks_it(tmp_path):
    """Packed for real: everything that the next steps name is in it."""
    args = tpu_vm.Args(name="text", target="v6e:2x2", zone="z", command=("true",))
    archive = tmp_path / "hybrid-jax.tar.gz"
    pack = tpu_vm.Plan.of(args).prepare(archive)[0]
    assert subprocess.run(pack.command, timeout=60).returncode == 0
    with tarfile.open(archive) as files:
        names = set(files.getnames())
    for needed in ("setup.cfg", "scripts/environment.sh", "hybrid_jax/cli/train.py"):
        assert str(pathlib.PurePosixPath("hybrid-jax", needed)) in names
