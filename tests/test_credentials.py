"""Content credentials, read back by c2pa-python's own reader: what is stated, who is trusted, what breaks them."""

from __future__ import annotations

import io
import json
import stat
import subprocess
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path

import c2pa
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from PIL import Image
from test_outputs import names, refused

from flux2_trt import certificate
from flux2_trt.certificate import CertificateFiles, write_development_certificate
from flux2_trt.credentials import Ingredient, Signer, are_in, read, sign
from flux2_trt.errors import Flux2Error

FORMATS = ("PNG", "JPEG", "WEBP")
PICTURE = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CertificateFiles:
    return write_development_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def signer(files: CertificateFiles) -> Signer:
    signer = Signer.from_options(files.certificate, files.key)
    assert signer is not None
    return signer


def encoded(format: str, pixels: np.ndarray = PICTURE) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def references(count: int, format: str = "PNG") -> list[Ingredient]:
    return [Ingredient(f"cat {i}.png", format, encoded(format, 255 - PICTURE)) for i in range(count)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("count", "actions", "source", "relations"),
    [
        (0, ["c2pa.created"], "trainedAlgorithmicMedia", []),
        (1, ["c2pa.opened", "c2pa.edited"], "compositeWithTrainedAlgorithmicMedia", ["parentOf"]),
        (2, ["c2pa.created"], "compositeWithTrainedAlgorithmicMedia", ["inputTo", "inputTo"]),
    ],
)
def test_the_reader_finds_what_was_done_with_which_pictures(signer, format, count, actions, source, relations):
    plain = encoded(format)
    signed = sign(plain, format, "0.1.0", references(count), signer)
    store = json.loads(c2pa.Reader(f"image/{format.lower()}", io.BytesIO(signed)).json())
    manifest = store["manifests"][store["active_manifest"]]
    [assertion] = [each for each in manifest["assertions"] if each["label"].startswith("c2pa.actions")]
    found = assertion["data"]["actions"]
    assert [action["action"] for action in found] == actions
    assert found[-1]["digitalSourceType"] == f"http://cv.iptc.org/newscodes/digitalsourcetype/{source}"
    used = manifest.get("ingredients", [])
    assert [each["relationship"] for each in used] == relations
    assert [each["title"] for each in used] == [f"cat {i}.png" for i in range(count)]
    assert len(found[0].get("parameters", {}).get("ingredients", [])) == count
    assert "thumbnail" not in json.dumps(store)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(signed))), np.asarray(Image.open(io.BytesIO(plain))))


@pytest.mark.parametrize("format", FORMATS)
def test_credentials_are_valid_and_trusted_with_their_root_alone(signer, files, format, tmp_path):
    signed = sign(encoded(format), format, "0.1.0", references(1, format), signer)
    said = read(signed, format)
    assert (said.state, said.problems) == ("Valid", ("signingCredential.untrusted",))
    assert (said.signer, said.generator) == ("flux2-trt development only", "flux2-trt 0.1.0")
    assert (said.source_types, said.ingredients) == (("compositeWithTrainedAlgorithmicMedia",), ("cat 0.png",))
    assert read(signed, format, files.root.read_text()).state == "Trusted"
    other = write_development_certificate(tmp_path)
    assert read(signed, format, other.root.read_text()).state == "Valid"


@pytest.mark.parametrize("format", FORMATS)
def test_a_changed_pixel_is_found(signer, files, format):
    signed = bytearray(sign(encoded(format), format, "0.1.0", [], signer))
    place = {"PNG": signed.find(b"IDAT") + 100, "JPEG": len(signed) - 100, "WEBP": signed.find(b"VP8 ") + 100}[format]
    signed[place] ^= 1
    said = read(bytes(signed), format, files.root.read_text())
    assert said.state == "Invalid" and "assertion.dataHash.mismatch" in said.problems


def test_credentials_are_known_by_the_structure_of_the_file(signer):
    for format in FORMATS:
        plain = encoded(format)
        assert not are_in(plain, format) and read(plain, format) is None
        signed = sign(plain, format, "0.1.0", [], signer)
        assert are_in(signed, format)
        for end in range(0, len(signed), 97):
            are_in(signed[:end], format)  # cut anywhere, and no error or endless loop


def test_a_picture_with_credentials_can_be_the_parent_of_another(signer, files):
    first = sign(encoded("PNG"), "PNG", "0.1.0", [], signer)
    second = sign(encoded("JPEG"), "JPEG", "0.1.0", [Ingredient("first.png", "PNG", first)], signer)
    said = read(second, "JPEG", files.root.read_text())
    assert (said.state, said.ingredients, said.actions) == ("Trusted", ("first.png",), ("c2pa.opened", "c2pa.edited"))


# the signer


def test_nothing_given_is_no_signer_and_the_environment_holds_texts(files):
    assert Signer.from_options(None, None, {}) is None
    texts = {"C2PA_SIGN_CERT": files.certificate.read_text(), "C2PA_PRIVATE_KEY": files.key.read_text()}
    found = Signer.from_options(None, None, texts)
    assert found == Signer.from_options(files.certificate, files.key, {}) and found.algorithm == "es256"
    for name in texts:
        refused(lambda n=name: Signer.from_options(None, None, {n: texts[n]}), "both C2PA_SIGN_CERT")
    assert files.key.read_text().splitlines()[1] not in repr(found)


