"""Credentials: C2PA's signed statement of how a picture came to be, made with c2pa-python and checked with its reader.

A picture that was drawn from words is `trainedAlgorithmicMedia`; one that was drawn from pictures too is
`compositeWithTrainedAlgorithmicMedia` and names them as ingredients: a single one as the parent that was edited,
several as inputs (C2PA specification, actions and ingredients; IPTC's digital source types). Nothing of the prompt is
stated, and no thumbnails are kept. Signing covers every byte of the file, so it comes last.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flux2_trt.errors import Flux2Error, UsageError

MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "MPO": "image/jpeg"}
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
GENERATED, COMPOSITE = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
# What c2patool reads: the PEM texts themselves, not names of files.
CERTIFICATE_VARIABLE, KEY_VARIABLE = "C2PA_SIGN_CERT", "C2PA_PRIVATE_KEY"
PEM_LIMIT_BYTES = 2**20
INSTALL = "pip install 'flux2-trt[c2pa]'"
_QUIET = {"builder": {"thumbnail": {"enabled": False}}, "verify": {"remote_manifest_fetch": False}}


@dataclass(frozen=True)
class Signer:
    """A certificate chain and the private key of its first certificate, in PEM, and the algorithm that fits them."""

    certificates: str = field(repr=False)
    key: str = field(repr=False)
    algorithm: str

    @staticmethod
    def from_options(
        certificate: Path | None, key: Path | None, environment: Mapping[str, str] = os.environ
    ) -> Signer | None:
        """The signer of two files, or of the environment, or none where neither is given.

        Raises UsageError for one without the other, a file that cannot be read, a key that does not fit or is
        encrypted, a certificate that is not valid today; Flux2Error where c2pa-python is not installed.
        """
        texts = environment.get(CERTIFICATE_VARIABLE), environment.get(KEY_VARIABLE)
        if certificate is None and key is None:
            if not any(texts):
                return None
            if not all(texts):
                raise UsageError(f"signing needs both {CERTIFICATE_VARIABLE} and {KEY_VARIABLE}; set or unset both")
            names = CERTIFICATE_VARIABLE, KEY_VARIABLE
        elif certificate is None or key is None:
            raise UsageError("signing needs a certificate and its key; give both --c2pa-cert and --c2pa-key")
        else:
            names = repr(str(certificate)), repr(str(key))
            texts = read_pem(certificate), read_pem(key)
        if find_spec("c2pa") is None:
            raise Flux2Error(f"content credentials need the package c2pa-python; {INSTALL}")
        assert texts[0] and texts[1]
        return Signer(texts[0], texts[1], _algorithm(texts[0], texts[1], *names))


@dataclass(frozen=True)
class Ingredient:
    """A picture that another was made from: its title, its format as Pillow names it, its file's bytes."""

    title: str
    format: str
    data: bytes = field(repr=False)

    @staticmethod
    def from_file(path: Path) -> Ingredient:
        """Of a picture that `images.load_reference` reads."""
        from PIL import Image

        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            assert image.format is not None
            return Ingredient(path.name, image.format, data)


@dataclass(frozen=True)
class Statement:
    """What credentials say. `state` is the reader's: Trusted, Valid (but signed by an unknown party) or Invalid.

    `source_types` are the ends of IPTC's addresses, `problems` the codes of what failed.
    """

    state: str
    signer: str | None
    generator: str | None
    actions: tuple[str, ...]
    source_types: tuple[str, ...]
    ingredients: tuple[str, ...]
    problems: tuple[str, ...]


def sign(data: bytes, format: str, version: str, ingredients: Sequence[Ingredient], signer: Signer) -> bytes:
    """The file `data` with credentials, which last until a byte of it changes. Raises Flux2Error where that fails."""
    import c2pa

    source = COMPOSITE if ingredients else GENERATED
    agent = {"name": "flux2-trt", "version": version}
    manifest = {"claim_generator_info": [agent], "format": MIME[format]}
    signed = io.BytesIO()
    try:
        info = c2pa.C2paSignerInfo(signer.algorithm, signer.certificates.encode(), signer.key.encode(), None)
        with (
            c2pa.Context.from_dict(_QUIET) as context,
            c2pa.Signer.from_info(info) as signing,
            c2pa.Builder(manifest, context) as builder,
        ):
            for action in _actions(len(ingredients), source, agent):
                builder.add_action(action)
            for index, ingredient in enumerate(ingredients):
                relation = "parentOf" if len(ingredients) == 1 else "inputTo"
                values = {"title": ingredient.title, "relationship": relation, "label": f"reference-{index + 1}"}
                builder.add_ingredient(values, MIME[ingredient.format], io.BytesIO(ingredient.data))
            builder.sign(signing, MIME[format], io.BytesIO(data), signed)
    except c2pa.C2paError as error:
        raise Flux2Error(f"the picture could not be signed: {_said(error)}; sign with another certificate") from error
    return signed.getvalue()


