"""The processes of one computation: joined from what their launcher set, and kept in step.

The engine is `jax.distributed`. Between programs, processes talk through its key-value store, which
has no devices in it: one may work for an hour while the others wait.
"""

import atexit
import itertools
import json
import os
import re
import sys
import threading
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import jax

# One that is silent this long counts as dead, and the others end. A pause of a machine that moves
# to another host takes seconds.
HEARTBEAT_SECONDS = 60
# Whoever waits longer than this for the others says so.
_SAY_SECONDS = 20
# What one process refuses all refuse, and within this time.
_PART_SECONDS = 5
# Longer than any preparation; a dead process is noticed by its heartbeat.
_WAIT_MS = 24 * 3600 * 1000

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_MEGASCALE = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")

_names = itertools.count()


def start(environment: Mapping[str, str] | None = None) -> bool:
    """Join the other processes, if there are any; whether there are. Before any use of a device.

    Raises ValueError for variables that are half given or make no sense, OSError if it cannot open
    or find the address. If the others do not come within five minutes, JAX aborts this process.
    """
    arguments = find(os.environ if environment is None else environment)
    if arguments is None or jax.distributed.is_initialized():
        return arguments is not None
    words = f"Waiting for the other processes ({_words(arguments)}) ..."
    shown = {"file": sys.stderr, "flush": True}
    waiting = threading.Timer(_SAY_SECONDS, print, [words], shown)
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise OSError(
            f"The processes did not come together ({_words(arguments)}): {error} Start all of "
            "them, with the same address, and look whether one has ended with an error."
        ) from error
    finally:
        waiting.cancel()
    return True


def find(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What to tell `jax.distributed.initialize`; None for a process that is alone.

    Explicit addresses go before SLURM's variables, and these before a TPU pod's. Raises ValueError
    naming what is missing or wrong.
    """
    for look in (_explicit, _slurm, _tpu):
        if (arguments := look(environment)) is not None:
            return None if arguments.get("num_processes") == 1 else arguments
    return None


def place(environment: Mapping[str, str]) -> tuple[int, int]:
    """Which process this is, of how many, by JAX's variables or SLURM's; joins nobody.

    For work that only shares files. A process that neither names is alone: (0, 1). Raises
    ValueError for variables that are half given or make no sense.
    """
    if (arguments := _explicit(environment)) is not None:
        return arguments["process_id"], arguments["num_processes"]
    if (arguments := _slurm(environment)) is not None:
        return _whole(environment, "SLURM_PROCID", 0), arguments["num_processes"]
    return 0, 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def from_first(make: Callable[[], str]) -> str:
    """What `make` gives in the first process, to all; the others wait for it.

    An error of `make` is raised there as it is, and as ValueError in all others.
    """
    if jax.process_count() == 1:
        return make()
    key = f"hybrid_jax/from_first/{next(_names)}"
    if is_first():
        try:
            value = make()
        except BaseException as error:
            _client().key_value_set(key, json.dumps({"error": str(error) or repr(error)}))
            raise
        _client().key_value_set(key, json.dumps({"value": value}))
        return value
    found = json.loads(_client().blocking_key_value_get(key, _WAIT_MS))
    if "error" in found:
        raise ValueError(f"process 0 could not begin: {found['error']}")
    return found["value"]


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order; each waits for the others."""
    if jax.process_count() == 1:
        return [text]
    folder = f"hybrid_jax/gather/{next(_names)}"
    _client().key_value_set(f"{folder}/{jax.process_index():06d}", text)
    _client().wait_at_barrier(folder, _WAIT_MS)
    return [said for _, said in sorted(_client().key_value_dir_get(folder))]


def all_pass(check: Callable[[], None]) -> None:
    """Run `check` in every process; return when it has passed in all.

    An error of `check` is raised where it happened as it is. In all others it is a ValueError if
    it is one there, and OSError for anything else: what is wrong is then not what was given.
    """
    if jax.process_count() == 1:
        return check()
    said, texts = "", []
    try:
        check()
    except BaseException as error:
        kind = "ValueError" if isinstance(error, ValueError) else "OSError"
        said = f"{kind} process {jax.process_index()}: {str(error) or repr(error)}"
        raise
    finally:
        texts = gather(said)
    errors = [text.split(" ", 1) for text in texts if text]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        are_values = all(kind == "ValueError" for kind, _ in errors)
        raise (ValueError if are_values else OSError)(f"{errors[0][1]}{more}")


class Together:
    """A `jax.jit` function that all processes have compiled before any runs it.

    Compiling takes them different times, and who runs first waits for the others in its first
    exchange: on CPUs for 30 seconds, then it fails. Arguments keep their shapes and shardings.
    """

    def __init__(self, function):
        self._function = function
        self._is_compiled = jax.process_count() == 1

    def __call__(self, *arguments):
        if not self._is_compiled:
            self._function = self._function.lower(*arguments).compile()
            all_pass(lambda: None)
            self._is_compiled = True
        return self._function(*arguments)


def part(exit_code: int) -> None:
    """Call when an error ends this process: it will exit with this code, the others or not.

    If they end as well, it leaves with them. Otherwise they are in the midst of a computation: they
    end when its heartbeat fails, at once if it is the first, and it does not wait for them.
    """
    if jax.process_count() == 1:
        return
    try:
        _client().wait_at_barrier("hybrid_jax/part", _PART_SECONDS * 1000)
    except jax.errors.JaxRuntimeError:
        # Before what JAX does at exit, which is to wait for all.
        atexit.register(_exit, exit_code)


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _client():
    # JAX passes it on to nobody; Orbax, too, takes it from here.
    from jax._src import distributed

    return distributed.global_state.client


def _explicit(environment: Mapping[str, str]) -> dict[str, Any] | None:
    given = [name for name in _EXPLICIT if environment.get(name)]
    if not given:
        return None
    _check_all(environment, _EXPLICIT, f"{' and '.join(given)} given")
    count = _whole(environment, "JAX_NUM_PROCESSES", 1)
    process = _whole(environment, "JAX_PROCESS_ID", 0)
    if process >= count:
        raise ValueError(
            f"JAX_PROCESS_ID={process} is not below JAX_NUM_PROCESSES={count}; processes are "
            "numbered from 0."
        )
    address = environment["JAX_COORDINATOR_ADDRESS"]
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"JAX_COORDINATOR_ADDRESS={address!r} must be HOST:PORT, of a port that is free on the "
            "machine of process 0."
        )
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": process,
        # Or JAX would ask SLURM which of the devices this process may see.
        "cluster_detection_method": "deactivate",
    }


