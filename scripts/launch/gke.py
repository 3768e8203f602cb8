"""A JobSet manifest for Google Kubernetes Engine: TPU slices, or nodes with GPUs.

    python scripts/launch/gke.py --name text-01 --image IMAGE --target v5p:8x8x8 --bucket BUCKET \\
        -- train --preset minimax-text-01 --data /data/TEXT --out /data/RUN --mesh fsdp=512

One Job is one slice (one node pool), one pod is one host, one process a pod. TPU pods find one
another by what GKE puts into their environment, GPU pods by what stands in the manifest. When a pod
fails (exit code 75 included: it was asked to stop, or a step hung) all are started again, and the
run goes on where its last checkpoint is.

Names of fields: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/ and the type definitions
in https://github.com/kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go (08dfbdfd).
"""

import dataclasses
import pathlib
import re
import subprocess
import sys
import typing

import tyro
import yaml

from hybrid_jax.targets import hosts
from sharding import mesh as meshes

# Values of the labels cloud.google.com/gke-tpu-accelerator and cloud.google.com/gke-accelerator, as
# https://github.com/AI-Hypercomputer/xpk, src/xpk/core/system_characteristics.py (367c8382), has
# them; what they mean: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
_ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
    "h100": "nvidia-h100-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}
_JOB = "worker"
_COORDINATOR_PORT = 8476
# For one step of a large model and its checkpoint. A node that goes away may give less.
_GRACE_SECONDS = 600
# Where GKE's RDMA installer puts NVIDIA's libraries and NCCL's plugin on a node, and where a pod
# wants them: xpk, src/xpk/core/workload_decorators/rdma_decorator.py (367c8382).
_RDMA_MOUNTS = {
    "/home/kubernetes/bin/nvidia": "/usr/local/nvidia",
    "/home/kubernetes/bin/gib": "/usr/local/gib",
}
_RDMA_SETUP = '. /usr/local/gib/scripts/set_nccl_env.sh && exec "$@"'


@dataclasses.dataclass(frozen=True)
class Args:
    """Print a JobSet manifest for GKE, or apply it. What each pod runs comes after `--`.

    Exit code: 0, that of kubectl with --apply, or 2 for bad input."""

    name: str
    """Of the job set; lower-case letters, digits and dashes."""
    image: str
    """Container image in which `hybrid-jax` is on PATH."""
    target: str
    """Chip and topology: v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, or a number of GPUs: h200:16."""
    command: tyro.conf.Positional[tuple[str, ...]] = ()
    """What each pod runs; `train` means `hybrid-jax train`, with --resume if its run is there."""
    slices: int = 1
    """TPU slices, which a data-centre network joins; the slices of --mesh."""
    bucket: str | None = None
    """Cloud Storage bucket to mount (Cloud Storage FUSE), for the run and its data."""
    claim: str | None = None
    """Or a PersistentVolumeClaim that many nodes may write (Filestore, Lustre)."""
    mount: str = "/data"
    """Where that is mounted."""
    service_account: str | None = None
    """Kubernetes service account that may use the bucket."""
    max_restarts: int = 20
    """How often all pods are started again before the job set has failed."""
    queue: str | None = None
    """Kueue's LocalQueue, where the cluster has one."""
    host_network: bool = False
    """Use the node's network directly, which is faster between slices."""
    networks: tuple[str, ...] = ()
    """GPUs on several nodes: the cluster's networks in the order of the node's interfaces, the
    default one first, then RDMA. Without them NCCL goes over TCP."""
    spot: bool = False
    """Run on spot nodes."""
    dry_run: bool = False
    """Print the manifest; so does a call without --apply."""
    apply: bool = False
    """Give the manifest to kubectl instead of printing it."""


def main(argv: list[str]) -> int:
    """The exit code; see `Args`."""
    args = tyro.cli(Args, args=argv, prog="gke.py")
    try:
        text = to_yaml(manifest(args))
        if args.apply and args.dry_run:
            raise ValueError("give --apply or --dry-run, not both.")
        if not args.apply:
            print(text, end="")
            return 0
        return subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode
    except FileNotFoundError as error:
        print(f"error: {error.filename} is not installed; print the manifest.", file=sys.stderr)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


