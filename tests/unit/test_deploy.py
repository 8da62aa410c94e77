"""What lies in deploy/ is what its readers take: Kubernetes, the Dask operator, Dask, a container builder, a shell.

There is no Kubernetes and no container engine here. So files are held against their readers' own schemas, closed: a key
that is not in them is an error, as Kubernetes would drop it without a word.
"""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from nrrn_pipeline.cli.lazy import loaded
from nrrn_pipeline.cluster.kubernetes_settings import USER, KubernetesSettings, Toleration, cluster_manifest, key_secret
from nrrn_pipeline.cluster.worker import GRACE_S

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = "1.35"
BIN = Path(sys.executable).parent
OURS = {"app.kubernetes.io/part-of": "nrrn"}
SETTINGS = KubernetesSettings(
    image="registry.example/nrrn:0.1.0-cuda",
    keys="keys",
    namespace="nrrn",
    workers=4,
    cpus=8,
    memory="32GiB",
    gpus=1,
    env_from=("nrrn-storage",),
    tolerations=(Toleration(key="nvidia.com/gpu", effect="NoSchedule"),),
)
ALL_SETTINGS = SETTINGS.model_copy(
    update={
        "service_account": "nrrn",
        "node_selector": {"gpu": "h100"},
        "volumes": {"raw.of-the-lab": "/raw", "keys": "/data/clean"},
        "tolerations": (Toleration(key="spot", value="yes"),),
    }
)
MANIFESTS = {path.name: yaml.safe_load(path.read_text()) for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))}
MADE = {"settings": cluster_manifest(SETTINGS, "nrrn"), "all settings": cluster_manifest(ALL_SETTINGS, "nrrn-1", 3)}
# what may hold any key
FREE = {"labels", "annotations", "matchLabels", "selector", "requests", "limits", "nodeSelector", "stringData"}


@cache
def custom_schema(kind: str) -> dict[str, Any]:
    """What the operator's own definition of a resource allows, closed."""
    folder = files("dask_kubernetes") / "operator/deployment/helm/dask-kubernetes-operator/crds"
    definition = yaml.safe_load((folder / f"{kind.lower()}.yaml").read_text())
    (version,) = definition["spec"]["versions"]
    text = {"type": "string"}
    labels = {"type": "object", "additionalProperties": text}
    metadata = {"properties": {"name": text, "namespace": text, "labels": labels, "annotations": labels}}
    schema = copy.deepcopy(version["schema"]["openAPIV3Schema"])
    schema["properties"] |= {
        "apiVersion": {"const": f"{definition['spec']['group']}/{version['name']}"},
        "kind": {"const": definition["spec"]["names"]["kind"]},
        "metadata": metadata,
    }
    return closed(schema)


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, without a place for what it does not name."""
    shut = dict(schema)
    if "properties" in schema:
        shut["properties"] = {key: closed(each) for key, each in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            shut.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            shut[key] = closed(schema[key])
    return shut


def check(manifest: dict[str, Any]) -> None:
    """Raise jsonschema.ValidationError if whoever reads a manifest would refuse it, or drop some of it."""
    if manifest["apiVersion"].startswith("kubernetes.dask.org/"):
        jsonschema.Draft202012Validator(custom_schema(manifest["kind"])).validate(manifest)
        for made in operators(manifest):
            kubernetes_validate.validate(made, KUBERNETES, strict=True)
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def operators(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The Deployments, Service and Pod that the operator's own code makes of a DaskCluster or a DaskJob."""
    from dask_kubernetes.operator.controller import controller

    name, labels = manifest["metadata"]["name"], manifest["metadata"]["labels"]
    namespace, spec, made = manifest["metadata"]["namespace"], manifest["spec"], []
    if manifest["kind"] == "DaskJob":
        made = [controller.build_job_pod_spec(name, name, namespace, spec["job"]["spec"], {}, labels)]
        spec = spec["cluster"]["spec"]
    scheduler, worker = spec["scheduler"], spec["worker"]
    group = f"{name}-default"
    return [
        *made,
        controller.build_scheduler_deployment_spec(name, scheduler["spec"], {}, labels),
        controller.build_scheduler_service_spec(name, scheduler["service"], {}, labels),
        controller.build_worker_deployment_spec(group, namespace, name, "0", copy.deepcopy(worker["spec"]), {}, labels),
    ]


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods, with their labels, that come of a manifest."""
    if manifest["kind"] == "CronJob":
        return [manifest["spec"]["jobTemplate"]["spec"]["template"]]
    if manifest["kind"] == "NetworkPolicy":
        return []
    made = operators(manifest)
    return [each for each in made if each["kind"] == "Pod"] + [
        each["spec"]["template"] for each in made if each["kind"] == "Deployment"
    ]


PODS = [(name, pod) for name, manifest in [*MANIFESTS.items(), *MADE.items()] for pod in pods(manifest)]


def mappings(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a document a mapping lies that does not take any key."""
    if isinstance(value, dict) and not FREE & set(where[-1:]):
        yield where
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from mappings(each, (*where, key))


