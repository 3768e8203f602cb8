"""The manifest, read back as a cluster reads it, and what it makes a pod run."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from scripts.launch import gke
from tests.scripts.recorder import Recorder

TRAIN = ["train", "--preset", "minimax-text-01", "--data", "/data/text"]


def options(target: str, *more: str) -> list[str]:
    return ["--name", "text-01", "--image", "registry/image:1", "--target", target, *more]


def render(capsys, target: str, *more: str) -> dict:
    assert gke.main(options(target, *more)) == 0
    return yaml.safe_load(capsys.readouterr().out)


def parts(manifest: dict) -> tuple[dict, dict, dict, dict]:
    """The one replicated job, its Job's spec, its pod's spec, and that one's container."""
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return replicated, job, pod, container


@pytest.mark.parametrize(
    ("target", "slices", "accelerator"),
    [
        ("v5p:8x8x8", 1, "tpu-v5p-slice"),
        ("v6e:16x16", 4, "tpu-v6e-slice"),
        ("v6e:1x1", 1, "tpu-v6e-slice"),
        ("tpu7x:4x4x8", 2, "tpu7x"),
    ],
)
def test_pods_times_chips_are_the_topology(target, slices, accelerator, capsys):
    topology = target.partition(":")[2]
    chips = math.prod(map(int, topology.split("x")))
    devices = chips * (2 if target.startswith("tpu7x") else 1)
    mesh = f"data={slices},fsdp={devices},slices={slices}"
    words = [*TRAIN, "--out", "/data/run", "--mesh", mesh]
    manifest = render(capsys, target, "--slices", str(slices), "--bucket", "store", "--", *words)
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and manifest["kind"] == "JobSet"
    assert manifest["spec"]["failurePolicy"] == {"maxRestarts": 20}
    (annotation,) = manifest["metadata"]["annotations"].items()
    key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert annotation == (key, "cloud.google.com/gke-nodepool")
    replicated, job, pod, container = parts(manifest)
    assert replicated["replicas"] == slices
    assert job["parallelism"] == job["completions"]
    limits = container["resources"]["limits"]
    assert job["parallelism"] * limits["google.com/tpu"] == chips
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    # One pod that fails starts all again, and GKE says to TPU processes who they are.
    assert (job["backoffLimit"], job["completionMode"]) == (0, "Indexed")
    assert pod["restartPolicy"] == "Never" and "env" not in container
    assert container["command"][-len(words) :] == words


def test_the_bucket_is_mounted_where_the_run_is(capsys):
    words = [*TRAIN, "--out=/mnt/a run", "--mesh=fsdp=-1"]
    more = ["--bucket", "store", "--mount", "/mnt", "--service-account", "trainer"]
    more += ["--host-network", "--spot", "--queue", "team"]
    manifest = render(capsys, "v5p:2x2x2", *more, "--", *words)
    _, job, pod, container = parts(manifest)
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    (volume,) = pod["volumes"]
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    attributes = volume["csi"]["volumeAttributes"]
    assert attributes["bucketName"] == "store" and attributes["hostNetworkPodKSA"] == "true"
    assert "rename-dir-limit=200000" in attributes["mountOptions"].split(",")
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/mnt"}]
    assert pod["serviceAccountName"] == "trainer"
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert {"key": "cloud.google.com/gke-spot", "operator": "Exists"} in pod["tolerations"]
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}


