"""Keys are whole or absent, for their owner alone; an address is safe or refused, in one line."""

from __future__ import annotations

import errno
import os
import shutil
import ssl
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from datetime import datetime, timedelta, tzinfo
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import dask
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from distributed import Security
from hypothesis import example, given
from hypothesis import strategies as st

from nrrn_pipeline.cluster import address_client, make_keys
from nrrn_pipeline.cluster.keys import security_from
from nrrn_pipeline.errors import InputError

FILES = {"ca.pem", "cert.pem", "key.pem", "dask.yaml"}
UNSAFE = [
    *("tcp://10.0.0.1:8786", "10.0.0.1:8786", "tcp://0.0.0.0:8786", "tcp://[::]:8786", "tcp://scheduler:8786"),
    *("tcp://127.0.0.1.org:80", "tcp://localhost.org:80", "tcp://[2001:db8::1]:80", "tcp://127.1:80", "127:80"),
    *("ws://10.0.0.1:80", "ws://127.0.0.1:80", "tcp://2130706433:80", "tcp://0x7f.0.0.1:80"),
]
UNKNOWN = [
    "wss://127.0.0.1:80",
    "ucx://127.0.0.1:80",
    "ftp://127.0.0.1:80",
    "TLS://127.0.0.1:80",
    "inproc://x",
    "://a:1",
]
MALFORMED = [
    *("", ":", "tls://", "tls://:80", "tls://host", "tls://host:", "tls://host:0", "tls://host:65536", "tls://host:-1"),
    *("tls://host:٣", "tls://ho st:80", "tls://host:80/", "tls://host:80\n", "tls://ho\x00st:80", "tls://::1:80"),
    *("tls://[::1:80", "tls://[::1]", "tls://[1.2.3.4]:80", "tls://[:::]:80", "tls://user@host:80", "tls://a..b:80"),
    *("tls://" + "a" * 64 + ":80", "tls://" + "a." * 130 + "b:80", "tls://é.org:80", "tls://host:" + "9" * 5000),
]


class Later(datetime):
    """Four hundred days from now."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:
        return datetime.now(tz) + timedelta(days=400)


class ConnectedError(Exception):
    """Raised where a connection would be made: the address was accepted."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("ours") / "keys", ["node7.lab.org", "10.0.0.7", "::1"])


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("theirs") / "keys")


@pytest.fixture
def copied(keys: Path, tmp_path: Path) -> Path:
    return shutil.copytree(keys, tmp_path / "copied")


@pytest.fixture(autouse=True, scope="module")
def _nothing_connects() -> Iterator[None]:
    def connected(address: str, security: Security) -> None:
        raise ConnectedError(address, security)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nrrn_pipeline.cluster.address._connected", connected)
        yield


def connected(address: str, keys: Path | None = None) -> tuple[str, Security]:
    with pytest.raises(ConnectedError) as reached, address_client(address, keys):
        pass
    return reached.value.args


def refusal(address: str, keys: Path | None = None) -> str:
    with pytest.raises(InputError) as refused, address_client(address, keys):
        pass
    said = str(refused.value)
    assert said.isprintable()
    assert len(said) < 600
    return said


def configured(folder: Path) -> AbstractContextManager[None]:
    """As with DASK_CONFIG=folder in the environment."""
    return dask.config.set(dask.config.merge(dask.config.config, dask.config.collect([str(folder)], env={})))


def test_the_folder_is_for_its_owner_alone(keys: Path) -> None:
    assert {file.name for file in keys.iterdir()} == FILES
    assert keys.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in keys.iterdir()} == {0o600}
    assert [file.name for file in keys.parent.iterdir()] == ["keys"]


def test_the_authority_cannot_sign_again(keys: Path) -> None:
    private = [file for file in keys.iterdir() if b"PRIVATE KEY" in file.read_bytes()]
    assert [file.name for file in private] == ["key.pem"]
    kept = load_pem_private_key(private[0].read_bytes(), None).public_key()
    assert kept != x509.load_pem_x509_certificate((keys / "ca.pem").read_bytes()).public_key()


def context(folder: Path, purpose: ssl.Purpose) -> ssl.SSLContext:
    """More strict than Dask's: the host's name is compared, and the certificates have to follow every rule."""
    made = ssl.create_default_context(purpose, cafile=str(folder / "ca.pem"))
    made.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    return made


def shake_hands(ours: Path, theirs: Path, host: str) -> None:
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context(ours, ssl.Purpose.SERVER_AUTH).wrap_bio(back, there, server_hostname=host)
    server = context(theirs, ssl.Purpose.CLIENT_AUTH).wrap_bio(there, back, server_side=True)
    for side in (client, server, client, server):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    assert client.getpeercert()
    assert server.getpeercert()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "node7.lab.org", "10.0.0.7", "::1"])
