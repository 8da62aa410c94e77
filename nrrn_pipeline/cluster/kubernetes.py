"""Workers as pods of a Kubernetes cluster, by the Dask operator: made for one run, and gone with it.

The operator's own Python class, KubeCluster, speaks to the scheduler without TLS. So the resource is made and deleted
here, and Dask is reached as at any other address: with keys.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any

from nrrn_pipeline.cluster.address import address_client
from nrrn_pipeline.cluster.base import Cluster
from nrrn_pipeline.cluster.keys import security_from
from nrrn_pipeline.cluster.kubernetes_settings import PORT, KubernetesSettings, cluster_manifest, key_secret
from nrrn_pipeline.errors import InputError, RunError

ANSWER_S = 30.0  # of Kubernetes, to one request; kr8s itself would wait for ever
OPERATOR_S = 60.0  # until the operator has taken notice of a new DaskCluster
POLL_S = 2.0
CLOSE_S = 5.0
PAUSES_S = (1.0, 5.0, 20.0)  # between attempts to delete: what stays costs money
HOPELESS = ("InvalidImageName", "ErrImageNeverPull", "ImagePullBackOff", "CreateContainerConfigError")
HOW_TO_INSTALL = "https://kubernetes.dask.org says how to install it"


@contextmanager
def kubernetes_cluster(settings: KubernetesSettings, slabs_each: int) -> Iterator[Cluster]:
    """New pods of the Dask operator, with `slabs_each` slabs in flight in each worker; deleted when the block ends.

    A driver outside the Kubernetes cluster reaches the scheduler through a port-forward of the Kubernetes API.

    Raises InputError, with nothing left behind, if the keys cannot be used, dask-kubernetes is not installed, no
    Kubernetes answers, it has no Dask operator or refuses what is asked for, or no worker is ready within
    settings.patience; RunError if something cannot be deleted, with the command that does it.
    """
    security_from(settings.keys)
    try:
        from anyio.from_thread import start_blocking_portal
        from kr8s.asyncio.portforward import PortForward
    except ImportError as error:
        raise InputError(
            f"clusters of kind kubernetes need a package that is not installed ({error.name}): "
            "pip install nrrn-pipeline[kubernetes]"
        ) from error
    name = f"nrrn-{uuid.uuid4().hex[:8]}"
    with start_blocking_portal() as portal, ExitStack() as stack:
        kubernetes = _Kubernetes(portal, settings.namespace)
        cluster = stack.enter_context(_made(kubernetes, settings, name, slabs_each))
        scheduler = _ready_scheduler(kubernetes, cluster, settings.patience)
        if (address := _address_inside(name, settings.namespace)) is None:
            forward = portal.wrap_async_context_manager(_closed_in_time(PortForward(scheduler, PORT, _free_port())))
            address = f"tls://127.0.0.1:{stack.enter_context(forward)}"
        client = stack.enter_context(address_client(address, settings.keys))
        where = f"Kubernetes, DaskCluster {name} in namespace {settings.namespace}"
        yield Cluster(client, where, patience_s=settings.patience)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:  # kr8s's "auto" guesses, and others may hold what it guesses
        return int(probe.getsockname()[1])


@asynccontextmanager
async def _closed_in_time(forward: Any) -> AsyncIterator[int]:
    """The local port of a port-forward.

    One to a pod that is gone tries for ever, and since Python 3.12 a server waits for what it has accepted.
    """
    try:
        yield await forward.__aenter__()
    finally:
        with suppress(TimeoutError):
            await asyncio.wait_for(forward.__aexit__(None, None, None), CLOSE_S)


class _Kubernetes:
    """The Kubernetes of this environment, asked from this thread; kr8s and its connections live in the portal's."""

    def __init__(self, portal: Any, namespace: str) -> None:
        import kr8s

        self.portal, self.namespace, self.made = portal, namespace, list[Any]()
        self.api: Any = self.ask("connect", kr8s.asyncio.api)

    def ask(self, what: str, call: Callable[..., Any], *words: Any) -> Any:
        """What the call brings. Raises InputError with what Kubernetes says against it, or that it says nothing."""

        async def answer() -> Any:
            async with asyncio.timeout(ANSWER_S):
                return await call(*words)

        try:
            return self.portal.call(answer)
        except Exception as error:  # kr8s lets through whatever httpx, ssl, yaml and its plug-ins raise
            raise InputError(_explained(error, f"{what} in namespace {self.namespace}")) from error

    def make(self, manifest: dict[str, Any]) -> Any:
        """The object that Kubernetes has made."""
        from kr8s import ServerError
        from kr8s.asyncio.objects import new_class

        new = new_class(manifest["kind"], manifest["apiVersion"])(manifest, api=self.api)
        self.made.append(new)  # before: if no answer comes it may be there all the same
        try:
            self.ask(f"make a {manifest['kind']}", new.create)
        except InputError as error:
            if isinstance(error.__cause__, ServerError):
                self.made.remove(new)
            raise
        return new

    def look(self, cluster: Any) -> tuple[str | None, list[Any]]:
        """What the operator says of a DaskCluster, None if nothing yet, and its pods."""
        from kr8s.asyncio.objects import Pod

        async def state() -> tuple[str | None, list[Any]]:
            await cluster.refresh()
            selector = {"dask.org/cluster-name": cluster.name}
            pods = [pod async for pod in self.api.get(Pod, namespace=self.namespace, label_selector=selector)]
            return cluster.raw.get("status", {}).get("phase"), pods

        found: tuple[str | None, list[Any]] = self.ask("see pods", state)
        return found

    def delete(self, before: str = "") -> None:
        """Delete what was made, pods first. Raises RunError if that cannot be, also saying what went wrong before."""
        for pause in (*PAUSES_S, None):
            try:
                while self.made:
                    self.ask(f"delete {self.made[0].name}", _gone, self.made[0])
                    self.made.pop(0)
                return
            except InputError as error:
                if pause is None:
                    left = " ".join(f"{each.singular}/{each.name}" for each in self.made)
                    raise RunError(
                        f"what was made for this run stays ({error}): kubectl delete -n {self.namespace} {left}{before}"
                    ) from error
                time.sleep(pause)


