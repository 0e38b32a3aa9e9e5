"""A self-signed certificate for servers on this machine: the emulator, tests, benchmarks."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from azure_torch_ckpt.errors import LocalFileError, MissingDependencyError

__all__ = ["write_self_signed_certificate"]


def write_self_signed_certificate(certificate_file: Path, key_file: Path) -> None:
    """Write a self-signed certificate for 127.0.0.1 and localhost, good for 30 days, and its key: both as PEM.

    A client trusts the certificate by ``ca_file=``. The certificate is not an authority (``ca=False``), because rustls
    refuses one that is both authority and server; OpenSSL accepts either. The key is not encrypted, and only its owner
    can read its file.

    Raises:
        MissingDependencyError: the package ``cryptography`` is not installed.
        LocalFileError: a file could not be written.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError as error:
        raise MissingDependencyError(
            "Making a certificate for TLS needs the package cryptography. Install it (pip install cryptography)"
        ) from error

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "azure_torch_ckpt emulator")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    try:
        certificate_file.write_bytes(certificate.public_bytes(pem))
        key_file.touch(mode=0o600)
        key_file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    except OSError as error:
        raise LocalFileError(f"could not write {error.filename}: {error.strerror}") from error
