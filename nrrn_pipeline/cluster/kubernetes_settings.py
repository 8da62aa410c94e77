"""What a run asks of Kubernetes: a DaskCluster for the Dask operator, and a Secret with the keys of its members."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from dask.utils import parse_bytes
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nrrn_pipeline.cluster.base import ClusterSettings, process_environment
from nrrn_pipeline.cluster.keys import DASK_YAML
from nrrn_pipeline.cluster.worker import GRACE_S

KEYS, SCRATCH = "/keys", "/tmp"  # the only places in a pod that are not of the image
PORT, SCHEDULER_HTTP, WORKER_HTTP = 8786, 8787, 8788
USER = 10001  # of deploy/docker/Dockerfile
DRAIN_S = 300  # after SIGTERM, as when a machine is emptied, a worker finishes the slabs that it holds
LEAVE_S = 30  # after that, or with nothing to finish
LABELS = {"app.kubernetes.io/part-of": "nrrn"}  # what deploy/kubernetes/networkpolicy.yaml goes by
SCHEDULER_CPUS, SCHEDULER_MEMORY, SCRATCH_SIZE = 1, "4GiB", "4Gi"
HEALTH = (
    "import http.client as h; c = h.HTTPConnection('127.0.0.1', {port}, timeout=9); "
    "c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"
)


def _each_apart(volumes: dict[str, str]) -> dict[str, str]:
    taken = ["/", KEYS, SCRATCH]
    for path in volumes.values():
        if (real := os.path.normpath(path)) in taken:
            raise ValueError(
                f"{path} is taken: mount each claim at a path of its own, and not at /, {KEYS} or {SCRATCH}"
            )
        taken.append(real)
    return volumes


Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
MountPath = Annotated[str, Field(pattern=r"^/[^/:\s][^:\s]*$")]


class Toleration(BaseModel):
    """A taint of nodes that workers put up with, as in a pod's tolerations; no value: whatever its value."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    key: Annotated[str, Field(min_length=1)]
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class KubernetesSettings(ClusterSettings):
    """Workers as pods, each with `cpus`, `memory` ("16GiB") and 0 or 1 GPU.

    keys: a folder that `nrrn cluster keys` made. env_from: Secrets whose entries become workers' environment, such as
    storage credentials. volumes: persistent volume claims, and where workers see each: there the driver must see it
    too. uid: whom files on them belong to. patience: seconds that pods may take to start, and a run be without any.
    """

    kind: Literal["kubernetes"] = "kubernetes"
    image: Annotated[str, Field(pattern=r"^\S+$")]
    keys: Annotated[str, Field(min_length=1)]
    namespace: Name = "default"
    workers: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[int, Field(ge=1)] = 4
    memory: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}[MGT]i?B$")] = "16GiB"
    gpus: Annotated[int, Field(ge=0, le=1)] = 0  # a process computes on one: ask for more workers
    env_from: tuple[Name, ...] = ()
    service_account: Name | None = None
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    volumes: Annotated[dict[Name, MountPath], AfterValidator(_each_apart)] = Field(default_factory=dict)
    uid: Annotated[int, Field(ge=1)] = USER
    patience: Annotated[float, Field(gt=0)] = 1800.0

    @property
    def memory_bytes(self) -> int:
        """What a worker may take."""
        return int(parse_bytes(self.memory))


def cluster_manifest(settings: KubernetesSettings, name: str, slabs_each: int = 2) -> dict[str, Any]:
    """The DaskCluster `name`: scheduler and workers that speak TLS alone, with the keys in the Secret `name`-keys.

    Nothing of it runs as root, writes to its image or listens without TLS but on loopback.
    """
    labels = {"dask.org/cluster-name": name, "dask.org/component": "scheduler"}
    port = {"name": "tcp-comm", "protocol": "TCP"}
    scheduler = _container(
        "scheduler",
        settings.image,
        ["dask", "scheduler", "--port", str(PORT), "--dashboard-address", f"127.0.0.1:{SCHEDULER_HTTP}"],
        SCHEDULER_HTTP,
    ) | {"ports": [{**port, "containerPort": PORT}], "resources": _resources(SCHEDULER_CPUS, SCHEDULER_MEMORY)}
    return {
        "apiVersion": "kubernetes.dask.org/v1",
        "kind": "DaskCluster",
        "metadata": {"name": name, "namespace": settings.namespace, "labels": LABELS},
        "spec": {
            "scheduler": {
                "spec": _pod(settings, name, scheduler, LEAVE_S),
                "service": {
                    "type": "ClusterIP",
                    "selector": labels,
                    "ports": [{**port, "port": PORT, "targetPort": "tcp-comm"}],
                },
            },
            "worker": {"replicas": settings.workers, "spec": _worker_pod(settings, name, slabs_each)},
        },
    }