async def _gone(made: Any) -> None:
    from kr8s import NotFoundError

    with suppress(NotFoundError):
        await made.delete()


def _explained(error: Exception, what: str) -> str:
    """What an error of kr8s means to who gave the settings."""
    from kr8s import NotFoundError, ServerError

    if not isinstance(error, ServerError | NotFoundError):
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return f"no Kubernetes answers here, to {what} ({said}): try `kubectl get pods`, and set KUBECONFIG"
    response = getattr(error, "response", None)
    status = response.status_code if response is not None else 0
    if status == 404 and isinstance(getattr(error, "status", None), str):  # no object is lacking: the kind is
        return f"this Kubernetes has no Dask operator, to {what}: {HOW_TO_INSTALL}"
    advice = "; ask its administrator for a role that may" if status in (401, 403) else ""
    return f"Kubernetes refuses to {what}: {str(error)[:300]}{advice}"


@contextmanager
def _made(kubernetes: _Kubernetes, settings: KubernetesSettings, name: str, slabs_each: int) -> Iterator[Any]:
    """The DaskCluster `name` and the Secret with its keys, deleted when the block ends, however it ends."""
    try:
        cluster = kubernetes.make(cluster_manifest(settings, name, slabs_each))
        secret = key_secret(settings, name)
        # so that of a driver that was killed one thing is left to delete; its pods wait for the Secret
        owner = {"apiVersion": cluster.version, "kind": cluster.kind, "name": name, "uid": cluster.metadata["uid"]}
        secret["metadata"]["ownerReferences"] = [owner]
        kubernetes.make(secret)
        yield cluster
    except BaseException as error:
        kubernetes.delete(before=f"; before that: {str(error) or type(error).__name__}")
        raise
    kubernetes.delete()


def _ready_scheduler(kubernetes: _Kubernetes, cluster: Any, patience_s: float) -> Any:
    """The scheduler's pod, once it and a worker are ready. Raises InputError, saying what they wait for."""
    begun, said = time.monotonic(), "there are no pods"
    while True:
        waited_s = time.monotonic() - begun
        try:
            phase, pods = kubernetes.look(cluster)
        except InputError as error:  # it may be back at the next look
            phase, pods, said = "", [], str(error)
        if phase == "Error" or (phase is None and waited_s > OPERATOR_S):
            known = "refuses" if phase else f"has done nothing for {OPERATOR_S:.0f} s with"
            raise InputError(f"the Dask operator {known} DaskCluster {cluster.name}: read its log; {HOW_TO_INSTALL}")
        ready = {pod.labels.get("dask.org/component"): pod for pod in pods if _is_ready(pod.raw)}
        if {"scheduler", "worker"} <= ready.keys():
            return ready["scheduler"]
        troubles = {pod.name: trouble for pod in pods if (trouble := _trouble(pod.raw))}
        if troubles:
            said = "; ".join(f"{pod}: {trouble}" for pod, trouble in troubles.items())[:500]
        if waited_s > patience_s or any(trouble.startswith(HOPELESS) for trouble in troubles.values()):
            raise InputError(f"no worker became ready on Kubernetes in {waited_s:.0f} s ({said}): correct the settings")
        time.sleep(POLL_S)


def _is_ready(pod: dict[str, Any]) -> bool:
    conditions = pod.get("status", {}).get("conditions") or []
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def _trouble(pod: dict[str, Any]) -> str:
    """What Kubernetes says a pod waits for, or nothing."""
    status = pod.get("status", {})
    waiting = [each.get("state", {}).get("waiting") for each in status.get("containerStatuses") or []]
    unplaced = [each for each in status.get("conditions") or [] if each["status"] == "False" and each.get("message")]
    for each in (*filter(None, waiting), *unplaced):
        return f"{each.get('reason', 'waits')}: {each.get('message', '')}".rstrip(": ")
    return ""


def _address_inside(name: str, namespace: str) -> str | None:
    """The scheduler's address, if this process is a pod of the same Kubernetes cluster."""
    host = f"{name}-scheduler.{namespace}.svc"
    if "KUBERNETES_SERVICE_HOST" not in os.environ:
        return None
    try:
        socket.getaddrinfo(host, PORT)
    except OSError:
        return None
    return f"tls://{host}:{PORT}"