def manifest(args: Args) -> dict:
    """The JobSet; ValueError for what cannot be, with the numbers."""
    slice_ = hosts.parse_slice(args.target)
    _check(args, slice_)
    tpu = slice_.chip.platform == "tpu"
    annotations = {}
    if tpu:
        # A Job's pods on one node pool and no other Job's: a slice is a node pool.
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    labels = {"kueue.x-k8s.io/queue-name": args.queue} if args.queue else {}
    pods = {"parallelism": slice_.hosts, "completions": slice_.hosts}
    # One pod that fails is the whole Job's failure, and that the job set's, which starts all again.
    job = {"completionMode": "Indexed", "backoffLimit": 0, "template": _pod(args, slice_)}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _some({"name": args.name, "labels": labels, "annotations": annotations}),
        "spec": {
            "failurePolicy": {"maxRestarts": args.max_restarts},
            "replicatedJobs": [
                {"name": _JOB, "replicas": args.slices, "template": {"spec": pods | job}}
            ],
        },
    }


def _check(args: Args, slice_: hosts.Slice) -> None:
    if not args.command:
        raise ValueError("there is nothing to run; put -- before it, as in '-- train --preset P'.")
    # As the JobSet's webhook does: the longest name of a pod is that of a DNS label.
    longest = f"{args.name}-{_JOB}-{args.slices - 1}-{slice_.hosts - 1}-12345"
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", args.name) or len(longest) > 63:
        raise ValueError(
            f"--name {args.name!r} must be lower-case letters, digits and dashes, begin with a "
            f"letter, and have at most {63 - len(longest) + len(args.name)} characters."
        )
    if args.slices < 1 or args.max_restarts < 0:
        raise ValueError(
            f"--slices must be at least 1 and --max-restarts at least 0; got {args.slices} and "
            f"{args.max_restarts}."
        )
    tpu = slice_.chip.platform == "tpu"
    if args.slices > 1 and not (tpu and slice_.hosts > 1):
        # https://cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice: multi-host only.
        raise ValueError(
            f"--slices {args.slices}: only TPU slices of several hosts can be joined, and "
            f"{args.target} is {slice_.chips} chips on {slice_.hosts} hosts. Ask for a larger one."
        )
    if args.networks and (tpu or slice_.hosts == 1):
        raise ValueError(f"--networks are for GPUs on several nodes; {args.target} is not that.")
    if args.networks and args.host_network:
        raise ValueError("give --networks or --host-network, not both.")
    if args.bucket and args.claim:
        raise ValueError("give --bucket or --claim, not both: one holds the run.")
    if args.command[0] == "train":
        _check_run(args, slice_)


def _check_run(args: Args, slice_: hosts.Slice) -> None:
    if not (args.bucket or args.claim):
        raise ValueError(
            "a run in a container's own files ends with it, and other pods do not see it; name "
            "what holds it by --bucket or --claim."
        )
    run = _option(args.command, "--out")
    if run is None or pathlib.PurePosixPath(args.mount) not in pathlib.PurePosixPath(run).parents:
        raise ValueError(f"the run's --out must lie below the mount {args.mount}; got {run}.")
    if (mesh := _option(args.command, "--mesh")) is not None:
        devices = slice_.chips * slice_.chip.devices * args.slices
        if (slices := meshes.parse(mesh, devices).slices) != args.slices:
            raise ValueError(
                f"--slices {args.slices}, and slices={slices} in --mesh {mesh}; they must be equal."
            )


def _option(words: typing.Sequence[str], name: str) -> str | None:
    """The last value of an option, as in '--out RUN' or '--out=RUN'."""
    found = None
    for word, following in zip(words, [*words[1:], None]):
        if word == name:
            found = following
        elif word.startswith(f"{name}="):
            found = word.partition("=")[2]
    return found


def _pod(args: Args, slice_: hosts.Slice) -> dict:
    tpu = slice_.chip.platform == "tpu"
    accelerator = _ACCELERATORS[slice_.chip.name]
    if tpu:
        resource, selector = (
            "google.com/tpu",
            {
                "cloud.google.com/gke-tpu-accelerator": accelerator,
                "cloud.google.com/gke-tpu-topology": slice_.topology,
            },
        )
    else:
        resource, selector = "nvidia.com/gpu", {"cloud.google.com/gke-accelerator": accelerator}
    tolerations = [{"key": resource, "operator": "Exists"}]
    if args.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Exists"})
    annotations, volumes = _storage(args)
    if not tpu:
        # The default of 64 MB is too little for NCCL.
        volumes["/dev/shm"] = {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}
    if args.networks:
        annotations |= _interfaces(args.networks)
        for index, (host, inside) in enumerate(_RDMA_MOUNTS.items()):
            volumes[inside] = {"name": f"rdma-{index}", "hostPath": {"path": host}}
    mounts = [{"name": volume["name"], "mountPath": path} for path, volume in volumes.items()]
    container = {
        "name": "hybrid-jax",
        "image": args.image,
        "command": _command(args),
        "env": _environment(args, slice_),
        "resources": {"limits": {resource: slice_.chips_per_host}},
        "volumeMounts": mounts,
    }
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "serviceAccountName": args.service_account,
        "hostNetwork": args.host_network,
        "dnsPolicy": "ClusterFirstWithHostNet" if args.host_network else None,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [_some(container)],
        "volumes": list(volumes.values()),
    }
    return _some({"metadata": _some({"annotations": annotations}), "spec": _some(spec)})