def test_one_certificate_serves_both_ends_by_all_rules(keys: Path, host: str) -> None:
    shake_hands(keys, keys, host)


def test_other_keys_and_other_hosts_are_not_trusted(keys: Path, others: Path) -> None:
    for ours, theirs, host in ((keys, others, "localhost"), (others, keys, "localhost"), (keys, keys, "node8.lab.org")):
        with pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(ours, theirs, host)


@pytest.mark.parametrize("name", ["keys", "a folder", 'it\'s: #1, {é} %s "🔑" \\n'])
def test_dask_finds_the_keys_through_its_configuration(tmp_path: Path, name: str) -> None:
    made = make_keys(tmp_path / name)
    with configured(made):
        security = Security()
        assert security.require_encryption is True
        assert dask.config.get("distributed.comm.default-scheme") == "tls"
    for role in ("client", "scheduler", "worker"):
        found = security.get_tls_config_for_role(role)
        assert (found["ca_file"], found["cert"], found["key"]) == tuple(
            str(made / file) for file in ("ca.pem", "cert.pem", "key.pem")
        )
        assert security.get_listen_args(role)["ssl_context"].verify_mode == ssl.CERT_REQUIRED
    assert repr(security_from(made)) == repr(security)


def test_a_new_or_an_empty_folder_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir(mode=0o755)
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "new/and/deep"):
        made = make_keys(folder)
        assert made == tmp_path / folder
        assert made.stat().st_mode & 0o777 == 0o700
        assert security_from(folder).require_encryption


@pytest.mark.parametrize("there", ["key.pem", "dask.yaml", "notes.txt"])
def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(InputError, match=rf"is not empty \(it holds '{there}'\): give a new folder"):
        make_keys(tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(there, "mine")]


@pytest.mark.parametrize("folder", ["/sys/keys", "/sys/new/keys", "/dev/null", "/dev/null/keys", "/tmp/" + "k" * 300])
def test_a_folder_that_cannot_be_written_is_refused(folder: str) -> None:
    with pytest.raises(InputError, match=r"keys cannot be written to .*: choose another folder"):
        make_keys(folder)


@pytest.mark.parametrize("step", ["os.rename", "os.open"])
def test_keys_that_fail_halfway_leave_nothing(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = getattr(os, step[3:]), []

    def fails(*args: object, **options: object) -> object:
        calls.append(args)
        if len(calls) == {"os.rename": 1, "os.open": 3}[step]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(*args, **options)

    monkeypatch.setattr(step, fails)
    with pytest.raises(InputError, match="No space left on device"):
        make_keys(tmp_path / "keys")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("days", [0, -1, 3651, 10**12])
def test_days_that_cannot_be_are_refused(tmp_path: Path, days: int) -> None:
    with pytest.raises(InputError, match=f"keys for {days} days are not possible: use 1 to 3650"):
        make_keys(tmp_path / "keys", days=days)


@pytest.mark.parametrize("host", ["", "a b", "é.org", "a\nb", "a..b", "x" * 300, "tls://a", "a:80", "*"])
def test_hosts_that_cannot_be_are_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(InputError, match="is neither a name nor an address") as refused:
        make_keys(tmp_path / "keys", hosts=[host])
    assert str(refused.value).isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["a\nb", "a\x00b", "a\udcffb"])
def test_a_folder_that_cannot_be_shown_is_refused(tmp_path: Path, folder: str) -> None:
    for use in (make_keys, security_from):
        with pytest.raises(InputError, match="has characters that cannot be shown") as refused:
            use(tmp_path / folder)
        assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", sorted(FILES - {"dask.yaml"}))
def test_a_missing_unreadable_or_damaged_file_is_named(copied: Path, name: str) -> None:
    good = (copied / name).read_bytes()
    for content in (b"", b"\xff" * 100, good[:100], good[:60] + b"A" * 20 + good[80:]):
        (copied / name).write_bytes(content)
        with pytest.raises(InputError, match=r"holds a damaged certificate or key|do not belong together"):
            security_from(copied)
    (copied / name).unlink()
    with pytest.raises(InputError, match=rf"no keys in .*\({name} is missing\): `nrrn cluster keys FOLDER` makes some"):
        security_from(copied)
    (copied / name).mkdir()
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        security_from(copied)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_private_key_that_others_can_read_is_refused(copied: Path, mode: int) -> None:
    (copied / "key.pem").chmod(mode)
    with pytest.raises(InputError, match=r"key\.pem is open to others .*: chmod 600 it"):
        security_from(copied)


@pytest.mark.parametrize("name", sorted(FILES - {"dask.yaml"}))
def test_keys_of_two_clusters_do_not_mix(copied: Path, others: Path, name: str) -> None:
    shutil.copy(others / name, copied / name)
    with pytest.raises(InputError, match="do not belong together: copy the whole folder again"):
        security_from(copied)


