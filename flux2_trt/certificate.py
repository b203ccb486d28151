"""Certificate: a pair of certificate and key that signs for trying it out, and that nobody else trusts.

C2PA refuses certificates that are signed by themselves, so a root is made, signs one certificate, and its key is
forgotten. The profile is that of the C2PA specification, X.509 certificates: version 3, one purpose, no authority.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from flux2_trt.errors import Flux2Error, UsageError
from flux2_trt.outputs import write_file

NAME = "flux2-trt development only"
STEM = "development-only"
VALID_FOR = timedelta(days=365)
PRIVATE_MODE = 0o600


@dataclass(frozen=True)
class CertificateFiles:
    """PEM files: the certificate, its private key, and the root that a reader must be told to trust."""

    certificate: Path
    key: Path
    root: Path


def write_development_certificate(folder: Path) -> CertificateFiles:
    """Makes a certificate with an ES256 key and writes its three files, the key readable by its owner alone.

    Raises UsageError where one of them exists, Flux2Error without the package cryptography or a writable folder.
    """
    files = CertificateFiles(folder / f"{STEM}.cert.pem", folder / f"{STEM}.key.pem", folder / f"{STEM}.root.pem")
    certificate, key, root = _generate()
    written: list[Path] = []
    try:
        for path, content in ((files.key, key), (files.certificate, certificate), (files.root, root)):
            write_file(path, content, mode=PRIVATE_MODE if path is files.key else 0o644)
            written.append(path)
    except UsageError as error:
        _remove(written)
        raise UsageError(
            f"{str(folder)!r} holds a development certificate already; use it, or another folder"
        ) from error
    except BaseException:
        _remove(written)
        raise
    return files


def _remove(paths: list[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


def _generate() -> tuple[bytes, bytes, bytes]:
    """Certificate, private key and root, in PEM."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError as error:
        raise Flux2Error("a certificate needs the package cryptography; pip install 'flux2-trt[c2pa]'") from error

    def name(role: str) -> x509.Name:
        common = x509.NameAttribute(NameOID.COMMON_NAME, f"{NAME}: {role}")
        return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, NAME), common])

    def usage(**used: bool) -> x509.KeyUsage:
        names = (
            "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
            "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
        )  # fmt: skip
        return x509.KeyUsage(**{name: used.get(name, False) for name in names})

    root_key, own_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    now = datetime.now(timezone.utc).replace(microsecond=0)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())

    def signed(key: ec.EllipticCurvePrivateKey, role: str, is_root: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder(name("root"), name(role), key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + VALID_FOR)
            .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(authority, critical=False)
        )
        if is_root:
            builder = builder.add_extension(usage(key_cert_sign=True, crl_sign=True), critical=True)
        else:
            purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(usage(digital_signature=True), critical=True)
            builder = builder.add_extension(purpose, critical=True)
        return builder.sign(root_key, hashes.SHA256())

    own = signed(own_key, "signer", is_root=False).public_bytes(Encoding.PEM)
    root = signed(root_key, "root", is_root=True).public_bytes(Encoding.PEM)
    return own, own_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), root
