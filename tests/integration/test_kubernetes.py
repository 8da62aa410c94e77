"""A cluster on Kubernetes comes, works and goes, whatever happens on the way.

The server is ours and remembers what it is asked; kr8s, its port-forward and TLS are real, and so are a scheduler and a
worker, started by the very commands and environment that the manifest gives their pods.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from kr8s.asyncio.portforward import PortForward

from nrrn_pipeline.cluster import kubernetes
from nrrn_pipeline.cluster.keys import make_keys
from nrrn_pipeline.cluster.kubernetes import kubernetes_cluster
from nrrn_pipeline.cluster.kubernetes_settings import KubernetesSettings, cluster_manifest, key_secret
from nrrn_pipeline.errors import InputError, NrrnError, RunError
from tests.kubernetes_api import FakeKubernetes, fake_kubernetes, free_ports, pod, running, status, write_kubeconfig

CLUSTERS = "/apis/kubernetes.dask.org/v1/namespaces/lab/daskclusters"
HTTP = {"scheduler": 8787, "worker": 8788}
SECRETS = "/api/v1/namespaces/lab/secrets"


@dataclasses.dataclass(frozen=True)
class Pods:
    """Processes that run as the manifest's pods would, with `ports` instead of 8786, 8787 and 8788."""

    keys: Path
    ports: tuple[int, int, int]
    scheduler: subprocess.Popen[bytes]
    worker: subprocess.Popen[bytes]
    containers: dict[str, dict[str, Any]]

    def health(self, component: str, port: int) -> int:
        probe = self.containers[component]["livenessProbe"]["exec"]["command"]
        words = [word.replace(f" {HTTP[component]},", f" {port},") for word in probe]
        assert words != probe
        return subprocess.run([sys.executable, *words[1:]], stderr=subprocess.DEVNULL, timeout=20).returncode


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    folder = tmp_path_factory.mktemp("pods")
    keys = make_keys(folder / "keys")
    spec = cluster_manifest(settings(keys, gpus=1, cpus=1), "nrrn")["spec"]
    containers = {each: spec[each]["spec"]["containers"][0] for each in ("scheduler", "worker")}
    ports = free_ports()
    with ExitStack() as stack:
        processes = [stack.enter_context(running(containers[each], keys, ports, folder)) for each in containers]
        pods = Pods(keys, ports, *processes, containers)
        until = time.monotonic() + 120
        while pods.health("scheduler", ports[1]) != 0:  # until then a port-forward would lead to nobody
            assert time.monotonic() < until, (folder / f"{containers['scheduler']['name']}.log").read_text()
        yield pods


def settings(keys: Path, **more: Any) -> KubernetesSettings:
    return KubernetesSettings(image="nrrn:test", keys=str(keys), namespace="lab", **{"patience": 30, **more})