def test_a_private_key_with_a_password_is_refused(copied: Path) -> None:
    private = load_pem_private_key((copied / "key.pem").read_bytes(), None)
    locked = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (copied / "key.pem").write_bytes(locked)
    with pytest.raises(InputError, match="holds a damaged certificate or key"):
        security_from(copied)


def test_keys_end_on_their_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = make_keys(tmp_path / "short", days=399), make_keys(tmp_path / "long", days=401)
    monkeypatch.setattr("nrrn_pipeline.cluster.keys.datetime", Later)
    assert security_from(long)
    with pytest.raises(InputError, match=r"expired on \d{4}-\d\d-\d\d \d\d:\d\d UTC: `nrrn cluster keys"):
        security_from(short)
    early = make_keys(tmp_path / "early")
    monkeypatch.undo()
    assert security_from(short)
    with pytest.raises(InputError, match=r"begin on \d{4}-\d\d-\d\d \d\d:\d\d UTC: set this machine's clock"):
        security_from(early)


@pytest.mark.parametrize("address", UNSAFE)
def test_what_leaves_the_machine_needs_tls(address: str) -> None:
    assert "is refused: whoever reaches a scheduler without TLS can run code there" in refusal(address)


@pytest.mark.parametrize("address", UNKNOWN)
def test_other_kinds_of_address_are_unknown(address: str) -> None:
    assert "is of an unknown kind: use tls://host:8786" in refusal(address)


@pytest.mark.parametrize("address", MALFORMED)
def test_what_is_no_address_is_malformed(address: str, keys: Path) -> None:
    assert "is malformed: expected tls://host:8786" in refusal(address, keys)


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:1", "tcp://127.9.8.7:65535", "tcp://[::1]:80", "tcp://localhost:80", "LocalHost:80"]
)
def test_loopback_needs_no_keys(address: str, keys: Path) -> None:
    assert connected(address)[0] == (address if "://" in address else f"tcp://{address}")
    if "://" in address:
        assert "is not encrypted, but keys or Dask's configuration ask for it: use tls://" in refusal(address, keys)
    with dask.config.set({"distributed.comm.require-encryption": True}):
        assert "is not encrypted, but keys or Dask's" in refusal(address)


@pytest.mark.parametrize("host", ["10.0.0.7:8786", "node_7.lab.org:1", "[2001:db8::1]:65535", "127.0.0.1:8786"])
def test_tls_needs_keys_given_or_in_the_configuration_of_dask(host: str, keys: Path) -> None:
    address = f"tls://{host}"
    assert refusal(address) == f"{address} needs keys: `nrrn cluster keys FOLDER` makes some, give --keys FOLDER"
    for given_address in (address, host):
        reached, security = connected(given_address, keys)
        assert (reached, repr(security)) == (address, repr(security_from(keys)))
    with configured(keys):
        for given_address in (address, host):
            reached, security = connected(given_address)
            assert (reached, repr(security)) == (address, repr(security_from(keys)))


def test_a_configuration_whose_certificates_cannot_be_used_is_refused(keys: Path, others: Path) -> None:
    for wrong in ({"ca-file": "/no/ca.pem"}, {"client.key": str(others / "key.pem")}, {"min-version": 1.1}):
        with configured(keys), dask.config.set({f"distributed.comm.tls.{k}": v for k, v in wrong.items()}):
            assert "settings of Dask's configuration (distributed.comm.tls) cannot be used" in refusal("tls://host:1")


ADDRESSES = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(["", "tcp://", "tls://", "ws://", "inproc://", "tcp:/", "://", "TCP://"]) | st.text(max_size=8),
        st.sampled_from(["127.0.0.1", "localhost", "[::1]", "::1", "0.0.0.0", "10.0.0.1", "host", "[", "]", "1/2/3"])
        | st.text(max_size=20)
        | st.ip_addresses().map(str),
        st.sampled_from([":", "", "::", "\n:", ":\x00"]),
        st.integers(-1, 70000).map(str) | st.text(max_size=6),
    ),
)


@given(address=st.text() | ADDRESSES)
@example(address="tcp://127.0.0.1:80#@10.0.0.1:80")
@example(address="tcp://10.0.0.1:80\\@127.0.0.1:80")
@example(address="\x1b[2Jtls://a:1")
def test_whatever_is_given_is_safe_or_refused_in_a_line(address: str) -> None:
    with pytest.raises((InputError, ConnectedError)) as ended, address_client(address):
        pass
    if ended.type is InputError:
        assert str(ended.value).isprintable()
        assert len(str(ended.value)) < 600
        return
    assert address.isprintable()
    parts = urlsplit(ended.value.args[0])
    if parts.scheme != "inproc":
        assert parts.scheme == "tcp"
        assert parts.port
        assert parts.hostname == "localhost" or ip_address(str(parts.hostname)).is_loopback
