"""The batch file under a Slurm that records what it is asked for."""

import os
import pathlib
import re
import subprocess

import pytest

from tests.architecture.source import ROOT
from tests.scripts.recorder import Recorder

SCRIPT = "scripts/launch/slurm.sh"
TRAIN = ["train", "--preset", "nano", "--mesh", "fsdp=16"]
STEP = "--kill-on-bad-exit=0 --wait=600 sh scripts/launch/resume.sh"
# Runs the command behind its options once, as one of its tasks.
SRUN = """
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
sys.exit(os.spawnvp(os.P_WAIT, words[0], words))
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A job of one node with 8 GPUs, submitted from a folder with odd letters."""
    folder = tmp_path / 'it\'s a "folder" $HOME'
    (folder / "scripts" / "launch").mkdir(parents=True)
    for name in ("slurm.sh", "resume.sh"):
        (folder / "scripts/launch" / name).symlink_to(ROOT / "scripts/launch" / name)
    monkeypatch.chdir(folder)
    # The tests' own machine may be a node.
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SRUN_"))]:
        monkeypatch.delenv(name)
    programs = Recorder(tmp_path, monkeypatch)
    programs.add("srun", SRUN)
    programs.add("scontrol")
    programs.add("hybrid-jax")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    return programs


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", SCRIPT, *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("tasks", ["1", "8"])
def test_one_process_a_node_or_a_gpu(tasks, slurm, monkeypatch):
    """Which GPUs each has, the start-up of the run decides."""
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", tasks)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "64")
    assert run(*TRAIN, "--out", "runs/a").returncode == 0
    (srun,) = slurm.calls("srun")
    resume = ["sh", "scripts/launch/resume.sh"]
    assert srun["argv"] == [
        "--kill-on-bad-exit=0",
        "--wait=600",
        *resume,
        *TRAIN,
        "--out",
        "runs/a",
    ]
    assert srun["environment"]["SRUN_CPUS_PER_TASK"] == "64"
    assert not slurm.calls("scontrol")


def test_a_run_that_is_there_is_resumed(slurm):
    """Through srun and the shell of each task, whatever the directory is called."""
    out = pathlib.Path("""runs/it's "mine" $HOME; true""")
    out.mkdir(parents=True)
    for words in (["--out", str(out)], [f"--out={out}"]):
        assert run(*TRAIN, *words).returncode == 0
        assert slurm.calls("hybrid-jax")[-1]["argv"] == [*TRAIN, *words]
        (out / "config.yaml").touch()
        assert run(*TRAIN, *words).returncode == 0
        assert slurm.calls("hybrid-jax")[-1]["argv"] == [*TRAIN, *words, "--resume"]
        assert run(*TRAIN, *words, "--resume").returncode == 0
        assert slurm.calls("hybrid-jax")[-1]["argv"] == [*TRAIN, *words, "--resume"]
        (out / "config.yaml").unlink()


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (3, False), (137, False)])
def test_a_run_that_ended_to_be_continued_is_queued_again(code, requeued, slurm):
    """One that is done has nothing left to do; one that failed would fail again."""
    slurm.add("hybrid-jax", f"sys.exit({code})")
    assert run(*TRAIN).returncode == code
    expected = [["requeue", "12"]] if requeued else []
    assert [call["argv"] for call in slurm.calls("scontrol")] == expected


def test_the_header_asks_the_processes_to_stop_in_time():
    text = (ROOT / SCRIPT).read_text()
    header = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", text, re.MULTILINE))
    # To the processes, not to the batch script (B:), and with SIGTERM, which ends them with 75.
    assert header["signal"] == "TERM@600"
    assert header["open-mode"] == "append" and "\n#SBATCH --requeue\n" in text
    # Slurm reads no further than the first command.
    assert text.index("set -euo") > text.rindex("#SBATCH")


def test_a_dry_run_prints_what_would_be_run(slurm, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    words = [*TRAIN, "--out", """runs/it's "mine" $HOME"""]
    result = run("--dry-run", *words)
    assert (result.returncode, result.stderr) == (0, "")
    assert "exit code 75: scontrol requeue" in result.stdout
    assert not slurm.calls("srun")
    # Read as a shell would, and run.
    assert subprocess.run(["bash", "-c", result.stdout], timeout=60).returncode == 0
    (srun,) = slurm.calls("srun")
    assert srun["environment"]["SRUN_CPUS_PER_TASK"] == "4"
    assert srun["argv"] == [*STEP.split(), *words]


def test_bad_input_says_what_to_do(slurm, monkeypatch, tmp_path):
    def refused(*words: str) -> str:
        result = run(*words)
        assert result.returncode == 2 and not slurm.calls("srun")
        return result.stderr

    assert "nothing to run" in refused()
    assert "nothing to run" in refused("--dry-run", "--")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "3")
    assert "3 tasks for the 8 GPUs of a node; set --ntasks-per-node to 1 or 8" in refused(*TRAIN)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert "submit it with sbatch" in refused(*TRAIN)
    pathlib.Path("scripts/launch/resume.sh").unlink()
    assert "submit from the repository's folder" in refused("--dry-run", *TRAIN)
