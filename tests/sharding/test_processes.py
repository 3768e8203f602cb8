"""Who belongs together is read from the environment; together they agree, and end."""

import http.server
import pathlib
import threading
import time

import pytest

from sharding import processes
from tests.sharding import together

JOINED = pathlib.Path(__file__).with_name("joined.py")

EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "host:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
EXPLICIT_MEANS = {
    "coordinator_address": "host:1234",
    "num_processes": 4,
    "process_id": 3,
    "cluster_detection_method": "deactivate",
}
SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
SLURM_MEANS = {"num_processes": 4, "cluster_detection_method": "slurm"}
ALL_IT_SEES = {"local_device_ids": []}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
GKE_MEANS = {"cluster_detection_method": "gketpu"}
SLICES = {
    "MEGASCALE_COORDINATOR_ADDRESS": "a",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "0",
}
# As JAX says where there is no TPU.
NO_TPU = {"TPU_SKIP_MDS_QUERY": "1"}


@pytest.mark.parametrize(
    ("environment", "means"),
    [
        ({}, None),
        (EXPLICIT, EXPLICIT_MEANS),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM, SLURM_MEANS),
        # What is said outright counts, inside SLURM too.
        (SLURM | EXPLICIT, EXPLICIT_MEANS),
        # One task a node, and one GPU a task: JAX's own choice would be a GPU that is not there.
        (SLURM | {"SLURM_STEP_NUM_NODES": "4"}, SLURM_MEANS | ALL_IT_SEES),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "5"}, SLURM_MEANS | ALL_IT_SEES),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, SLURM_MEANS),
        # A batch script and an interactive step know of four tasks and are none of them.
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "17", "SLURM_PROCID": "0"}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        (GKE, GKE_MEANS),
        (GKE | SLICES, GKE_MEANS),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (SLICES | {"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"}, GKE_MEANS),
        # Under a scheduler that gave it one task, a TPU worker is still one of two.
        (GKE | SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, GKE_MEANS),
    ],
)
def test_what_an_environment_means(environment, means):
    assert processes.find(NO_TPU | environment) == means


def test_work_that_shares_only_files_is_numbered_as_the_environment_says():
    for environment, place in (
        ({}, (0, 1)),
        (EXPLICIT, (3, 4)),
        (SLURM, (3, 4)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, (0, 1)),
        # A TPU's workers are not asked for: whoever converts on one of them is alone.
        (GKE, (0, 1)),
    ):
        assert processes.place(environment) == place


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES missing"),
        (EXPLICIT | {"JAX_PROCESS_ID": ""}, "given, but JAX_PROCESS_ID missing"),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 is not below .*=4"),
        (EXPLICIT | {"JAX_PROCESS_ID": "-1"}, "whole number >= 0; got '-1'"),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "two"}, "whole number >= 1; got 'two'"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "host"}, "'host' must be HOST:PORT"),
        ({**SLURM, "SLURM_LOCALID": ""}, "SLURM_STEP_NUM_TASKS=4, but SLURM_LOCALID missing"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "2 TPU workers given, but TPU_WORKER_ID missing"),
        (GKE | {"MEGASCALE_NUM_SLICES": "2"}, "COORDINATOR_ADDRESS and MEGASCALE_SLICE_ID missing"),
    ],
)
def test_half_an_environment_is_refused_with_what_is_missing(environment, message):
    with pytest.raises(ValueError, match=message):
        processes.find(NO_TPU | environment)


@pytest.mark.parametrize(
    ("attributes", "means"),
    [
        ({"worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2"}, "gcetpu"),
        ({"worker-network-endpoints": "a"}, None),
        (
            {"worker-network-endpoints": "a", "tpu-env": "A: 'b'\nMEGASCALE_NUM_SLICES: '2'"},
            "gcetpu",
        ),
        ({}, None),
    ],
)
def test_the_workers_of_a_tpu_vm_stand_in_its_metadata(attributes, means):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = attributes.get(self.path.rpartition("/")[2])
            self.send_response(404 if value is None else 200)
            self.end_headers()
            self.wfile.write((value or "not found").encode())

        def log_message(self, *words):
            pass

    with http.server.HTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = processes.find({"GCE_METADATA_IP": f"localhost:{server.server_port}"})
        server.shutdown()
    assert found == (None if means is None else {"cluster_detection_method": means})


def ended(case: str, logs, heartbeat_seconds: int = 60) -> tuple[list[int], list[list[str]], float]:
    """(exit codes, lines printed, seconds) of two processes."""
    begin = time.monotonic()
    started = together.start(2, 2, [JOINED, case, heartbeat_seconds], logs)
    codes = together.wait(started, 120)
    return codes, [together.lines(logs, p) for p in range(2)], time.monotonic() - begin


def test_processes_agree_and_what_one_refuses_all_refuse(tmp_path):
    codes, said, _ = ended("agree", tmp_path)
    assert codes == [2, 2]
    assert said[0] == ["made by 0 4 True", "error: process 1: not here"]
    assert said[1] == ["made by 0 4 False", "error: not here"]


def test_nobody_runs_a_program_before_all_have_compiled_it(tmp_path):
    codes, said, _ = ended("compile_apart", tmp_path)
    assert codes == [0, 0] and said == [["True True"], ["True True"]]


def test_who_waits_for_others_says_for_whom(tmp_path):
    wait = "from sharding import processes as p; p._SAY_SECONDS = 0; p.start()"
    (process,) = together.start(1, 1, ["-c", wait], tmp_path, {"JAX_NUM_PROCESSES": "2"})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not together.lines(tmp_path, 0):
        time.sleep(0.05)
    process.kill()
    process.wait()
    (said,) = together.lines(tmp_path, 0)
    assert "Waiting for the other processes (process 0 of 2, process 0 at localhost:" in said


def test_an_error_of_the_first_process_is_told_to_all(tmp_path):
    codes, said, _ = ended("first_fails", tmp_path)
    assert codes == [2, 2]
    assert said == [["error: no text"], ["error: process 0 could not begin: no text"]]


def test_who_errs_alone_ends_with_its_own_code_and_the_others_soon(tmp_path):
    codes, said, seconds = ended("one_errs", tmp_path, heartbeat_seconds=5)
    assert codes[1] == 2 and said[1] == ["error: mine alone"]
    assert codes[0] != 0
    # Five seconds in which all might end together, five of silence, and the start of Python twice
    # on a machine that others use too.
    assert seconds < 60


def test_a_death_is_noticed_within_the_heartbeat(tmp_path):
    codes, said, seconds = ended("one_dies", tmp_path, heartbeat_seconds=5)
    assert codes[1] == -9 and codes[0] != 0
    assert any("another task died" in line for line in said[0])
    assert seconds < 60