def key_secret(settings: KubernetesSettings, name: str) -> dict[str, Any]:
    """The Secret `name`-keys with the folder of keys, whose dask.yaml names them where pods see them."""
    content = {file: (Path(settings.keys) / file).read_text() for file in ("ca.pem", "cert.pem", "key.pem")}
    paths = {kind: json.dumps(f"{KEYS}/{kind}.pem") for kind in ("ca", "cert", "key")}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": f"{name}-keys", "namespace": settings.namespace, "labels": LABELS},
        "immutable": True,
        "stringData": {**content, "dask.yaml": DASK_YAML.format(folder=KEYS, **paths)},
    }


def _worker_pod(settings: KubernetesSettings, name: str, slabs_each: int) -> dict[str, Any]:
    # Kubernetes starts again what dies, and tells this process, not a nanny, when to go
    command = ["dask", "worker", f"tls://{name}-scheduler:{PORT}", "--no-nanny", "--nthreads", str(slabs_each)]
    command += ["--memory-limit", "0", "--preload", "nrrn_pipeline.cluster.worker", "--death-timeout", "300"]
    command += ["--dashboard-address", f"127.0.0.1:{WORKER_HTTP}"]
    if settings.gpus:
        command += ["--resources", f"GPU={settings.gpus}"]
    worker = _container("worker", settings.image, command, WORKER_HTTP)
    environment = {GRACE_S: str(DRAIN_S), **process_environment(settings.cpus)}
    worker["env"] += [{"name": variable, "value": value} for variable, value in environment.items()]
    worker["resources"] = _resources(settings.cpus, settings.memory, settings.gpus)
    # volumes have names of their own: a claim's may be too long for one, or one of ours
    claims = {f"claim-{number}": claim for number, claim in enumerate(settings.volumes)}
    worker["volumeMounts"] += [{"name": each, "mountPath": settings.volumes[claims[each]]} for each in claims]
    if settings.env_from:
        worker["envFrom"] = [{"secretRef": {"name": secret}} for secret in settings.env_from]
    pod = _pod(settings, name, worker, DRAIN_S + LEAVE_S)
    pod["volumes"] += [{"name": each, "persistentVolumeClaim": {"claimName": claims[each]}} for each in claims]
    if settings.service_account:
        pod["serviceAccountName"] = settings.service_account
    if settings.node_selector:
        pod["nodeSelector"] = settings.node_selector
    if settings.tolerations:
        pod["tolerations"] = [
            each.model_dump(exclude_none=True) | {"operator": "Exists" if each.value is None else "Equal"}
            for each in settings.tolerations
        ]
    return pod


def _pod(settings: KubernetesSettings, name: str, container: dict[str, Any], end_s: int) -> dict[str, Any]:
    return {
        "automountServiceAccountToken": False,  # neither Dask nor we ask Kubernetes anything from within a pod
        "enableServiceLinks": False,  # else Kubernetes sets environment variables by the names of Services
        "terminationGracePeriodSeconds": end_s,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": settings.uid,
            "runAsGroup": settings.uid,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            # readable by the container's user, the only one there; fsGroup would do it too, and would change the
            # owner of every file of a claim
            {"name": "keys", "secret": {"secretName": f"{name}-keys", "defaultMode": 0o444}},
            {"name": "scratch", "emptyDir": {"sizeLimit": SCRATCH_SIZE}},
        ],
    }


def _container(name: str, image: str, command: list[str], http_port: int) -> dict[str, Any]:
    # the pages are on loopback, so a probe is a command in the container
    asked = {"exec": {"command": ["python", "-IS", "-c", HEALTH.format(port=http_port)]}, "timeoutSeconds": 10}
    return {
        "name": name,
        "image": image,
        "command": command,
        "env": [{"name": "DASK_CONFIG", "value": KEYS}],
        "volumeMounts": [
            {"name": "keys", "mountPath": KEYS, "readOnly": True},
            {"name": "scratch", "mountPath": SCRATCH},
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "startupProbe": {**asked, "periodSeconds": 5, "failureThreshold": 120},
        "readinessProbe": {**asked, "periodSeconds": 20},
        # minutes: a busy process is slow to answer, and a scheduler that is restarted ends the run
        "livenessProbe": {**asked, "periodSeconds": 30, "failureThreshold": 10},
    }


def _resources(cpus: int, memory: str, gpus: int = 0) -> dict[str, Any]:
    """What is asked for is the limit: such pods are the last that a node in need evicts."""
    amounts = {"cpu": str(cpus), "memory": memory.removesuffix("B")} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    return {"requests": amounts, "limits": amounts}
