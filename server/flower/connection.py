"""Connection to a SuperLink: address and TLS settings, from Flower's configuration file, and its health check."""

from __future__ import annotations

import os
import re
import ssl
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import tomli_w

from configs.errors import UserError, nearest
from configs.output import write_bytes

CONNECTION = "local"  # name of the only SuperLink connection in a config.toml that FedGraft writes
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ADDRESS = re.compile(r"(?P<host>[\w.-]+|\[[0-9a-fA-F:]+\]):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True)
class Connection:
    """Address and TLS settings of a SuperLink.

    Args:
        address: ``host:port``, an IPv6 host in brackets.
        root_certificates: PEM file of the authorities that sign the SuperLink's certificate; None: those of the system.
        insecure: whether the connection has no TLS.

    Raises:
        UserError: no such address, no such file, or a file for a connection without TLS.
    """

    address: str
    root_certificates: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if not (match := _ADDRESS.fullmatch(self.address)) or not 0 < int(match["port"]) < 2**16:
            raise UserError(f"expected the address of a SuperLink as host:port, got {self.address!r}")
        if self.root_certificates is None:
            return
        if self.insecure:
            raise UserError("expected either root certificates or an insecure connection, got both; drop one")
        if not self.root_certificates.is_file():
            raise UserError(
                f"expected a file of root certificates (PEM), found none at {self.root_certificates}"
            )

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> Connection:
        """Connection of the keys and values in Flower's configuration file, the reverse of ``settings``.

        Relative root certificates are those of the working directory, as for Flower.

        Raises:
            UserError: as for the arguments.
        """
        roots = settings.get("root-certificates")
        return cls(
            str(settings.get("address", "")),
            Path(roots).expanduser().absolute() if roots else None,
            bool(settings.get("insecure")),
        )

    @property
    def is_loopback(self) -> bool:
        """Whether the address is one of this machine alone."""
        return self.address.rpartition(":")[0].strip("[]") in LOOPBACK

    def settings(self) -> dict[str, Any]:
        """Keys and values of the connection in Flower's configuration file."""
        if self.insecure:
            return {"address": self.address, "insecure": True}
        roots = {"root-certificates": str(self.root_certificates)} if self.root_certificates else {}
        return {"address": self.address, **roots}

    def write(self, home: Path) -> None:
        """Write the connection as the default one of the Flower home folder ``home``."""
        home.mkdir(parents=True, exist_ok=True)
        superlink = {"default": CONNECTION, CONNECTION: self.settings()}
        (home / "config.toml").write_text(tomli_w.dumps({"superlink": superlink}), encoding="utf-8")

    def is_healthy(self) -> bool:
        """Whether the SuperLink answers its health check.

        Raises:
            UserError: it has a certificate of another authority, or no TLS, or it expects TLS.
        """
        scheme = "http" if self.insecure else "https"
        # A proxy of the environment does not receive the connections over loopback.
        options = {"verify": self._verification(), "trust_env": not self.is_loopback, "timeout": 5.0}
        try:
            return httpx.get(f"{scheme}://{self.address}/health", **options).is_success  # type: ignore[arg-type]
        except (httpx.RemoteProtocolError, httpx.ReadError) as error:
            if self.insecure:
                raise UserError(
                    f"expected a SuperLink without TLS at {self.address}, got a closed connection; name its "
                    "`root_certificates`"
                ) from error
        except httpx.HTTPError as error:
            self._refuse_certificate(str(error))
        return False

    def _verification(self) -> ssl.SSLContext | bool:
        if self.insecure:
            return False
        try:
            return ssl.create_default_context(cafile=self.root_certificates)
        except ssl.SSLError as error:
            raise UserError(
                f"expected root certificates (PEM) in {self.root_certificates}, which cannot be read: {error.reason}"
            ) from error

    def _refuse_certificate(self, message: str) -> None:
        authority = self.root_certificates or "the system's root certificates"
        if "CERTIFICATE_VERIFY_FAILED" in message:
            raise UserError(
                f"expected a certificate of {self.address} that {authority} vouch for, got one that fails: "
                f"{message.rpartition('failed: ')[2]}; name the right `root_certificates` and a host of the certificate"
            )
        if "[SSL" in message:
            raise UserError(
                f"expected TLS at {self.address}, got an answer without it; set `insecure` on a trusted network only"
            )


def flower_home() -> Path:
    """Folder of the user's Flower configuration: ``FLWR_HOME``, or ``~/.flwr``."""
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")


def read_connection(name: str, home: Path | None = None) -> Connection:
    """Read a SuperLink connection from ``config.toml`` of the Flower home folder ``home``, by default the user's.

    Args:
        name: of the section ``[superlink.NAME]``; empty: the default connection.
        home: Flower home folder; a relative path of root certificates is one from the working directory, as for Flower.

    Raises:
        UserError: no such file or connection, or one of Flower's simulation engine.
    """
    path = (home or flower_home()) / "config.toml"
    try:
        known = tomllib.loads(path.read_text(encoding="utf-8")).get("superlink", {})
    except FileNotFoundError:
        raise UserError(
            f"expected SuperLink connections in {path}, found no such file; write one with [superlink.NAME], address "
            "and root-certificates, or name the `superlink` address"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"expected SuperLink connections in {path}, which cannot be read: {error}") from error
    return _parsed(name or str(known.get("default", "")), known, path)


def add_connection(name: str, connection: Connection, home: Path | None = None) -> Path:
    """Write a connection into ``config.toml`` of a Flower home folder, by default the user's; others are kept.

    Returns:
        Path of the file; its default connection is this one if there was none.

    Raises:
        UserError: the file cannot be read, or the name is no TOML key without quotes.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "default":
        raise UserError(f"expected a connection name of letters, digits, - and _, got {name!r}")
    path = (home or flower_home()) / "config.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"expected SuperLink connections in {path}, which cannot be read: {error}") from error
    known = content.setdefault("superlink", {})
    if known.get(name) != connection.settings():
        known.setdefault("default", name)
        known[name] = connection.settings()
        write_bytes(path, tomli_w.dumps(content).encode())
    return path


def _parsed(name: str, known: Mapping[str, Any], path: Path) -> Connection:
    connections = {key: value for key, value in known.items() if isinstance(value, dict)}
    if name not in connections:
        hint = nearest(name, connections)
        names = ", ".join(sorted(connections)) or "none"
        raise UserError(f"expected a SuperLink connection of {path} ({names}), got {name!r}{hint}")
    values = connections[name]
    if str(values.get("address", "")).startswith(":"):
        raise UserError(
            f"expected the connection to a SuperLink, got {name!r}, Flower's simulation engine on this machine; use "
            "`fedgraft simulate`"
        )
    return Connection.of_settings(values)
