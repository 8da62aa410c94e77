"""Sources, outputs and weights wherever they lie; and secrets nowhere but where they belong."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pytest

from nrrn_pipeline import Box, InputError, Layout, Options, denoise, open_volume, using_options, verify
from nrrn_pipeline.cluster import local_client
from nrrn_pipeline.ledger import Ledger
from nrrn_pipeline.planning import plan_denoise
from nrrn_pipeline.preparing import describe_weights
from nrrn_pipeline.run import run_plan
from nrrn_pipeline.runners import DaskRunner
from nrrn_pipeline.slab import SlabTask, denoise_slab
from tests.servers import ObjectStore
from tests.support import bare_zarr, image_like, ome_image, stored_chunks, tiny_weights

LAYOUT = Layout(chunk=(4, 32, 32), shard=(4, 64, 64), tile=64)
OPTIONS = Options(layout=LAYOUT, cluster="serial", device="cpu")
WORDS = ("--chunk", "4,32,32", "--shard", "4,64,64", "--tile", "64", "--device", "cpu")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a volume, weights and an output."""
    folder = tmp_path_factory.mktemp("local")
    bare_zarr(folder / "in.zarr", image_like((12, 100, 120)), chunks=(4, 32, 32))
    tiny_weights(folder / "w.safetensors")
    denoise(folder / "in.zarr", folder / "out.zarr", folder / "w.safetensors", OPTIONS)
    return folder


def put_tree(store: ObjectStore, bucket: str, folder: Path, name: str) -> None:
    files = [folder / name] if (folder / name).is_file() else (folder / name).rglob("*")
    for file in files:
        if file.is_file():
            store.put(bucket, str(file.relative_to(folder)), file.read_bytes())


def chunks_in(store: ObjectStore, bucket: str, name: str) -> dict[str, bytes]:
    return {f"c/{key.lstrip('/')}": data for key, data in store.listing(bucket, f"{name}/0/c/").items()}