def _slurm(environment: Mapping[str, str]) -> dict[str, Any] | None:
    # A batch script and an interactive shell know of the job's tasks, and are none of a step's.
    if "SLURM_STEP_NODELIST" not in environment or "SLURM_PROCID" not in environment:
        return None
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    if environment.get(tasks, "1") == "1":
        return None
    _check_all(environment, _SLURM, f"{tasks}={environment[tasks]}")
    arguments: dict[str, Any] = {
        "num_processes": _whole(environment, tasks, 1),
        "cluster_detection_method": "slurm",
    }
    has_its_node = environment.get("SLURM_STEP_NUM_NODES") == environment[tasks]
    gpus = environment.get("CUDA_VISIBLE_DEVICES", "")
    if has_its_node or re.fullmatch(r"[^,]+", gpus):
        # Left out, JAX takes the GPU numbered as the task is on its node. A task that has the node
        # to itself, or sees one GPU alone, takes what it sees.
        arguments["local_device_ids"] = []
    return arguments


def _tpu(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Whether there are several TPU workers; who they are, JAX finds itself."""
    given = [name for name in _MEGASCALE if environment.get(name)]
    if given:
        _check_all(environment, _MEGASCALE, f"{' and '.join(given)} given")
    slices = _whole(environment, "MEGASCALE_NUM_SLICES", 1) if given else 1
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if workers:
        count = slices * len(workers.split(","))
        if count > 1:
            _check_all(environment, ("TPU_WORKER_ID",), f"{count} TPU workers given")
        return {"cluster_detection_method": "gketpu"} if count > 1 else None
    # JAX sets this one where it finds no TPU. A TPU VM's workers stand in its metadata.
    if "TPU_SKIP_MDS_QUERY" in environment:
        return None
    workers = _metadata(environment, "worker-network-endpoints")
    several_slices = re.search(r"MEGASCALE_NUM_SLICES: *'?(\d+)", _metadata(environment, "tpu-env"))
    slices = int(several_slices[1]) if several_slices else slices
    if slices * len(workers.split(",")) == 1:
        return None
    return {"cluster_detection_method": "gcetpu"}


def _metadata(environment: Mapping[str, str], key: str) -> str:
    """What Google's metadata server says of a TPU VM; '' where there is none."""
    host = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except (OSError, ValueError):
        return ""


def _check_all(environment: Mapping[str, str], names, why: str) -> None:
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise ValueError(
            f"{why}, but {' and '.join(missing)} missing from the environment. Several processes "
            f"need all of {', '.join(names)}; a single one needs none of them."
        )


def _whole(environment: Mapping[str, str], name: str, smallest: int) -> int:
    text = environment[name]
    if not text.strip().isdigit() or int(text) < smallest:
        raise ValueError(f"{name} must be a whole number >= {smallest}; got {text!r}.")
    return int(text)


def _words(arguments: dict[str, Any]) -> str:
    """The arguments for a reader."""
    method = arguments["cluster_detection_method"]
    if method != "deactivate":
        return f"found by JAX's {method} detection"
    return (
        f"process {arguments['process_id']} of {arguments['num_processes']}, process 0 at "
        f"{arguments['coordinator_address']}"
    )