@pytest.fixture
def fake(pods: Pods, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    monkeypatch.setattr(kubernetes, "POLL_S", 0.05)
    monkeypatch.setattr(kubernetes, "PAUSES_S", (0.05, 0.05))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with fake_kubernetes(tmp_path / "kubeconfig", pods.ports[0]) as server:
        yield server


def refused(pods: Pods, **more: Any) -> str:
    with pytest.raises(InputError) as error, kubernetes_cluster(settings(pods.keys, **more), 2):
        raise AssertionError("it started")
    assert str(error.value).isprintable()
    return str(error.value)


def test_a_cluster_is_made_works_through_the_port_forward_and_is_gone(pods: Pods, fake: FakeKubernetes) -> None:
    with kubernetes_cluster(settings(pods.keys), 2) as cluster:
        manifest, secret = fake.made
        name = manifest["metadata"]["name"]
        assert set(fake.objects) == {f"{CLUSTERS}/{name}", f"{SECRETS}/{name}-keys"}
        assert cluster.where == f"Kubernetes, DaskCluster {name} in namespace lab"
        assert cluster.patience_s == 30
        cluster.client.wait_for_workers(1, timeout=60)
        assert cluster.client.submit(bytes.hex, b"voxels", pure=False).result(timeout=30) == b"voxels".hex()
        assert cluster.client.submit(len, bytes(2**22), pure=False).result(timeout=30) == 2**22  # many frames
    assert manifest == {
        **cluster_manifest(settings(pods.keys), name, 2),
        "metadata": {**cluster_manifest(settings(pods.keys), name)["metadata"], "uid": manifest["metadata"]["uid"]},
    }
    (owner,) = secret["metadata"].pop("ownerReferences")
    assert owner["uid"] == manifest["metadata"]["uid"]
    assert secret["stringData"] == key_secret(settings(pods.keys), name)["stringData"]
    assert not fake.objects
    assert f"FORWARD /api/v1/namespaces/lab/pods/{name}-scheduler-0/portforward" in fake.asked


def test_pods_run_under_the_settings_of_deploy_and_listen_without_tls_on_loopback_alone(
    pods: Pods, fake: FakeKubernetes
) -> None:
    with kubernetes_cluster(settings(pods.keys), 2) as cluster:
        (worker,) = cluster.client.scheduler_info()["workers"].values()
        assert (worker["nthreads"], worker["resources"], worker["memory_limit"]) == (2, {"GPU": 1.0}, 0)
        allowed = cluster.client.run_on_scheduler(dask.config.get, "distributed.scheduler.allowed-failures")
        spilled = cluster.client.run(dask.config.get, "distributed.worker.memory.spill")
        environment = cluster.client.run(os.getenv, "MALLOC_ARENA_MAX")
    assert (allowed, [*spilled.values()], [*environment.values()]) == (1, [False], ["1"])
    for process, http in ((pods.scheduler, pods.ports[1]), (pods.worker, pods.ports[2])):
        (found,) = [
            each.laddr.ip
            for each in psutil.Process(process.pid).net_connections("inet")
            if each.status == psutil.CONN_LISTEN and each.laddr.port == http
        ]
        assert found == "127.0.0.1"
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        unused = nobody.getsockname()[1]
    for component, port in (("scheduler", pods.ports[1]), ("worker", pods.ports[2])):
        assert pods.health(component, port) == 0
        assert pods.health(component, unused) != 0


def test_a_pod_that_has_to_go_finishes_what_it_holds_and_takes_no_more(
    pods: Pods, fake: FakeKubernetes, tmp_path: Path
) -> None:
    ports = (*pods.ports[:2], free_ports()[0])
    with (
        kubernetes_cluster(settings(pods.keys), 2) as cluster,
        running(pods.containers["worker"], pods.keys, ports, tmp_path) as leaving,
    ):
        client = cluster.client
        client.wait_for_workers(2, timeout=60)
        (here,) = (each for each, pid in client.run(os.getpid).items() if pid == leaving.pid)
        slab = client.submit(_slow_slab, tmp_path / "begun", pure=False, workers=[here])
        while not (tmp_path / "begun").exists():
            time.sleep(0.02)
        leaving.terminate()
        assert slab.result(timeout=30) == leaving.pid
        del slab  # a record that nobody has fetched keeps its worker
        assert leaving.wait(timeout=30) == 0
        assert client.submit(os.getpid, pure=False).result(timeout=30) == pods.worker.pid


def _slow_slab(begun: Path) -> int:
    begun.touch()
    time.sleep(2)
    return os.getpid()


def test_what_goes_wrong_in_the_block_leaves_nothing_behind(pods: Pods, fake: FakeKubernetes) -> None:
    def interrupted() -> None:
        with kubernetes_cluster(settings(pods.keys), 2):
            assert len(fake.objects) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not fake.objects


def fail(fake: FakeKubernetes, method: str, end: str, code: int, times: int = 10**9) -> None:
    """Answer so, so often, to one kind of request."""
    left = iter(range(times))
    fake.fail = lambda asked, path: (
        (code, status(code, "no, says the test"))
        if asked == method and end in path and next(left, None) is not None
        else None
    )


def test_a_kubernetes_without_the_operator_is_refused(pods: Pods, fake: FakeKubernetes) -> None:
    fake.fail = lambda method, path: (404, "404 page not found") if "daskclusters" in path else None
    said = refused(pods)
    assert said.startswith("this Kubernetes has no Dask operator, to make a DaskCluster in namespace lab")
    assert "https://kubernetes.dask.org" in said
    assert not fake.objects


@pytest.mark.parametrize(("end", "kind"), [("daskclusters", "DaskCluster"), ("secrets", "Secret")])
def test_what_kubernetes_forbids_is_said_and_nothing_stays(
    pods: Pods, fake: FakeKubernetes, end: str, kind: str
) -> None:
    fail(fake, "POST", end, 403)
    assert refused(pods) == (
        f"Kubernetes refuses to make a {kind} in namespace lab: no, says the test; "
        "ask its administrator for a role that may"
    )
    assert not fake.objects


def waiting(reason: str, message: str) -> dict[str, Any]:
    return {"containerStatuses": [{"state": {"waiting": {"reason": reason, "message": message}}}]}


UNPLACED = [
    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}
]
STUCK: dict[str, tuple[Callable[[str], list[dict[str, Any]]], str]] = {
    "a wrong image": (
        lambda name: [pod(name, "worker", **waiting("ImagePullBackOff", "nrrn:test not found"))],
        "-worker-0: ImagePullBackOff: nrrn:test not found): correct the settings",
    ),
    "a Secret that is not there": (
        lambda name: [pod(name, "worker", **waiting("CreateContainerConfigError", 'secret "s3" not found'))],
        'CreateContainerConfigError: secret "s3" not found',
    ),
}
SLOW = {
    "no machine": (lambda name: [pod(name, "worker", conditions=UNPLACED)], "Unschedulable: 0/3 nodes are available"),
    "no pods": (lambda name: [], "in 0 s (there are no pods)"),
    "no news": (lambda name: [{**pod(name, "scheduler"), "status": {}}], "no worker became ready on Kubernetes"),
}


@pytest.mark.parametrize("case", STUCK)
def test_pods_that_can_never_start_are_not_waited_for(pods: Pods, fake: FakeKubernetes, case: str) -> None:
    fake.pods, expected = STUCK[case]
    begun = time.monotonic()
    assert expected in refused(pods)
    assert time.monotonic() - begun < 30  # and not a minute
    assert not fake.objects


