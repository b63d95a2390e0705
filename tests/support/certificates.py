"""A certificate authority and a server certificate for tests, by OpenSSL."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_certificates(folder: Path, *, host: str = "IP:127.0.0.1") -> tuple[Path, Path, Path]:
    """Write a certificate of an authority, one of a server for ``host`` and the server's key; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("ca.key", "ca.crt", "server.key", "server.csr", "server.pem", "names")
    ca_key, ca, key, request, certificate, extensions = (folder / name for name in names)
    extensions.write_text(f"subjectAltName={host}\n")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    _openssl("req", "-x509", *curve, "-keyout", ca_key, "-out", ca, "-subj", "/CN=test authority")
    _openssl("req", *curve, "-keyout", key, "-out", request, "-subj", "/CN=server")
    signing = ("-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-extfile", extensions)
    _openssl("x509", "-req", "-in", request, *signing, "-out", certificate)
    return ca, certificate, key


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