@pytest.mark.parametrize("name", [*MANIFESTS, *MADE])
def test_manifests_are_what_kubernetes_and_the_operator_take(name: str) -> None:
    check({**MANIFESTS, **MADE}[name])


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_typo_anywhere_in_a_manifest_is_caught(name: str) -> None:
    places = [*mappings(MANIFESTS[name])]
    assert len(places) > (6 if name == "networkpolicy.yaml" else 25)
    for where in places:
        wrong = copy.deepcopy(MANIFESTS[name])
        inner = wrong
        for key in where:
            inner = inner[key]
        inner["typo"] = "typo"
        with pytest.raises(jsonschema.ValidationError, match="typo"):
            check(wrong)


def wrongly(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    manifest = copy.deepcopy(MANIFESTS["daskcluster.yaml"])
    change(manifest)
    return manifest


@pytest.mark.parametrize(
    "wrong",
    [
        wrongly(lambda made: made.update(apiVersion="kubernetes.dask.org/v2")),
        wrongly(lambda made: made["spec"]["worker"].update(replicas="4")),
        wrongly(lambda made: made["spec"]["scheduler"].pop("service")),
        wrongly(lambda made: made["spec"]["worker"]["spec"]["containers"][0]["resources"]["limits"].update(cpu=8)),
        wrongly(lambda made: made["spec"]["worker"]["spec"]["containers"][0].update(env={"A": "B"})),
    ],
)
def test_a_value_of_the_wrong_kind_is_caught(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check(wrong)


def test_the_files_say_what_the_settings_make() -> None:
    assert MANIFESTS["daskcluster.yaml"] == cluster_manifest(SETTINGS, "nrrn")
    assert MANIFESTS["daskjob.yaml"]["spec"]["cluster"]["spec"] == cluster_manifest(SETTINGS, "nrrn-job")["spec"]
    readme = (DEPLOY / "kubernetes" / "README.md").read_text()
    block = re.findall(r"(?:^    .*\n)+", readme, re.MULTILINE)[0].replace("\n    ", "\n").strip()
    shown = KubernetesSettings.model_validate(tomllib.loads(block))
    assert shown == SETTINGS.model_copy(update={"tolerations": ()})


def test_all_settings_reach_the_workers_pod() -> None:
    pod = MADE["all settings"]["spec"]["worker"]["spec"]
    (worker,) = pod["containers"]
    assert pod["serviceAccountName"] == "nrrn"
    assert pod["nodeSelector"] == {"gpu": "h100"}
    assert pod["tolerations"] == [{"key": "spot", "operator": "Equal", "value": "yes"}]
    assert [each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"][2:]] == ["raw.of-the-lab", "keys"]
    assert [each["mountPath"] for each in worker["volumeMounts"]] == ["/keys", "/tmp", "/raw", "/data/clean"]
    assert [each["name"] for each in worker["volumeMounts"]] == [each["name"] for each in pod["volumes"]]
    assert worker["command"][worker["command"].index("--nthreads") + 1] == "3"
    bare = cluster_manifest(KubernetesSettings(image="nrrn", keys="keys"), "nrrn")["spec"]["worker"]["spec"]
    assert "--resources" not in bare["containers"][0]["command"]
    assert "nvidia.com/gpu" not in bare["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"gpus": 2}, {"cpus": 0}, {"workers": 0}, {"image": ""}, {"image": "a b"}, {"keys": ""}, {"typo": 1}),
        *({"memory": text} for text in ("16", "16gb", "0GiB", "-1GiB", "1e3GiB", "16Gi")),
        *({"namespace": text} for text in ("", "Lab", "-a", "a/b", "a\n", "x" * 254)),
        *({"env_from": (text,)} for text in ("", "A_B")),
        *({"volumes": {"a": path}} for path in ("data", "/", "//", "/keys", "/keys/", "/tmp", "/a:b", "/a/../tmp", "")),
        *({"volumes": {"a": "/data", "b": "/data/"}}, {"tolerations": ({"key": ""},)}, {"patience": 0}, {"uid": 0}),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        KubernetesSettings.model_validate({"image": "nrrn", "keys": "keys", **wrong})


@pytest.mark.parametrize(("name", "pod"), PODS)
def test_a_pod_can_do_no_more_than_it_must(name: str, pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        assert {"name": "scratch", "mountPath": "/tmp"} in container["volumeMounts"]
        values = {each["name"]: each["value"] for each in container.get("env", ())}
        assert not any(re.search("SECRET|TOKEN|PASSWORD|ACCESS_KEY", variable) for variable in values)
        if GRACE_S in values:
            assert spec["terminationGracePeriodSeconds"] > int(values[GRACE_S])
    # the policy takes it in, whatever made it
    policy = MANIFESTS["networkpolicy.yaml"]["spec"]
    assert policy["podSelector"]["matchLabels"] == OURS
    assert policy["ingress"] == [{"from": [{"podSelector": {"matchLabels": OURS}}]}]
    assert OURS.items() <= pod["metadata"]["labels"].items()


@pytest.mark.parametrize("name", ["daskcluster.yaml", "daskjob.yaml"])
def test_a_dask_cluster_offers_its_tls_port_alone(name: str) -> None:
    (service,) = (each for each in operators(MANIFESTS[name]) if each["kind"] == "Service")
    assert [port["port"] for port in service["spec"]["ports"]] == [8786]
    for pod in pods(MANIFESTS[name]):
        container = pod["spec"]["containers"][0]
        assert {"name": "DASK_CONFIG", "value": "/keys"} in container["env"]
        assert pod["spec"]["volumes"][0]["secret"]["secretName"] == f"{MANIFESTS[name]['metadata']['name']}-keys"
        if container["command"][0] == "dask":
            at = container["command"][container["command"].index("--dashboard-address") + 1]
            assert at.startswith("127.0.0.1:")


def test_the_jobs_driver_names_the_jobs_scheduler() -> None:
    (service,) = (each for each in operators(MANIFESTS["daskjob.yaml"]) if each["kind"] == "Service")
    driver = pods(MANIFESTS["daskjob.yaml"])[0]["spec"]["containers"][0]
    given = {each["name"]: each["value"] for each in driver["env"]}
    assert given["DASK_SCHEDULER_ADDRESS"] == f"tls://{service['metadata']['name']}:8786"


def job_script() -> str:
    (container,) = MANIFESTS["daskjob.yaml"]["spec"]["job"]["spec"]["containers"]
    assert container["command"] == ["sh", "-c"]
    (script,) = container["args"]
    return str(script)


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [([0], 0), ([1, 1, 0], 0), ([2], 2), ([3], 3), ([1, 2], 2), ([130], 130)],
)
def test_the_jobs_driver_goes_on_with_a_run_that_broke_off_and_with_nothing_else(
    tmp_path: Path, statuses: list[int], expected: int
) -> None:
    (tmp_path / "statuses").write_text("".join(f"{each}\n" for each in statuses))
    programs = {
        "nrrn": 'echo "$*" >> ran; status=$(head -n 1 statuses); sed -i 1d statuses; exit "$status"',
        # the scheduler answers at the second attempt
        "python": "echo . >> waited; [ $(wc -l < waited) -ne 1 ]",
        "sleep": "echo $1 >> slept",
    }
    environment = {"SRC": "s", "DST": "d", "WEIGHTS": "w", "DASK_SCHEDULER_ADDRESS": "tls://there:8786"}
    done = with_programs(tmp_path, programs, ["sh", "-c", job_script()], environment)
    assert done.returncode == expected
    ran = (tmp_path / "ran").read_text().splitlines()
    assert ran == ["denoise s d --weights w --cluster tls://there:8786"] * len(statuses)
    assert (tmp_path / "slept").read_text().split() == ["10"] + ["60"] * (len(statuses) - 1)


def with_programs(
    folder: Path, programs: dict[str, str], command: list[str], environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with programs of ours before the system's."""
    (folder / "bin").mkdir()
    for name, script in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    path = {"PATH": f"{folder / 'bin'}:{BIN}:{os.environ['PATH']}", **(environment or {})}
    return subprocess.run(command, cwd=folder, env=path, capture_output=True, text=True, check=False, timeout=30)


def test_the_scripts_are_what_a_shell_takes() -> None:
    readme = (DEPLOY / "kubernetes" / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 3
    for script, shell in ((job_script(), "sh"), *((block, "bash") for block in blocks)):
        command = [BIN / "shellcheck", "--severity", "style", "--shell", shell, "-"]
        done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_the_keys_of_the_readme_are_those_that_a_run_makes_for_itself(tmp_path: Path) -> None:
    readme = (DEPLOY / "kubernetes" / "README.md").read_text()
    block = next(each for each in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL) if "cluster keys" in each)
    done = with_programs(tmp_path, {"kubectl": 'echo "kubectl $*" >> asked'}, ["bash", "-e", "-c", block])
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert "kubectl -n nrrn create secret generic nrrn-job-keys --from-file=keys" in asked
    secret = key_secret(SETTINGS.model_copy(update={"keys": str(tmp_path / "keys")}), "nrrn-job")
    assert secret["stringData"] == {each.name: each.read_text() for each in (tmp_path / "keys").iterdir()}
    assert yaml.safe_load(secret["stringData"]["dask.yaml"])["distributed"]["comm"]["tls"]["ca-file"] == "/keys/ca.pem"
    kubernetes_validate.validate(secret, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", ["daskjob.yaml", "cronjob.yaml"])
def test_the_options_in_the_manifests_are_those_of_the_command(name: str) -> None:
    driver = pods(MANIFESTS[name])[0]["spec"]["containers"][0]
    words = (
        driver["args"] if "command" not in driver else shlex.split(job_script().partition("nrrn ")[2].split("&&")[0])
    )
    known = {option for parameter in loaded(words[0]).params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