def made(folder: Path, key, days: tuple[int, int] = (-1, 1), password: bytes | None = None) -> tuple[Path, Path]:
    """Files of a certificate that its own key signs."""
    now = datetime.now(timezone.utc)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1)
    builder = builder.not_valid_before(now + timedelta(days[0])).not_valid_after(now + timedelta(days[1]))
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    cert_file, key_file = folder / "test.cert.pem", folder / "test.key.pem"
    cert_file.write_bytes(builder.sign(key, digest).public_bytes(Encoding.PEM))
    protection = BestAvailableEncryption(password) if password else NoEncryption()
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection))
    return cert_file, key_file


def test_the_key_says_the_algorithm(tmp_path):
    for key, algorithm in (
        (ec.generate_private_key(ec.SECP384R1()), "es384"),
        (ec.generate_private_key(ec.SECP521R1()), "es512"),
        (rsa.generate_private_key(65537, 2048), "ps256"),
        (ed25519.Ed25519PrivateKey.generate(), "ed25519"),
    ):
        assert Signer.from_options(*made(tmp_path, key), {}).algorithm == algorithm
    refused(partial(Signer.from_options, *made(tmp_path, ec.generate_private_key(ec.SECP256K1())), {}), "P-256")


def test_what_cannot_sign_is_refused_on_one_line(tmp_path, files):
    key = ec.generate_private_key(ec.SECP256R1())
    cert_file, key_file = made(tmp_path, key)
    refused(partial(Signer.from_options, cert_file, None, {}), "both --c2pa-cert and --c2pa-key")
    refused(partial(Signer.from_options, tmp_path / "no.pem", key_file, {}), "no.pem", "No such file")
    refused(partial(Signer.from_options, tmp_path, key_file, {}), "directory")
    refused(partial(Signer.from_options, key_file, cert_file, {}), "no private key")
    refused(partial(Signer.from_options, key_file, key_file, {}), "no certificate")
    refused(partial(Signer.from_options, cert_file, files.key, {}), "not the key")
    (tmp_path / "binary.pem").write_bytes(bytes(range(256)))
    refused(partial(Signer.from_options, tmp_path / "binary.pem", key_file, {}), "no PEM file")
    (tmp_path / "large.pem").write_bytes(b"a" * (2**20 + 1))
    refused(partial(Signer.from_options, tmp_path / "large.pem", key_file, {}), "no PEM file")
    refused(partial(Signer.from_options, *made(tmp_path, key, (-3, -1)), {}), "is valid from", "not today")
    refused(partial(Signer.from_options, *made(tmp_path, key, password=b"x"), {}), "encrypted", "openssl pkey")


def test_without_the_package_the_command_to_install_it_is_said(files, monkeypatch):
    monkeypatch.setattr("flux2_trt.credentials.find_spec", lambda name: None)
    signing = partial(Signer.from_options, files.certificate, files.key, {})
    refused(signing, "pip install 'flux2-trt[c2pa]'", kind=Flux2Error)
    assert Signer.from_options(None, None, {}) is None


def test_a_certificate_that_c2pa_refuses_fails_on_one_line(tmp_path):
    signer = Signer.from_options(*made(tmp_path, ec.generate_private_key(ec.SECP256R1())), {})
    refused(partial(sign, encoded("PNG"), "PNG", "0.1.0", [], signer), "could not be signed", kind=Flux2Error)


# the development certificate


def test_openssl_verifies_the_certificate_and_its_name_says_what_it_is_for(files):
    command = ["openssl", "verify", "-purpose", "smimesign", "-CAfile", str(files.root), str(files.certificate)]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stdout.endswith(": OK\n")
    found = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    assert "development only" in found.subject.rfc4514_string()
    assert found.not_valid_after_utc - datetime.now(timezone.utc) < timedelta(days=366)
    assert stat.S_IMODE(files.key.stat().st_mode) == 0o600


def test_an_existing_certificate_is_kept_and_nothing_else_left(tmp_path, files):
    (tmp_path / "development-only.cert.pem").write_bytes(b"mine")
    refused(partial(write_development_certificate, tmp_path), "already")
    assert names(tmp_path) == ["development-only.cert.pem"]
    assert (tmp_path / "development-only.cert.pem").read_bytes() == b"mine"
    refused(partial(write_development_certificate, tmp_path / "missing"), "folder", kind=Flux2Error)


def test_an_interrupt_leaves_no_half_of_a_pair(tmp_path, monkeypatch):
    write = certificate.write_file

    def interrupted(path, *rest, **more):
        if path.name.endswith("root.pem"):
            raise KeyboardInterrupt
        write(path, *rest, **more)

    monkeypatch.setattr(certificate, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_development_certificate(tmp_path)
    assert names(tmp_path) == []
