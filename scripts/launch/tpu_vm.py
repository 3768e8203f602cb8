"""A run on TPU VMs: asks Cloud TPU for slices, puts this checkout on every host, runs on all.

    python scripts/launch/tpu_vm.py --name text-01 --target v6e:16x16 --zone us-east5-b \\
        --bucket BUCKET --dry-run -- train --preset P --data /data/TEXT --out /data/RUN \\
        --mesh fsdp=256

What runs is the last commit. Call it again after an interruption or a change: slices that are there
are used, and a run that is there is resumed. This program holds an SSH connection to each host and
ends with the run: start it where it can stay, in tmux. What becomes of the processes if a
connection breaks could not be tried; for weeks, and for many slices, take GKE (gke.py), which
starts again by itself.
"""

import dataclasses
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import typing

import tyro

from hybrid_jax.targets import hosts

# https://cloud.google.com/tpu/docs/runtimes, "PyTorch and JAX".
_RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
# An accelerator type counts TensorCores (https://cloud.google.com/tpu/docs/v5p and /v4) or chips
# (/v5e and /v6e), which have one TensorCore.
_TYPES = {"v4": "v4", "v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
_POLL_SECONDS = 30.0
# Exit code of a run that ended so that it should be started again.
_START_AGAIN = 75
# https://cloud.google.com/tpu/docs/queued-resources: a request in one of these stays there.
_HOPELESS = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING")
_FOLDER = "hybrid-jax"


@dataclasses.dataclass(frozen=True)
class Args:
    """Run on TPU VMs. What each host runs comes after `--`.

    A run that ends with exit code 75 (a host was asked to stop, or a step hung) is started again
    and resumes. Exit code: that of the run, or of the step that failed; 2 for bad input."""

    name: str
    """Of the queued resource, and of its nodes."""
    target: str
    """Chip and topology: v5p:8x8x8, v6e:16x16."""
    zone: str
    """Google Cloud zone."""
    command: tyro.conf.Positional[tuple[str, ...]] = ()
    """What each host runs; `train` means `hybrid-jax train`, with --resume if its run is there."""
    project: str | None = None
    """Google Cloud project, if not gcloud's own."""
    slices: int = 1
    """Slices, which a data-centre network joins; the slices of --mesh."""
    spot: bool = False
    """Ask for spot capacity."""
    bucket: str | None = None
    """Cloud Storage bucket to mount on every host, for the run and its data."""
    mount: str = "/data"
    """Where that is mounted."""
    max_restarts: int = 20
    """How often the run is started again."""
    dry_run: bool = False
    """Print every command, and run none."""


def main(argv: list[str]) -> int:
    """The exit code; see `Args`."""
    args = tyro.cli(Args, args=argv, prog="tpu_vm.py")
    try:
        plan = Plan.of(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        archive = pathlib.Path(folder, f"{_FOLDER}.tar.gz")
        if args.dry_run:
            for comment, command in plan.steps(archive):
                print(f"# {comment}\n{shlex.join(command)}")
            return 0
        missing = [program for program in ("gcloud", "git") if shutil.which(program) is None]
        if missing:
            print(
                f"error: {' and '.join(missing)} must be on PATH (Google Cloud CLI: "
                "https://cloud.google.com/sdk/docs/install); see what would run with --dry-run.",
                file=sys.stderr,
            )
            return 2
        return plan.run(archive)


class Step(typing.NamedTuple):
    """One command, and what it is for."""

    comment: str
    command: list[str]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The commands of a launch."""

    args: Args
    create: Step
    state: Step
    """Prints the state of what `create` asks for."""

    @classmethod
    def of(cls, args: Args) -> "Plan":
        """ValueError for what cannot be had, with the numbers."""
        if not args.command:
            raise ValueError("there is nothing to run; put -- before it: '-- train --preset P'.")
        if args.slices < 1:
            raise ValueError(f"--slices must be at least 1; got {args.slices}.")
        accelerator = accelerator_type(args.target)
        runtime = _RUNTIMES[hosts.parse_slice(args.target).chip.name]
        if args.slices == 1:
            nodes = [f"--node-id={args.name}"]
        else:
            nodes = [f"--node-count={args.slices}", f"--node-prefix={args.name}"]
        # https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create
        words = [f"--accelerator-type={accelerator}", f"--runtime-version={runtime}", *nodes]
        create = _gcloud(args, "create", args.name, *words, *(["--spot"] if args.spot else []))
        state = _gcloud(args, "describe", args.name, "--format=value(state.state)")
        return cls(args, Step("Ask for it", create), Step("Until it says ACTIVE", state))

    def steps(self, archive: pathlib.Path) -> list[Step]:
        """Everything, as on a first launch."""
        return [self.create, self.state, *self.prepare(archive), self.start]

    def prepare(self, archive: pathlib.Path) -> list[Step]:
        """What every host needs before it can run anything."""
        root = str(pathlib.Path(__file__).resolve().parents[2])
        pack = ["git", "-C", root, "archive", "--format=tar.gz", f"--prefix={_FOLDER}/"]
        pack += [f"--output={archive}", "HEAD"]
        args = self.args
        send = _gcloud(args, "scp", str(archive), f"{args.name}:{archive.name}", *_EVERYWHERE)
        setup = ["bash", f"{_FOLDER}/scripts/launch/tpu_vm_setup.sh"]
        if args.bucket:
            setup += [args.bucket, args.mount]
        unpack = f"tar -xzf {archive.name} && {shlex.join(setup)}"
        return [
            Step("Pack the last commit", pack),
            Step("Send it to every host", send),
            Step("Install it there", self._everywhere(unpack)),
        ]

    @property
    def start(self) -> Step:
        """The run itself, on all hosts at once."""
        words = shlex.join(["sh", "scripts/launch/resume.sh", *self.args.command])
        script = f'cd {_FOLDER} && PATH="$PWD/.venv/bin:$PATH" {words}'
        return Step(
            f"Run on every host; again, which resumes it, if it ends with {_START_AGAIN}",
            self._everywhere(script),
        )

    def run(self, archive: pathlib.Path) -> int:
        """Do it; the exit code of what failed, or of the run."""
        if _ask(self.state) is None and (code := _call(self.create)):
            return code
        while (state := _ask(self.state)) != "ACTIVE":
            if state is None or state in _HOPELESS:
                print(
                    f"error: {self.args.name} is {state or 'gone'}; delete it before you ask "
                    f"again:\n  {self._delete}",
                    file=sys.stderr,
                )
                return 1
            print(f"{self.args.name}: {state}", flush=True)
            time.sleep(_POLL_SECONDS)
        for step in self.prepare(archive):
            if code := _call(step):
                return code
        restarts = 0
        while code := _call(self.start):
            if code != _START_AGAIN or restarts == self.args.max_restarts:
                return code
            restarts += 1
            print(f"It ended to be continued; start {restarts} of at most {self.args.max_restarts}")
        print(f"Done. The machines stay, and cost, until you delete them:\n  {self._delete}")
        return 0

    @property
    def _delete(self) -> str:
        return shlex.join(_gcloud(self.args, "delete", self.args.name, "--force"))

    def _everywhere(self, script: str) -> list[str]:
        # In batches, which is the default, the first hosts would wait for the last for ever.
        batch = "--batch-size=all"
        return _gcloud(self.args, "ssh", self.args.name, *_EVERYWHERE, batch, f"--command={script}")


_EVERYWHERE = ("--node=all", "--worker=all")


def accelerator_type(target: str) -> str:
    """What the Cloud TPU API calls a slice, as in v5p-1024; ValueError if it does not have it."""
    slice_ = hosts.parse_slice(target)
    chip = slice_.chip
    if chip.name not in _TYPES:
        known = ", ".join(_TYPES)
        # For tpu7x: https://cloud.google.com/tpu/docs/queued-resources, the note at its beginning.
        raise ValueError(
            f"TPU VMs come with {known}; {chip.name} does not. Use scripts/launch/gke.py for it."
        )
    # Of the shapes with as many chips an accelerator type means the most compact.
    sides = {
        shape: sorted(map(int, shape.split("x"))) for shape in hosts.shapes(chip, slice_.chips)
    }
    compact = min(sides, key=lambda shape: sides[shape][::-1])
    name = f"{_TYPES[chip.name]}-{slice_.chips * chip.cores}"
    if slice_.topology != compact:
        raise ValueError(
            f"{name} is the slice {compact}; {slice_.topology} cannot be asked for by an "
            f"accelerator type. Take {chip.name}:{compact}, or scripts/launch/gke.py."
        )
    return name


def _gcloud(args: Args, verb: str, *words: str) -> list[str]:
    where = [f"--zone={args.zone}", *([f"--project={args.project}"] if args.project else [])]
    return ["gcloud", "compute", "tpus", "queued-resources", verb, *words, *where]


def _ask(step: Step) -> str | None:
    """What a command prints; None if it fails, as describing something absent does."""
    result = subprocess.run(
        step.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return result.stdout.strip() if result.returncode == 0 else None


def _call(step: Step) -> int:
    print(f"{step.comment}: {shlex.join(step.command)}", flush=True)
    if code := subprocess.run(step.command).returncode:
        print(f"error: that ended with exit code {code}.", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