def read(data: bytes, format: str, anchors: str | None = None) -> Statement | None:
    """What the credentials in a file say and whether they hold; None where it has none. Nothing is fetched.

    `anchors`: PEM certificates to trust beside those that the library knows. Raises Flux2Error where c2pa-python is not
    installed, or cannot read what is there.
    """
    try:
        import c2pa
    except ImportError as error:
        if not are_in(data, format):
            return None
        raise Flux2Error(f"there are content credentials; to check them, {INSTALL}") from error
    settings = {**_QUIET, "trust": {"user_anchors": anchors}} if anchors else _QUIET
    try:
        with (
            c2pa.Context.from_dict(settings) as context,
            c2pa.Reader(MIME[format], io.BytesIO(data), context=context) as reader,
        ):
            return _statement(json.loads(reader.json()))
    except c2pa.C2paError.ManifestNotFound:
        return None
    except (c2pa.C2paError, ValueError) as error:
        if not are_in(data, format):
            return None
        raise Flux2Error(f"the content credentials cannot be read: {_said(error)}") from error


def are_in(data: bytes, format: str) -> bool:
    """Whether a file has credentials, by its structure alone: PNG's chunk caBX, a JPEG's APP11, WebP's chunk C2PA."""
    kinds = {"PNG": (_png_chunks, b"caBX"), "WEBP": (_webp_chunks, b"C2PA")}
    chunks, name = kinds.get(format, (_jpeg_segments, b"\xff\xeb"))
    return any(kind == name for kind in chunks(data))


def _png_chunks(data: bytes) -> Iterator[bytes]:
    position = 8
    while position + 8 <= len(data):
        yield data[position + 4 : position + 8]
        position += 12 + int.from_bytes(data[position : position + 4], "big")


def _webp_chunks(data: bytes) -> Iterator[bytes]:
    position = 12
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        yield data[position : position + 4]
        position += 8 + size + size % 2


def _jpeg_segments(data: bytes) -> Iterator[bytes]:
    """Those before the first scan, where metadata is."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        yield data[position : position + 2]
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")


def _actions(references: int, source: str, agent: dict[str, str]) -> list[dict[str, Any]]:
    made = {"digitalSourceType": SOURCE_TYPES + source, "softwareAgent": agent}
    labels = [f"reference-{index + 1}" for index in range(references)]
    if references == 1:
        opened = {"action": "c2pa.opened", "parameters": {"ingredientIds": labels}}
        return [opened, {"action": "c2pa.edited", **made}]
    return [{"action": "c2pa.created", **made, **({"parameters": {"ingredientIds": labels}} if labels else {})}]


def _statement(store: dict[str, Any]) -> Statement:
    manifest = store.get("manifests", {}).get(store.get("active_manifest"), {})
    actions = [
        action
        for assertion in manifest.get("assertions", [])
        if assertion.get("label", "").startswith("c2pa.actions")
        for action in assertion.get("data", {}).get("actions", [])
    ]
    results = store.get("validation_results", {}).get("activeManifest", {})
    signature = manifest.get("signature_info") or {}
    generators = manifest.get("claim_generator_info") or [{}]
    return Statement(
        state=str(store.get("validation_state", "Invalid")),
        signer=signature.get("issuer") or signature.get("common_name"),
        generator=" ".join(str(generators[0][key]) for key in ("name", "version") if key in generators[0]) or None,
        actions=tuple(str(action.get("action")) for action in actions),
        source_types=tuple(
            str(action["digitalSourceType"]).removeprefix(SOURCE_TYPES)
            for action in actions
            if "digitalSourceType" in action
        ),
        ingredients=tuple(str(each.get("title", "?")) for each in manifest.get("ingredients", [])),
        problems=tuple(dict.fromkeys(str(failure.get("code")) for failure in results.get("failure", []))),
    )


def read_pem(path: Path) -> str:
    """The text of a PEM file. Raises UsageError."""
    try:
        with path.open("rb") as file:
            data = file.read(PEM_LIMIT_BYTES + 1)
        if len(data) > PEM_LIMIT_BYTES:
            raise UsageError(f"{str(path)!r} is no PEM file: it has more than {PEM_LIMIT_BYTES} bytes")
        return data.decode("ascii")
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error.strerror}; give a PEM file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{str(path)!r} is no PEM file; convert it with openssl") from error


def _algorithm(certificates: str, key: str, certificate_name: str, key_name: str) -> str:
    """The name that C2PA has for signatures with this key. Raises UsageError."""
    from datetime import datetime, timezone

    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    try:
        private: Any = load_pem_private_key(key.encode(), None)
    except TypeError as error:
        raise UsageError(f"{key_name} is encrypted; decrypt it first: openssl pkey -in FILE -out FILE") from error
    except Exception as error:
        raise UsageError(f"{key_name} holds no private key in PEM") from error
    try:
        first = x509.load_pem_x509_certificates(certificates.encode())[0]
    except Exception as error:
        raise UsageError(f"{certificate_name} holds no certificate in PEM") from error
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if first.public_key().public_bytes(*form) != private.public_key().public_bytes(*form):
        raise UsageError(f"{key_name} is not the key of the first certificate in {certificate_name}")
    if not first.not_valid_before_utc <= datetime.now(timezone.utc) <= first.not_valid_after_utc:
        valid = f"{first.not_valid_before_utc:%Y-%m-%d} to {first.not_valid_after_utc:%Y-%m-%d}"
        raise UsageError(f"the certificate in {certificate_name} is valid from {valid}, not today")
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(private, rsa.RSAPrivateKey):
        return "ps256"
    curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in curves:
        return curves[private.curve.name]
    raise UsageError(f"{key_name} is of a kind that C2PA does not sign with; take EC P-256, Ed25519 or RSA")


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