@pytest.mark.parametrize("case", SLOW)
def test_patience_ends_with_the_reason(pods: Pods, fake: FakeKubernetes, case: str) -> None:
    fake.pods, expected = SLOW[case]
    assert expected in refused(pods, patience=0.3)
    assert not fake.objects


@pytest.mark.parametrize(("phases", "expected"), [([None], "has done nothing for 0 s with"), (["Error"], "refuses")])
def test_an_operator_that_does_not_work_is_named(
    pods: Pods, fake: FakeKubernetes, monkeypatch: pytest.MonkeyPatch, phases: list[str | None], expected: str
) -> None:
    monkeypatch.setattr(kubernetes, "OPERATOR_S", 0.2)
    fake.phases, fake.pods = phases, lambda name: []
    assert f"the Dask operator {expected} DaskCluster nrrn-" in refused(pods)
    assert not fake.objects


def test_a_server_that_fails_while_pods_start_is_asked_again(pods: Pods, fake: FakeKubernetes) -> None:
    fail(fake, "GET", "/pods", 503, times=3)
    with kubernetes_cluster(settings(pods.keys), 2):
        pass
    assert not fake.objects


# a port-forward that never succeeds is ended in the midst of a connection
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in.*connect_tcp:pytest.PytestUnraisableExceptionWarning")
def test_a_scheduler_that_does_not_answer_leaves_nothing_behind(
    pods: Pods, fake: FakeKubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nrrn_pipeline.cluster.address.ANSWER_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        fake.scheduler_port = nobody.getsockname()[1]
    assert "no Dask scheduler answers at tls://127.0.0.1:" in refused(pods)
    assert not fake.objects
    gc.collect()  # here, where the warnings are expected


def test_a_port_forward_that_does_not_end_is_left(
    pods: Pods, fake: FakeKubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "CLOSE_S", 0.1)
    end = PortForward.__aexit__

    async def never(self: PortForward, *error: Any) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await end(self, *error)

    monkeypatch.setattr(PortForward, "__aexit__", never)
    begun = time.monotonic()
    with kubernetes_cluster(settings(pods.keys), 2):
        pass
    assert time.monotonic() - begun < 60  # and not an hour
    assert not fake.objects


def test_deleting_is_tried_again(pods: Pods, fake: FakeKubernetes) -> None:
    fail(fake, "DELETE", "", 500, times=2)
    with kubernetes_cluster(settings(pods.keys), 2):
        pass
    assert not fake.objects


@pytest.mark.parametrize("before", [None, InputError("the volume is no Zarr")])
def test_what_cannot_be_deleted_is_named_with_the_command_that_does_it(
    pods: Pods, fake: FakeKubernetes, before: NrrnError | None
) -> None:
    fail(fake, "DELETE", "", 500)

    def run() -> None:
        with kubernetes_cluster(settings(pods.keys), 2):
            if before:
                raise before

    with pytest.raises(RunError) as error:
        run()
    (name,) = (each["metadata"]["name"] for each in fake.made if each["kind"] == "DaskCluster")
    command = f"kubectl delete -n lab daskcluster/{name} secret/{name}-keys"
    assert str(error.value).endswith(f"{command}; before that: the volume is no Zarr" if before else command)


def test_without_a_kubernetes_that_answers_it_is_said_in_time(
    pods: Pods, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "ANSWER_S", 0.5)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    config = tmp_path / "kubeconfig"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for content in (None, "", "{", "clusters: 3", address):
            if content is not None:
                monkeypatch.setenv("KUBECONFIG", str(config))
                config.write_text(content)
                if content == address:
                    write_kubeconfig(config, address)
            said = refused(pods)
            assert said.startswith("no Kubernetes answers here, to connect in namespace lab ("), said
            assert said.endswith("): try `kubectl get pods`, and set KUBECONFIG")
    write_kubeconfig(config, address)
    assert "ConnectError" in refused(pods)


def test_a_missing_package_is_named(pods: Pods, fake: FakeKubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kr8s.asyncio.portforward", None)
    assert "pip install nrrn-pipeline[kubernetes]" in refused(pods)
    assert not fake.asked


def test_keys_are_looked_at_before_kubernetes_is_asked(fake: FakeKubernetes, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are no keys in"), kubernetes_cluster(settings(tmp_path / "none"), 2):
        pass
    assert not fake.asked


def test_a_driver_in_the_cluster_connects_to_the_service(
    pods: Pods, fake: FakeKubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def resolve(host: str, *more: Any, **others: Any) -> list[Any]:
        asked.append(host)
        return []

    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr(kubernetes.socket, "getaddrinfo", resolve)
    assert kubernetes._address_inside("nrrn-1", "lab") == "tls://nrrn-1-scheduler.lab.svc:8786"
    assert asked == ["nrrn-1-scheduler.lab.svc"]
    monkeypatch.undo()
    assert kubernetes._address_inside("nrrn-1", "lab") is None
