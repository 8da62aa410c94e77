from __future__ import annotations

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nrrn_pipeline import places
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.places import absolute, adopt_options, can_list, files_of, options_of, options_text, using_options

SECRET = "hunter2"
HARMLESS = st.sampled_from(["anon", "endpoint_url", "client_kwargs", "config_kwargs", "region_name", "s3", "use_ssl"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HARMLESS | st.text(), inner, max_size=3),
    max_leaves=10,
)


@pytest.fixture(autouse=True)
def no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(places.OPTIONS, raising=False)


@pytest.mark.parametrize("url", ["s3://bucket/a.zarr", "memory://a/b", "http://host:8000/a%20b", "s3://bucket"])
def test_a_url_loses_only_its_trailing_slashes(url: str) -> None:
    assert absolute(url) == absolute(f"{url}/") == absolute(f"{url}//") == url


@pytest.mark.parametrize(
    ("url", "one"), [("s3a://bucket/a", "s3://bucket/a"), ("memory:///a/b", "memory://a/b"), ("s3://b/a@c", None)]
)
def test_a_place_has_one_url(url: str, one: str | None) -> None:
    assert absolute(url) == (one or url)


@pytest.mark.parametrize("given", ["a.zarr", "a.zarr/", "./b/../a.zarr", "link/a.zarr", Path("a.zarr")], ids=str)
def test_a_path_becomes_absolute_with_its_links_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert absolute(given) == str(tmp_path.resolve() / "a.zarr")


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_a_file_url_is_its_path(tmp_path: Path, scheme: str) -> None:
    assert absolute(f"{scheme}://{tmp_path}/a.zarr") == str(tmp_path.resolve() / "a.zarr")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute("~/a.zarr") == str(tmp_path.resolve() / "a.zarr")


@pytest.mark.parametrize(
    "text",
    ["", "s3://", "memory:///", "s3://bucket/../other", "s3://bucket/./a", "://a", "http://[host/a", "http://h/a?b=c"],
)
def test_what_names_no_place_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="cannot be a path or URL"):
        absolute(text)


@pytest.mark.parametrize("text", ["a\nb", "a\0b", "s3://bucket/a\tb", "s3://bucket/\u202e", "\x1b[2J"])
def test_unprintable_characters_are_refused_and_never_printed(text: str) -> None:
    with pytest.raises(InputError, match="unprintable") as refused:
        absolute(text)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("text", ["simplecache::s3://bucket/a", "zip://a::s3://bucket/b.zip"])
def test_chained_urls_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="chained URLs are not supported"):
        absolute(text)


@pytest.mark.parametrize(
    "url",
    [
        f"s3://key:{SECRET}@bucket/a",
        f"s3://:{SECRET}@bucket/a",
        f"https://{SECRET}@host/a",
        f"s3://key:{SECRET}/of+AWS@bucket/a",
        f"s3://key:{SECRET}?@bucket/a",
        f"s3://key:{SECRET}#@bucket/a",
        f"https://key:{SECRET}\u2100@host/a",
        f"https://key:{SECRET}@[host/a",
        f"s3://key:{SECRET}\n@bucket/a",
        f"s3://key:{SECRET}@bucket/../a",
        f"simplecache::s3://key:{SECRET}@bucket/a",
        f"https://host/a?X-Amz-Signature={SECRET}",
    ],
)
def test_a_url_with_a_password_is_refused_and_the_password_not_told(url: str) -> None:
    with pytest.raises(InputError) as refused:
        absolute(url)
    assert SECRET not in str(refused.value)
    assert refused.value.__cause__ is None


@given(text=st.text() | st.text("s3:/@?#[].~a\u2100", max_size=20))
@example("~\U0001f600")
@example("a" * 5000)
def test_any_text_is_a_place_or_refused(text: str) -> None:
    try:
        assert isinstance(absolute(text), str)
    except InputError as error:
        assert str(error).isprintable()  # noqa: PT017


@given(
    scheme=st.sampled_from(["s3", "https", "gs", "memory", "S3", "x"]),
    around=st.tuples(st.text(), st.text()),
    rest=st.text(),
)
@example("https", ("", "\u2100"), "")
def test_whatever_stands_before_an_at_sign_is_never_told(scheme: str, around: tuple[str, str], rest: str) -> None:
    """Where a password may stand, that is: slashes end it."""
    before, after = (re.sub(r"[/?#\\]", "", text) for text in around)
    with pytest.raises(InputError) as refused:
        absolute(f"{scheme}://{before}{SECRET}{after}@{rest}")
    if SECRET not in rest:
        assert SECRET not in str(refused.value)


