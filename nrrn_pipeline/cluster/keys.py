"""Keys for a Dask cluster on a network: who holds them takes part, and nobody else.

Dask runs whatever code it is sent, so whoever reaches a scheduler or a worker owns it. With these keys all of them
speak TLS, and each side asks the other for a certificate signed by the cluster's own authority. Dask compares no host
names: a certificate is a membership card, and one serves scheduler, workers and clients alike.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from distributed import Security

from nrrn_pipeline.errors import InputError

HOST_NAME = re.compile(r"(?=.{1,253}$)(?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}", re.ASCII | re.IGNORECASE)
ROLES = ("client", "scheduler", "worker")
LONGEST_DAYS = 3650
KEY_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)
CLOCKS_DIFFER = timedelta(hours=1)
HOW_TO_MAKE = "`nrrn cluster keys FOLDER` makes some, give --keys FOLDER"
DASK_YAML = """\
# With DASK_CONFIG={folder} in their environment, dask scheduler, dask worker and clients use these keys.
distributed:
  comm:
    default-scheme: tls
    require-encryption: true
    tls:
      ca-file: {ca}
      scheduler: {{cert: {cert}, key: {key}}}
      worker: {{cert: {cert}, key: {key}}}
      client: {{cert: {cert}, key: {key}}}
"""


def make_keys(folder: str | os.PathLike[str], hosts: Iterable[str] = (), days: int = 365) -> Path:
    """The absolute path of a new folder, for its owner alone, with the keys of one cluster.

    It holds ca.pem (the authority), cert.pem and key.pem (the membership card), and dask.yaml, through which
    DASK_CONFIG=folder makes Dask's own commands use them; dask.yaml names them by absolute path, so the folder has to
    be at the same place on every machine. The authority's own key is thrown away: nobody can sign more, and a new
    member gets a copy of the folder. `hosts` are names and addresses to put into the certificate for software that
    compares them; Dask does not. The keys work for `days`.

    Raises InputError if the folder holds anything already or cannot be written, or for a host or days that cannot be;
    then nothing is left.
    """
    target = _absolute(folder)
    if not 1 <= days <= LONGEST_DAYS:
        raise InputError(f"keys for {days} days are not possible: use 1 to {LONGEST_DAYS}")
    files = _signed([_alternative_name(host) for host in ("localhost", "127.0.0.1", *hosts)], days)
    files["dask.yaml"] = _dask_yaml(target)
    try:
        if target.is_dir() and (there := sorted(os.listdir(target))):
            raise InputError(f"{target} is not empty (it holds {there[0]!r}): give a new folder, or delete it first")
        target.parent.mkdir(parents=True, exist_ok=True)
        # all or nothing: the folder gets its name when it is whole
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name[:100]}-") as scratch:
            whole = Path(scratch) / "keys"
            whole.mkdir(mode=0o700)
            for name, content in files.items():
                with open(os.open(whole / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(content)
            os.rename(whole, target)
    except OSError as error:
        raise InputError(f"keys cannot be written to {target} ({error.strerror}): choose another folder") from error
    return target


def security_from(folder: str | os.PathLike[str]) -> Security:
    """What Dask needs to know to use the keys in `folder`, and nothing but encrypted connections.

    Raises InputError if a file is missing, unreadable or damaged, if others than its owner can read the private key,
    if the keys are expired, or do not belong together.
    """
    place = _absolute(folder)
    ca, cert, key = (place / name for name in ("ca.pem", "cert.pem", "key.pem"))
    authority_pem, card_pem, private_pem = (_content(path) for path in (ca, cert, key))
    if key.stat().st_mode & 0o077:
        raise InputError(f"{key} is open to others than its owner, and they could run code with it: chmod 600 it")
    try:
        authority, card = x509.load_pem_x509_certificate(authority_pem), x509.load_pem_x509_certificate(card_pem)
        own = load_pem_private_key(private_pem, password=None).public_key() == card.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{place} holds a damaged certificate or key: {HOW_TO_MAKE}") from error
    if not own or not _has_signed(authority, card):
        raise InputError(f"ca.pem, cert.pem and key.pem in {place} do not belong together: copy the whole folder again")
    _refuse_out_of_date(place, authority, card)
    roles = {f"tls_{role}_{kind}": str(path) for role in ROLES for kind, path in (("cert", cert), ("key", key))}
    return Security(require_encryption=True, tls_ca_file=str(ca), **roles)


def _absolute(folder: str | os.PathLike[str]) -> Path:
    place = os.path.abspath(folder)
    if not place.isprintable():
        raise InputError(f"folder {place!r} has characters that cannot be shown: use one without")
    return Path(place)


def _signed(names: list[x509.GeneralName], days: int) -> dict[str, bytes]:
    """The three PEM files by name; the authority's private key ends with this call."""
    authority_key, card_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    # one authority, one name: software that finds two of the same name tries the wrong one
    issuer = _called(f"nrrn cluster authority {x509.random_serial_number():x}")
    authority = (
        _begun(issuer, issuer, authority_key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_only_for("key_cert_sign"), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    card = (
        _begun(_called("nrrn cluster"), issuer, card_key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_only_for("digital_signature"), critical=True)
        # every member of a Dask cluster listens and connects
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    return {
        "ca.pem": authority.public_bytes(Encoding.PEM),
        "cert.pem": card.public_bytes(Encoding.PEM),
        "key.pem": card_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    }


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return x509.CertificateBuilder(
        issuer, subject, key.public_key(), x509.random_serial_number(), now - CLOCKS_DIFFER, now + timedelta(days)
    ).add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _called(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _only_for(usage: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: name == usage for name in KEY_USAGES})


def _alternative_name(host: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    if not HOST_NAME.fullmatch(host):
        raise InputError(
            f"host {host[:100]!r} is neither a name nor an address: give such as node7.lab.org or 10.0.0.7"
        )
    return x509.DNSName(host)


def _dask_yaml(folder: Path) -> bytes:
    # a JSON string is a YAML string, whatever the path has in it
    quoted = {name: json.dumps(str(folder / f"{name}.pem"), ensure_ascii=False) for name in ("ca", "cert", "key")}
    return DASK_YAML.format(folder=folder, **quoted).encode()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"there are no keys in {path.parent} ({path.name} is missing): {HOW_TO_MAKE}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {HOW_TO_MAKE}") from error


def _has_signed(authority: x509.Certificate, card: x509.Certificate) -> bool:
    try:
        card.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _refuse_out_of_date(place: Path, authority: x509.Certificate, card: x509.Certificate) -> None:
    now = datetime.now(UTC)
    begin = max(authority.not_valid_before_utc, card.not_valid_before_utc)
    end = min(authority.not_valid_after_utc, card.not_valid_after_utc)
    if now > end:
        raise InputError(f"the keys in {place} expired on {end:%Y-%m-%d %H:%M} UTC: {HOW_TO_MAKE}")
    if now < begin:
        raise InputError(f"the keys in {place} begin on {begin:%Y-%m-%d %H:%M} UTC: set this machine's clock right")