def nrrn(store: ObjectStore, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | store.environment
    return subprocess.run(
        [sys.executable, "-m", "nrrn_pipeline.cli", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def bucket(seaweed: ObjectStore, local: Path) -> str:
    seaweed.make_bucket("places")
    for name in ("in.zarr", "w.safetensors"):
        put_tree(seaweed, "places", local, name)
    return "places"


def test_all_of_it_on_s3_gives_the_bytes_of_a_local_run(seaweed: ObjectStore, bucket: str, local: Path) -> None:
    words = ("denoise", "s3://places/in.zarr", "s3://places/out.zarr", "--weights", "s3://places/w.safetensors")
    done = nrrn(seaweed, *words, *WORDS, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert chunks_in(seaweed, bucket, "out.zarr") == stored_chunks(local / "out.zarr/0")
    assert nrrn(seaweed, "verify", "s3://places/out.zarr", "--deep").returncode == 0
    assert "complete" in nrrn(seaweed, "status", "s3://places/out.zarr").stdout
    again = nrrn(seaweed, *words, *WORDS, "--cluster", "serial")
    assert "12 of them done before" in again.stdout


def test_source_and_output_may_lie_in_different_stores(
    seaweed: ObjectStore, moto_s3: ObjectStore, bucket: str, local: Path
) -> None:
    moto_s3.make_bucket("public")
    put_tree(moto_s3, "public", local, "in.zarr")
    with moto_s3.in_use():
        fsspec.filesystem("s3").chmod("public/in.zarr", "public-read", recursive=True)
    options = {
        "s3://public/": {"endpoint_url": moto_s3.endpoint, "anon": True},
        "s3://places/": {"endpoint_url": seaweed.endpoint},
    }
    environment = replace(seaweed, endpoint="http://127.0.0.1:9")  # nothing answers there
    words = ("denoise", "s3://public/in.zarr", "s3://places/mixed.zarr", "--weights", str(local / "w.safetensors"))
    done = nrrn(environment, *words, *WORDS, "--workers", "1", "--storage-options", json.dumps(options))
    assert done.returncode == 0, done.stderr
    assert chunks_in(seaweed, bucket, "mixed.zarr") == stored_chunks(local / "out.zarr/0")


def test_a_profile_names_endpoint_and_credentials(
    seaweed: ObjectStore, bucket: str, local: Path, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text(f"[profile lab]\nendpoint_url = {seaweed.endpoint}\nregion = us-east-1\n")
    (tmp_path / "credentials").write_text(
        f"[lab]\naws_access_key_id = {seaweed.key}\naws_secret_access_key = {seaweed.secret}\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
    }
    command = [sys.executable, "-m", "nrrn_pipeline.cli", "info", "s3://places/in.zarr"]
    shown = subprocess.run(
        [*command, "--storage-options", '{"profile": "lab"}'], env=environment, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "12 x 100 x 120" in shown.stdout


def test_a_bucket_that_wants_credentials_refuses_the_anonymous_in_one_line(seaweed: ObjectStore, bucket: str) -> None:
    refused = nrrn(seaweed, "info", "s3://places/in.zarr", "--storage-options", '{"anon": true}')
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("nrrn: s3://places/in.zarr cannot be read")
    assert "Check the address, and your credentials for it" in line


def test_a_bucket_that_is_not_there_is_named(moto_s3: ObjectStore, local: Path) -> None:
    with moto_s3.in_use():
        with pytest.raises(InputError, match=r"no volume at s3://nowhere/in\.zarr"):
            open_volume("s3://nowhere/in.zarr")
        with pytest.raises(InputError, match=r"the output s3://nowhere/out\.zarr cannot be written"):
            denoise(local / "in.zarr", "s3://nowhere/out.zarr", local / "w.safetensors", OPTIONS)


def test_all_of_it_in_memory_gives_the_bytes_of_a_local_run(local: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("in.zarr", "w.safetensors"):
        memory.put(str(local / name), f"/all/{name}", recursive=True)
    denoise("memory://all/in.zarr", "memory://all/out.zarr", "memory://all/w.safetensors", OPTIONS)
    found = {f"c/{key.partition('/0/c/')[2]}": memory.cat_file(key) for key in memory.find("/all/out.zarr/0/c")}
    assert found == stored_chunks(local / "out.zarr/0")
    assert verify("memory://all/out.zarr", deep=True) == []
    memory.rm("/all", recursive=True)


@pytest.fixture
def web(local: Path) -> Iterator[str]:
    """The folder on a plain web server, which knows no ranges."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(local)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["bare", "ome"])
def test_a_web_server_is_read_from(local: Path, web: str, tmp_path: Path, kind: str) -> None:
    name = "in.zarr"
    if kind == "ome":
        name = "image.zarr"
        ome_image(local / name, image_like((12, 100, 120)))
    some = replace(OPTIONS, roi=Box.parse("0:4,0:100,0:120"))
    denoise(f"{web}/{name}", tmp_path / "out.zarr", local / "w.safetensors", some)
    whole = stored_chunks(local / "out.zarr/0")
    assert stored_chunks(tmp_path / "out.zarr/0") == {key: whole[key] for key in whole if key.startswith("c/0/")}


def test_a_web_server_is_not_written_to(local: Path, web: str) -> None:
    with pytest.raises(InputError, match=r"out\.zarr cannot be written: .*501"):
        denoise(local / "in.zarr", f"{web}/out.zarr", local / "w.safetensors", OPTIONS)


@pytest.fixture(scope="module")
def outcomes(seaweed: ObjectStore, bucket: str, local: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What runs say that end well, are refused, or break; with everything that they leave in storage."""
    words = ("denoise", "s3://places/in.zarr", "s3://places/secret.zarr", "--weights", "s3://places/w.safetensors")
    options = json.dumps({"endpoint_url": seaweed.endpoint})
    said = nrrn(seaweed, *words, *WORDS, "--workers", "1", "--storage-options", options)
    assert said.returncode == 0, said.stderr
    texts = [said.stdout, said.stderr]
    wrong = replace(seaweed, key="testkey-wrong", secret="testsecret-wrong")
    for store, more in ((wrong, ()), (seaweed, ("--storage-options", '{"secret": "testsecret"}'))):
        refused = nrrn(store, *words, *WORDS, *more)
        assert refused.returncode == 2
        assert refused.stderr.startswith("nrrn: ")
        texts += [refused.stdout, refused.stderr]
    script = "from nrrn_pipeline import open_volume; open_volume('s3://places/in.zarr')"
    broken = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | wrong.environment, capture_output=True, text=True
    )
    assert "Traceback" in broken.stderr
    texts += [broken.stderr, *(str(data) for data in seaweed.listing("places", "secret.zarr").values())]
    return "\n".join(texts)


@pytest.mark.parametrize("secret", ["testkey", "testsecret"])
def test_credentials_are_in_no_message_log_traceback_ledger_or_provenance(outcomes: str, secret: str) -> None:
    assert "secret.zarr" in outcomes
    assert secret not in outcomes


def test_credentials_are_in_no_task_and_no_log_of_dask(
    seaweed: ObjectStore, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    with (
        seaweed.in_use(),
        using_options({"endpoint_url": seaweed.endpoint}),
        local_client(1) as client,
    ):
        submit: Callable[..., object] = client.submit

        def spy(task: object, item: object, **options: object) -> object:
            sent.append(pickle.dumps((task, item, options)))
            return submit(task, item, **options)

        monkeypatch.setattr(client, "submit", spy)
        weights = describe_weights("s3://places/w.safetensors")
        plan = plan_denoise(open_volume("s3://places/in.zarr"), "s3://places/dask.zarr", weights, LAYOUT)
        list(run_plan(plan, DaskRunner(client), "cpu"))
        statistics = Ledger(plan.target.url).statistics()
        assert statistics is not None
        slab = plan.slabs[0]
        sent.append(pickle.dumps((partial(denoise_slab, plan), SlabTask(slab, statistics.of(slab.read.z)))))
        logs = str([client.get_scheduler_logs(), client.get_worker_logs(), client.scheduler_info()])
    assert len(sent) > 12
    assert seaweed.endpoint.encode() in sent[0]  # options travel, secrets do not
    for secret in (seaweed.key, seaweed.secret):
        assert not [task for task in sent if secret.encode() in task]
        assert secret not in logs