def test_options_hold_for_the_urls_that_they_begin_and_the_longest_wins() -> None:
    with using_options({"s3://": {"profile": "lab"}, "s3://open/": {"anon": True}, "gs://": {"project": "p"}}):
        assert options_of("s3://mine/a") == {"profile": "lab"}
        assert options_of("s3://open/a") == {"anon": True}
        assert options_of("s3://opened/a") == {"profile": "lab"}
        assert options_of("memory://a") == {}


def test_a_flat_table_holds_for_all_urls() -> None:
    with using_options({"anon": True}):
        assert options_of("s3://a") == options_of("gs://b") == {"anon": True}


@pytest.mark.parametrize("empty", ["", "{}", {}, None])
def test_without_options_there_are_none(empty: Any) -> None:
    with using_options(empty):
        assert options_of("s3://a") == {}


def test_options_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text('{"s3://": {"anon": true}}')
    with using_options(f"@{tmp_path}/options.json"):
        (tmp_path / "options.json").unlink()  # workers elsewhere have no such file
        assert options_of("s3://a") == {"anon": True}
        assert json.loads(options_text()) == {"s3://": {"anon": True}}


@pytest.mark.parametrize("content", [None, b"\xff", b"{"])
def test_a_file_of_options_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "options.json").write_bytes(content)
    with pytest.raises(InputError, match="storage options"), using_options(f"@{tmp_path}/options.json"):
        pass


