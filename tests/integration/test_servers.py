from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import fsspec
import pytest

from tests.servers import ObjectStore


@pytest.fixture(params=["seaweed", "moto_s3"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    store: ObjectStore = request.getfixturevalue(request.param)
    return store


def test_plain_urls_lead_another_process_to_the_store(store: ObjectStore) -> None:
    store.make_bucket("elsewhere")
    code = "import fsspec; fsspec.filesystem('s3').pipe_file('elsewhere/a/b c', b'data')"
    subprocess.run([sys.executable, "-c", code], env=os.environ | store.environment, check=True, timeout=60)
    assert store.listing("elsewhere") == {"a/b c": b"data"}


def test_a_listing_is_what_is_there_now(store: ObjectStore) -> None:
    store.make_bucket("listed")
    for name in ("a/1", "a/2/3", "ab/1", "b"):
        store.put("listed", name, name.encode())
    assert store.listing("listed", "a") == {"1": b"a/1", "2/3": b"a/2/3"}
    store.delete("listed", "a/1")
    store.put("listed", "a/2/3", b"other")
    assert store.listing("listed", "a/") == {"2/3": b"other"}
    assert store.listing("listed", "none") == {}


def test_seaweedfs_refuses_a_wrong_secret(seaweed: ObjectStore) -> None:
    seaweed.make_bucket("secret")
    with replace(seaweed, secret="wrong").in_use(), pytest.raises(PermissionError, match="signature"):
        fsspec.filesystem("s3").pipe_file("secret/object", b"data")
    assert seaweed.listing("secret") == {}


def test_of_concurrent_creates_on_seaweedfs_one_wins(seaweed: ObjectStore) -> None:
    seaweed.make_bucket("created")
    names = [f"{i}".encode() for i in range(16)]
    with seaweed.in_use(), ThreadPoolExecutor(len(names)) as pool:
        files = fsspec.filesystem("s3")
        creates = [pool.submit(files.pipe_file, "created/object", name, mode="create") for name in names]
        errors = [create.exception() for create in creates]
    (winner,) = [name for name, error in zip(names, errors, strict=True) if error is None]
    assert seaweed.listing("created") == {"object": winner}
    # SeaweedFS does not say which condition failed, so s3fs cannot tell that the file exists
    assert {getattr(error, "errno", None) for error in errors if error} == {errno.EINVAL}


def test_moto_says_that_an_object_exists(moto_s3: ObjectStore) -> None:
    moto_s3.make_bucket("created")
    with moto_s3.in_use():
        files = fsspec.filesystem("s3")
        files.pipe_file("created/object", b"first", mode="create")
        with pytest.raises(FileExistsError):
            files.pipe_file("created/object", b"second", mode="create")
    assert moto_s3.listing("created") == {"object": b"first"}