def test_gpu_pods_are_told_who_they_are(capsys):
    networks = ["default", "gvnic-1", *(f"rdma-{index}" for index in range(8))]
    words = [*TRAIN, "--out", "/data/run", "--mesh", "fsdp=16"]
    more = ["--claim", "files", "--networks", *networks, "--", *words]
    manifest = render(capsys, "h200:16", *more)
    _, job, pod, container = parts(manifest)
    assert job["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"] == 16
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h200-141gb"}
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    sources = {entry["name"]: entry.get("valueFrom") for entry in container["env"]}
    # JobSet's name of a pod: set, job, index of the job, index of the pod; and the set's service.
    assert values["JAX_COORDINATOR_ADDRESS"] == "text-01-worker-0-0.text-01:8476"
    assert values["JAX_NUM_PROCESSES"] == "2"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert sources["JAX_PROCESS_ID"] == {"fieldRef": {"fieldPath": index}}
    interfaces = job["template"]["metadata"]["annotations"]["networking.gke.io/interfaces"]
    assert [entry["network"] for entry in json.loads(interfaces)] == networks
    assert [entry["interfaceName"] for entry in json.loads(interfaces)][:2] == ["eth0", "eth1"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {mounted[volume["name"]]: volume for volume in pod["volumes"]}
    assert volumes["/data"]["persistentVolumeClaim"] == {"claimName": "files"}
    assert volumes["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
    assert volumes["/usr/local/gib"]["hostPath"] == {"path": "/home/kubernetes/bin/gib"}
    # One node has nobody to find.
    assert "env" not in parts(render(capsys, "h200:8", "--", "nvidia-smi"))[3]


RUN = ["--bucket", "store", "--", *TRAIN, "--out", "/data/run"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (options("v9:2x2", *RUN), "There is no target 'v9:2x2'"),
        (options("v5p:3x8x8", *RUN), "not offered as 3x8x8"),
        (options("h200:12", *RUN), "12 chips do not fill hosts of 8"),
        (options("v5p:8x8x8"), "nothing to run"),
        (options("v5p:2x2x1", "--slices", "2", *RUN), "4 chips on 1 hosts"),
        (options("h200:16", "--slices", "2", *RUN), "only TPU slices"),
        (options("v5p:8x8x8", "--slices", "0", *RUN), "--slices must be at least 1.* got 0"),
        (options("v5p:8x8x8", *RUN, "--mesh", "fsdp=256"), "256 devices; there are 512"),
        (options("v6e:4x4", "--slices", "2", *RUN, "--mesh", "fsdp=32"), "slices=1 in --mesh"),
        (options("v5p:8x8x8", "--", *TRAIN, "--out", "/data/run"), "--bucket or --claim"),
        (options("v5p:8x8x8", "--bucket", "b", "--", *TRAIN), "below the mount /data; got None"),
        (options("v5p:8x8x8", *RUN[:-1], "runs/a"), "below the mount /data; got runs/a"),
        (options("v5p:8x8x8", *RUN[:-1], "/database"), "below the mount"),
        (options("v5p:8x8x8", "--claim", "c", *RUN), "--bucket or --claim, not both"),
        (options("v5p:8x8x8", "--networks", "default", *RUN), "--networks are for GPUs"),
        (options("v5p:8x8x8", "--name", "Text_01", *RUN), "--name 'Text_01' must be"),
        (options("v5p:8x8x8", "--name", "a" * 45, *RUN), "at most 44 characters"),
        (options("v5p:8x8x8", "--apply", "--dry-run", *RUN), "not both"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, capsys, tmp_path, monkeypatch):
    programs = Recorder(tmp_path, monkeypatch)
    programs.add("kubectl")
    assert gke.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and re.search(message, err) and not programs.calls("kubectl")


def test_kubectl_is_called_only_to_apply(capsys, tmp_path, monkeypatch):
    programs = Recorder(tmp_path, monkeypatch)
    programs.add("kubectl", f"open({str(tmp_path / 'stdin')!r}, 'w').write(sys.stdin.read())")
    assert gke.main(options("v6e:16x16", "--dry-run", *RUN)) == 0
    printed = capsys.readouterr().out
    assert not programs.calls("kubectl")
    assert gke.main(options("v6e:16x16", "--apply", *RUN)) == 0
    assert [call["argv"] for call in programs.calls("kubectl")] == [["apply", "-f", "-"]]
    assert (tmp_path / "stdin").read_text() == printed
    programs.add("kubectl", "sys.exit(5)")
    assert gke.main(options("v6e:16x16", "--apply", *RUN)) == 5
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gke.main(options("v6e:16x16", "--apply", *RUN)) == 2
    assert "kubectl is not installed" in capsys.readouterr().err


def expanded(word: str) -> str:
    """What Kubernetes makes of a word of a command (k8s.io/kubernetes,
    third_party/forked/golang/expansion), in a pod that knows the variable HOME."""
    return re.sub(
        r"\$(?:(\$)|\(([^)]*)\))",
        lambda found: "$" if found[1] else {"HOME": "/root"}.get(found[2], found[0]),
        word,
    )


def start(words: list[str], out: str, capsys) -> subprocess.Popen:
    """A pod's first process with these words, its run in `out`."""
    mount = os.path.dirname(out)
    more = ["--claim", "files", "--mount", mount, "--", *words, "--out", out]
    command = parts(render(capsys, "v5p:2x2x2", *more))[3]["command"]
    return subprocess.Popen([*map(expanded, command)], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("code", [0, 3])
def test_a_pod_runs_the_words_it_was_given_and_resumes(code, capsys, tmp_path, monkeypatch):
    programs = Recorder(tmp_path, monkeypatch)
    programs.add("hybrid-jax", f"sys.exit({code})")
    out = tmp_path / """it's "mine" $HOME $(HOME) $$ `true`"""
    words = [*TRAIN, "--data.pattern", "*"]
    for _ in range(2):
        with start(words, str(out), capsys) as pod:
            assert (pod.communicate(timeout=60)[1], pod.returncode) == ("", code)
        out.mkdir(exist_ok=True)
        (out / "config.yaml").touch()
    first, second = (call["argv"] for call in programs.calls("hybrid-jax"))
    assert first == [*words, "--out", str(out)]
    assert second == [*first, "--resume"]


STOPPABLE = """
import signal, time
asked = 0
def handle(number, frame):
    global asked
    asked += 1
signal.signal(signal.SIGTERM, handle)
open({ready!r}, "w").close()
while not asked:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit({code} if asked == 1 else 9)
"""


@pytest.mark.parametrize(("code", "seen"), [(0, 143), (3, 3)])
def test_a_pod_that_was_asked_to_stop_has_failed(code, seen, capsys, tmp_path, monkeypatch):
    """Else the job set would be complete with the run half-way. The request arrives once."""
    ready = tmp_path / "ready"
    programs = Recorder(tmp_path, monkeypatch)
    programs.add("hybrid-jax", STOPPABLE.format(ready=str(ready), code=code))
    with start(TRAIN, str(tmp_path / "run"), capsys) as pod:
        until = time.monotonic() + 60
        while not ready.exists():
            assert time.monotonic() < until and pod.poll() is None
            time.sleep(0.01)
        pod.send_signal(signal.SIGTERM)
        words = pod.communicate(timeout=60)[1]
    assert pod.returncode == seen
    assert ("started again" in words) == (seen == 143)


def test_the_script_runs_by_its_path(tmp_path):
    """As the documentation has it, not only as a module of the tests."""
    command = [sys.executable, gke.__file__, *options("v6e:2x2", "--", "true")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)["kind"] == "JobSet"