@pytest.mark.parametrize("before", [None, '{"anon": true}'])
def test_the_environment_is_as_before_after_the_block(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    if before:
        monkeypatch.setenv(places.OPTIONS, before)
    with using_options({"profile": "a"}):
        with using_options('{"profile": "b"}'):
            assert options_of("s3://a") == {"profile": "b"}
        assert options_of("s3://a") == {"profile": "a"}
    assert os.environ.get(places.OPTIONS) == before


@pytest.mark.parametrize("before", [None, '{"anon": true}'])
def test_what_fails_in_the_block_leaves_the_environment_as_before(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    if before:
        monkeypatch.setenv(places.OPTIONS, before)
    with pytest.raises(KeyError), using_options({"profile": "a"}):
        raise KeyError
    with pytest.raises(InputError), using_options({"secret": SECRET}):
        pass
    assert os.environ.get(places.OPTIONS) == before


def test_options_of_the_environment_hold_unless_others_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(places.OPTIONS, '{"profile": "env"}')
    with using_options(None):
        assert options_of("s3://a") == {"profile": "env"}
    with using_options({}):
        assert options_of("s3://a") == {}


def test_a_worker_takes_its_drivers_options_and_keeps_its_own_where_that_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(places.OPTIONS, "")
    monkeypatch.setattr(places, "_at_start", '{"profile": "worker"}')
    for options, expected in (("", "worker"), ('{"profile": "driver"}', "driver"), ("", "worker")):
        adopt_options(options)
        assert options_of("s3://a") == {"profile": expected}


@pytest.mark.parametrize(
    "options",
    [
        {"secret": SECRET},
        {"key": SECRET},
        {"s3://": {"anon": False, "password": SECRET}},
        {"": {"sas_token": SECRET}},
        {"client_kwargs": {"aws_secret_access_key": SECRET}},
        {"config_kwargs": {"s3": {"headers": {"Authorization": SECRET}}}},
        {"config_kwargs": [{"password": SECRET}]},
        {"token": SECRET},
        {"token": {"private_key": SECRET}},
        {"endpoint_url": f"https://user:{SECRET}@host"},
        {"client_kwargs": {"endpoint_url": f"https://user:{SECRET}@host"}},
        {"client_kwargs": [f"https://user:{SECRET}@host"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", [dict, json.dumps])
def test_what_may_be_a_secret_is_refused_and_not_told(options: dict[str, Any], form: Any) -> None:
    with pytest.raises(InputError, match="refused") as refused, using_options(form(options)):
        pass
    assert SECRET not in str(refused.value)


def test_a_secret_in_the_environments_options_is_refused_when_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(places.OPTIONS, json.dumps({"secret": SECRET}))
    with pytest.raises(InputError, match="'secret' is refused") as refused:
        files_of("s3://bucket/a")
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("token", ["anon", "google_default", "cloud"])
def test_a_token_that_is_none_is_taken(token: str) -> None:
    with using_options({"token": token}):
        assert options_of("gs://a") == {"token": token}


@pytest.mark.parametrize(
    "text", ["{", "anon=true", "[]", "null", "5", f'{{"secret": "{SECRET}"', "[" * 100_000, '{"s3":' * 100_000]
)
def test_malformed_options_are_refused_and_not_told(text: str) -> None:
    with pytest.raises(InputError, match=r"storage options are no (JSON|table)") as refused, using_options(text):
        pass
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("options", [{"anon": Path("a")}, {"anon": {True}}, {("s3",): {}}], ids=str)
def test_options_that_json_cannot_hold_are_refused(options: Any) -> None:
    with pytest.raises(InputError, match="storage option"), using_options(options):
        pass


def test_options_of_any_depth_are_taken_or_refused() -> None:
    depth, refused = 0, False
    while not refused:
        depth += 10
        try:
            with using_options('{"s3":' * depth + "1" + "}" * depth):
                assert options_of("s3://a")
        except InputError:
            refused = True
    assert depth > 10


@given(text=st.text() | JSON.map(json.dumps) | st.dictionaries(HARMLESS, JSON).map(json.dumps))
def test_any_options_are_taken_or_refused(text: str) -> None:
    try:
        with using_options(text):
            assert isinstance(options_of("s3://a"), dict)
    except InputError:
        assert places.OPTIONS not in os.environ


@pytest.mark.parametrize("name", [f"{SECRET}://a", f"s3{SECRET}"])
def test_names_of_options_that_stand_beside_urls_are_no_urls(name: str) -> None:
    options = {"s3://a/": {"anon": True}, name: 1}
    with pytest.raises(InputError, match=r"refused|mix URLs with options"), using_options(options):
        pass


@pytest.mark.parametrize("url", ["nosuch://a/b", "S3x://a", "x y://a"])
def test_an_unknown_kind_of_url_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(InputError, match=r"URLs cannot be opened .*: use a path, or s3://") as refused:
        files_of(url)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "package", "extra"), [("gs://bucket/a", "gcsfs", "gcs"), ("abfs://c@a/b", "adlfs", "azure")]
)
def test_a_kind_that_is_not_installed_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, url: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    scheme = url.partition("://")[0]
    with pytest.raises(InputError) as refused:
        files_of(url)
    assert str(refused.value) == f"{scheme}:// URLs cannot be opened here: install nrrn-pipeline[{extra}]"


def test_options_reach_the_storage_library() -> None:
    own = {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"read_timeout": 7, "max_pool_connections": 5}}
    with using_options({"s3://open/": {"anon": True}, "s3://": own}):
        public, private = files_of("s3://open/a")[0], files_of("s3://mine/a")[0]
    assert (public.anon, public.endpoint_url) == (True, None)
    assert (private.anon, private.endpoint_url) == (False, "http://127.0.0.1:9")
    assert private.config_kwargs["read_timeout"] == 7
    assert private.config_kwargs["max_pool_connections"] == 5
    assert private.config_kwargs["retries"] == {"total_max_attempts": 1}


def test_a_path_is_the_disks_and_takes_no_options(tmp_path: Path) -> None:
    with using_options({"anon": True}):
        files, path = files_of(f"{tmp_path}/a")
    assert files.protocol == ("file", "local")
    assert path == f"{tmp_path}/a"


def test_plain_web_servers_alone_cannot_list() -> None:
    assert [can_list(url) for url in ("http://a", "https://a", "s3://a", "memory://a", "/a")] == [False] * 2 + [
        True
    ] * 3


def test_threads_share_one_file_system() -> None:
    with ThreadPoolExecutor(4) as pool:
        opened = {id(files_of("s3://bucket/a")[0]) for _ in range(2)}
        opened |= set(pool.map(lambda _: id(files_of("s3://bucket/b")[0]), range(8)))
    assert len(opened) == 1


def test_a_forked_process_shares_none(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = files_of("s3://bucket/a")[0]
    forked = os.getpid() + 1
    monkeypatch.setattr(os, "getpid", lambda: forked)
    assert files_of("s3://bucket/a")[0] is not parents


def test_other_credentials_or_options_open_another(monkeypatch: pytest.MonkeyPatch) -> None:
    first = files_of("s3://bucket/a")[0]
    with using_options({"anon": True}):
        assert files_of("s3://bucket/a")[0] is not first
    assert files_of("s3://bucket/a")[0] is first
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "renewed")
    assert files_of("s3://bucket/a")[0] is not first


def test_trouble_reopens_at_most_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1e6]
    monkeypatch.setattr(places, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(places, "_reopened", [0.0])
    opened = [files_of("s3://bucket/a")[0]]
    with ThreadPoolExecutor(8) as pool:
        opened += pool.map(lambda _: files_of("s3://bucket/a", fresh=True)[0], range(8))
    assert len({id(files) for files in opened[1:]} - {id(opened[0])}) == 1  # equal they are all
    now[0] += 0.9
    opened.append(files_of("s3://bucket/a", fresh=True)[0])
    assert opened[-1] is opened[-2]
    now[0] += 0.2
    opened.append(files_of("s3://bucket/a", fresh=True)[0])
    assert opened[-1] is not opened[-2]
    assert files_of("s3://bucket/a")[0] is files_of("s3://bucket/a", fresh=True)[0] is opened[-1]


def test_options_for_all_urls_and_for_some_cannot_be_mixed() -> None:
    with pytest.raises(InputError, match="mix URLs with options"), using_options({"s3://a/": {}, "anon": True}):
        pass
