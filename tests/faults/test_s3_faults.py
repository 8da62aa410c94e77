"""A real object store behind a proxy that does it harm: exact bytes, or a loud end that names what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from nrrn_pipeline import Layout, NrrnError, Options, RunError, SlabsFailedError, denoise, verify
from nrrn_pipeline.places import using_options
from tests.faults.proxy import FaultProxy, Request
from tests.servers import ObjectStore
from tests.support import image_like, stored_chunks, tiny_weights

LAYOUT = Layout(chunk=(4, 32, 32), shard=(4, 64, 64), tile=64)
OPTIONS = Options(layout=LAYOUT, cluster="serial", device="cpu", keep_gb=0)  # so that there are many requests
SLABS = 16
STALL_S = 30.0
CASES = [
    (kind, rate)
    for kind in ("500", "503", "429", "reset", "stall", "truncated", "short", "flipped")
    for rate in (0.01, 0.1, 0.3)
]


@dataclass
class Lab:
    """A source and weights in a bucket, and the chunks that an undisturbed local run gives."""

    store: ObjectStore
    weights: Path
    expected: dict[str, bytes]
    injected: Counter[tuple[str, float]] = field(default_factory=Counter)

    def output(self, name: str) -> dict[str, bytes]:
        found = self.store.listing("lab", f"{name}/0/c/")
        return {f"c/{key.lstrip('/')}": data for key, data in found.items()}


@pytest.fixture(scope="module")
def lab(seaweed: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    array = zarr.create_array(
        folder / "in.zarr",
        shape=(16, 90, 120),
        dtype="uint8",
        chunks=(4, 32, 32),
        shards=(8, 64, 64),
        compressors=[ZstdCodec(), Crc32cCodec()],
    )
    array[:] = image_like((16, 90, 120))
    weights = tiny_weights(folder / "w.safetensors")
    denoise(folder / "in.zarr", folder / "out.zarr", weights, OPTIONS)
    seaweed.make_bucket("lab")
    for file in (folder / "in.zarr").rglob("*"):
        if file.is_file():
            seaweed.put("lab", f"in.zarr/{file.relative_to(folder / 'in.zarr')}", file.read_bytes())
    return Lab(seaweed, weights, stored_chunks(folder / "out.zarr" / "0"))


@pytest.fixture
def proxy(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """What storage options name as the endpoint, with hurried clients."""
    monkeypatch.setattr("nrrn_pipeline.retrying.FIRST_PAUSE_S", 0.002)
    monkeypatch.setattr("nrrn_pipeline.volume.voxels.FIRST_PAUSE_S", 0.002)
    monkeypatch.setattr("nrrn_pipeline.retrying.LONGEST_PAUSE_S", 0.02)
    with (
        FaultProxy(lab.store.endpoint, seed=1, stall_s=STALL_S) as proxy,
        lab.store.in_use(),
        using_options({"endpoint_url": proxy.endpoint, "config_kwargs": {"read_timeout": 0.15}}),
    ):
        yield proxy


def run(lab: Lab, name: str, options: Options = OPTIONS) -> NrrnError | OSError | None:
    """Denoise into the bucket; what it ended with."""
    try:
        denoise("s3://lab/in.zarr", f"s3://lab/{name}", lab.weights, options)
    except (NrrnError, OSError) as error:
        return error
    return None


@pytest.mark.parametrize(("kind", "rate"), CASES)
def test_a_run_among_faults_gives_exact_bytes_or_names_what_it_lacks(
    lab: Lab, proxy: FaultProxy, kind: str, rate: float
) -> None:
    name = f"{kind}-{rate}"
    proxy.inject(kind, rate=rate)
    error = run(lab, name)
    lab.injected[kind, rate] = sum(proxy.injected.values())
    proxy.clear()
    if error is not None:
        print(f"{kind} {rate}: {error}"[:300])
        assert any(word in str(error) for word in ("slab z", "in.zarr", name)), error
        assert run(lab, name) is None
    assert lab.output(name) == lab.expected
    assert verify(f"s3://lab/{name}", deep=True) == []


def test_at_least_a_thousand_faults_were_injected(lab: Lab) -> None:
    if len(lab.injected) < len(CASES):
        pytest.skip("only some of the cases above were run")
    print(f"{sum(lab.injected.values())} faults", dict(lab.injected))
    assert sum(lab.injected.values()) >= 1000
    assert all(lab.injected[case] > 0 for case in CASES)


@pytest.mark.parametrize("kind", ["500", "short", "flipped"])
def test_chunks_that_are_kept_are_exact_too(lab: Lab, proxy: FaultProxy, kind: str) -> None:
    kept = replace(OPTIONS, keep_gb=1.0)
    proxy.inject(kind, rate=0.2, matching=lambda request: "/in.zarr/" in request.path)
    error = run(lab, f"kept-{kind}", kept)
    assert sum(proxy.injected.values()) > 5
    proxy.clear()
    assert error is None or run(lab, f"kept-{kind}", kept) is None
    assert lab.output(f"kept-{kind}") == lab.expected


def test_a_403_in_mid_run_ends_it_at_once_and_names_the_slab(lab: Lab, proxy: FaultProxy) -> None:
    proxy.inject("403", matching=lambda request: request.method == "PUT" and "/0/c/" in request.path, after=5)
    error = run(lab, "denied")
    assert isinstance(error, RunError)
    assert str(error).startswith("slab z")
    assert "storage refused a read or write" in str(error)
    assert "run the same command again" in str(error)
    assert proxy.injected["403"] == 1  # no retry
    proxy.clear()
    assert run(lab, "denied") is None
    assert lab.output("denied") == lab.expected


def test_an_existing_chunk_that_is_not_found_never_becomes_fill_values(
    lab: Lab, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nrrn_pipeline.progress.BREAKER", SLABS)  # all slabs that need it are to be named

    def is_one_chunk(request: Request) -> bool:
        return request.method == "GET" and request.path.endswith("in.zarr/c/0/1/1")

    assert run(lab, "lost") is None  # its statistics are measured, so that slabs meet the fault
    for key in lab.output("lost"):
        lab.store.delete("lab", f"lost/0/{key}")
    proxy.inject("404", matching=is_one_chunk)
    error = run(lab, "lost")
    assert isinstance(error, SlabsFailedError)
    assert error.exit_status == 3
    assert "in.zarr/c/0/1/1: storage lists it but does not find it" in str(error)
    named = [line for line in str(error).splitlines() if line.startswith("slab z")]
    assert 0 < len(named) < SLABS
    written = lab.output("lost")
    assert len(written) == SLABS - len(named)
    assert all(lab.expected[key] == data for key, data in written.items())
    proxy.clear()
    assert run(lab, "lost") is None
    assert lab.output("lost") == lab.expected


def test_a_chunk_that_is_not_found_once_is_asked_for_again(lab: Lab, proxy: FaultProxy) -> None:
    proxy.inject("404", rate=0.2)
    assert run(lab, "found") is None
    assert proxy.injected["404"] > 20
    assert lab.output("found") == lab.expected


def test_a_store_that_is_away_stops_the_run_after_a_few_slabs(lab: Lab, proxy: FaultProxy) -> None:
    proxy.inject("503", matching=lambda request: request.method == "PUT" and "/0/c/" in request.path, after=2)
    error = run(lab, "away")
    assert isinstance(error, RunError)
    assert "stopped: 5 slabs one after the other failed for one reason" in str(error)
    assert proxy.injected["503"] == 5 * 3 * 8  # slabs, their attempts, the attempts of a request
    proxy.clear()
    assert run(lab, "away") is None
    assert lab.output("away") == lab.expected


def test_a_wrong_key_fails_at_once(lab: Lab, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    error = run(lab, "wrong")
    assert isinstance(error, NrrnError)
    assert "Check the address, and your credentials" in str(error)
    assert len(proxy.requests) == 1


def test_a_bucket_that_does_not_exist_is_named(lab: Lab, proxy: FaultProxy) -> None:
    with pytest.raises(NrrnError, match=r"no volume at s3://nowhere/in\.zarr"):
        denoise("s3://nowhere/in.zarr", "s3://lab/x", lab.weights, OPTIONS)