def _command(args: Args) -> list[str]:
    """The words a pod starts with. Each is a string of its own: no shell reads them again."""
    pod, resume = (_script(name) for name in ("pod.sh", "resume.sh"))
    words = ["/bin/sh", "-c", pod, "pod.sh", resume, *args.command]
    if args.networks:
        words = ["/bin/bash", "-c", _RDMA_SETUP, "bash", *words]
    # Kubernetes puts a variable's value in the place of $(NAME), and $ in that of $$.
    return [re.sub(r"\$(?=[$(])", "$$", word) for word in words]


def _script(name: str) -> str:
    """A file beside this one, without its comments."""
    lines = pathlib.Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("#")) + "\n"


def _storage(args: Args) -> tuple[dict, dict]:
    """Annotations of a pod, and volumes by where they are mounted."""
    if args.claim:
        source: dict = {"persistentVolumeClaim": {"claimName": args.claim}}
        return {}, {args.mount: {"name": "run", **source}}
    if not args.bucket:
        return {}, {}
    # https://cloud.google.com/kubernetes-engine/docs/how-to/persistent-volumes/cloud-storage-fuse-csi-driver
    # Checkpoints appear by renaming their directory, which is refused at the limit's default of 0;
    # a bucket with a hierarchical namespace does it at once.
    attributes = {
        "bucketName": args.bucket,
        "mountOptions": "implicit-dirs,rename-dir-limit=200000",
    }
    if args.host_network:
        # https://github.com/GoogleCloudPlatform/gcs-fuse-csi-driver, docs/authentication.md. A
        # driver that GKE does not manage also wants identityProvider.
        attributes["hostNetworkPodKSA"] = "true"
    driver = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}
    return {"gke-gcsfuse/volumes": "true"}, {args.mount: {"name": "run", "csi": driver}}


def _environment(args: Args, slice_: hosts.Slice) -> list[dict]:
    if args.networks:
        libraries = [{"name": "LD_LIBRARY_PATH", "value": "/usr/local/nvidia/lib64"}]
    else:
        libraries = []
    if slice_.chip.platform == "tpu" or slice_.hosts == 1:
        return libraries
    # The first pod's name in the service that every job set has.
    address = f"{args.name}-{_JOB}-0-0.{args.name}:{_COORDINATOR_PORT}"
    # Not $(JOB_COMPLETION_INDEX): Kubernetes adds that after these, too late for them.
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        *libraries,
        {"name": "JAX_COORDINATOR_ADDRESS", "value": address},
        {"name": "JAX_NUM_PROCESSES", "value": str(slice_.hosts)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]


def _interfaces(networks: tuple[str, ...]) -> dict[str, str]:
    """Annotations that give a pod all of its node's networks, eth0, eth1 and so on."""
    entries = [
        f'{{"interfaceName": "eth{index}", "network": "{network}"}}'
        for index, network in enumerate(networks)
    ]
    return {
        "networking.gke.io/default-interface": "eth0",
        "networking.gke.io/interfaces": f"[{', '.join(entries)}]",
    }


def _some(tree: dict) -> dict:
    """Without what is empty, which Kubernetes need not read."""
    return {name: value for name, value in tree.items() if value not in (None, "", {}, [], False)}


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def to_yaml(tree: dict) -> str:
    """The manifest as kubectl reads it."""
    head = (
        "# Made by scripts/launch/gke.py. What each pod runs is in pod.sh and resume.sh. When\n"
        "# one fails, be it with exit code 75 (asked to stop, or a step hung), all are started\n"
        "# again and the run resumes.\n"
    )
    return head + yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=1 << 16)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
