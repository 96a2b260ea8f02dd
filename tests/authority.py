# SPDX-License-Identifier: Apache-2.0
"""A private certificate authority, and what it issues."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, loaded and as PEM files."""

    loaded: x509.Certificate
    key: rsa.RSAPrivateKey
    certificate: Path
    key_file: Path

    @property
    def pem(self) -> str:
        return self.certificate.read_text()

    def server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key_file)
        return context


class Authority:
    """Keeps its files in a folder. `root` is what clients are to trust."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.root = self._issue("ca", None)

    def server(self, *names: str) -> Issued:
        """A certificate for host names and addresses."""
        return self._issue(names[0], self.root, names)

    def _issue(self, subject: str, issuer: Issued | None, names: tuple[str, ...] = ()) -> Issued:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"test {subject}")])
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer.loaded.subject if issuer else name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _DAY)
            .not_valid_after(now + _DAY)
            .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_name(name) for name in names]), critical=False
            )
        certificate = builder.sign(issuer.key if issuer else key, hashes.SHA256())
        made = Issued(certificate, key, self._folder / f"{subject}.crt", self._folder / f"{subject}.key")
        made.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        made.key_file.write_bytes(secret)
        return made


def _name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
