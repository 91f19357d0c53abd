"""Who may do what: keys, and where experts may come from.

The environment says all of it, so that the server's processes agree, however they were started."""

import hashlib
import ipaddress
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from starlette.datastructures import Headers

from phatgoose.errors import ConfigError, ExpertNotFoundError, UnsupportedAdapterError
from phatgoose.experts.hub import HubId, download, is_repository
from phatgoose.experts.sources import folder_name, hub_name
from phatgoose.serve.http.refusal import Refusal

ADMIN_KEY = "PHATGOOSE_ADMIN_KEY"
EXPERTS_ROOT = "PHATGOOSE_EXPERTS_ROOT"
ALLOW_HUB = "PHATGOOSE_ALLOW_HUB"  # owners and owner/name, with spaces between
DRAIN_SECONDS = "PHATGOOSE_DRAIN_SECONDS"
ALLOW_NO_KEY = "PHATGOOSE_ALLOW_NO_KEY"  # "1": whoever reaches the server may use it
API_KEY = "VLLM_API_KEY"  # vLLM's own, where --api-key is not given


@dataclass(frozen=True, kw_only=True)
class Access:
    """Keys and sources. Raises ConfigError for settings that cannot be meant."""

    admin_key: str | None = field(default=None, repr=False)
    api_keys: Sequence[str] = field(default=(), repr=False)
    root: Path | None = None
    hub: Sequence[str] = ()
    drain: float = 300.0  # seconds that a change waits for requests in flight
    allow_no_key: bool = False  # on addresses that other machines reach

    def __post_init__(self) -> None:
        if self.admin_key is not None and self.admin_key in self.api_keys:
            raise ConfigError("phatgoose: the admin key is an API key too. Choose another.")
        if self.root is not None and not self.root.is_dir():
            raise ConfigError(f"{self.root}: the root of experts is not a folder.")
        for entry in self.hub:
            if not is_repository(entry):
                raise ConfigError(f"{entry}: allow an owner on the Hub, or owner/name.")
        if not self.drain > 0:
            raise ConfigError(f"phatgoose: {DRAIN_SECONDS} must be above 0, got {self.drain}.")

    @classmethod
    def read(cls, environment: Mapping[str, str], api_keys: Sequence[str] | None) -> "Access":
        """Read the environment. `api_keys` are those of vLLM's own --api-key."""
        keys = api_keys or [environment.get(API_KEY, "")]
        root = environment.get(EXPERTS_ROOT)
        seconds = environment.get(DRAIN_SECONDS, "")
        try:
            drain = float(seconds) if seconds else cls.drain
        except ValueError:
            raise ConfigError(f"phatgoose: {DRAIN_SECONDS} is no number: {seconds!r}.") from None
        return cls(
            admin_key=environment.get(ADMIN_KEY) or None,
            api_keys=tuple(key for key in keys if key),
            root=Path(root).resolve() if root else None,
            hub=tuple(environment.get(ALLOW_HUB, "").split()),
            drain=drain,
            allow_no_key=environment.get(ALLOW_NO_KEY, "") not in ("", "0"),
        )

    def check_address(self, host: str | None, *, uds: str | None = None) -> None:
        """Raise ConfigError for an address that other machines reach, if there is no key.

        `host` None or "" is every address of the machine; `uds` a socket that is a file.
        """
        if self.api_keys or self.allow_no_key or uds or is_loopback(host or "0.0.0.0"):
            return
        raise ConfigError(
            f"phatgoose: on {host or 'all addresses'} other machines could use the server without "
            f"a key. Set --api-key (${API_KEY}), listen on 127.0.0.1, or say --allow-no-key "
            f"(${ALLOW_NO_KEY}=1) if that is meant."
        )

    def check_user(self, headers: Headers) -> None:
        """Check the key as vLLM's own middleware does, which comes after ours. Raises Refusal."""
        if self.api_keys and not _holds(headers, self.api_keys):
            raise _unauthorized("a wrong API key" if _bearer(headers) else "no API key")

    def is_admin(self, headers: Headers) -> bool:
        return self.admin_key is not None and _holds(headers, [self.admin_key])

    def check_reader(self, headers: Headers) -> None:
        """Let through the admin and whoever may ask for answers. Raises Refusal for others."""
        if not self.is_admin(headers):
            self.check_user(headers)

    def check_admin(self, headers: Headers) -> None:
        """Raises Refusal."""
        if self.admin_key is None:
            raise Refusal(
                403,
                "The pool of this server cannot be changed: it was started without --admin-key.",
                reason="no_admin_key",
            )
        if not self.is_admin(headers):
            raise _unauthorized("a wrong admin key" if _bearer(headers) else "no admin key")

    def find(self, source: str) -> tuple[str, Path]:
        """An expert's name, unless it is given another, and the folder of its files, which are
        downloaded first if the source is a Hub id that is allowed.

        Folders are those below the root, once links are followed, and so are their files; a
        relative one starts at the root. A Hub id is never a path: no folder is looked for by it
        elsewhere. Raises Refusal.
        """
        if self.root is not None and "\0" not in source:
            folder = _resolve(self.root / source)
            if folder is not None and os.path.isdir(folder):  # Path.is_dir raises on long names
                return folder_name(self.root / source), self._below(folder, source)
        if self._allows(source):
            try:
                return hub_name(source), download(source)
            except (ExpertNotFoundError, UnsupportedAdapterError) as error:
                raise Refusal(404, str(error), reason="source", param="source") from error
        # Whether there is such a folder elsewhere is nobody's business.
        raise self._no(source)

    def _below(self, folder: Path, source: str) -> Path:
        assert self.root is not None
        for path in (folder, *folder.iterdir()):
            real = _resolve(path)
            if real is None or not real.is_relative_to(self.root) or real == self.root:
                raise self._no(source)
        return folder

    def _allows(self, source: str) -> bool:
        asked = HubId.parse(source)
        if asked is None:
            return False
        return asked.repository in self.hub or asked.repository.partition("/")[0] in self.hub

    def _no(self, source: str) -> Refusal:
        ways = ["a folder below the root that the server was started with"] if self.root else []
        ways += [f"a Hub id of {', '.join(self.hub)}"] if self.hub else []
        wanted = " or ".join(ways) or "nothing: start it with --experts-root or --allow-hub"
        return Refusal(
            403,
            f"{source[:200]}: not a source that this server takes experts from. It takes {wanted}.",
            reason="source",
            param="source",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address, or every address of a name."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(one.partition("%")[0]).is_loopback for one in found)


def _resolve(path: Path) -> Path | None:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a loop of links, a name that is too long
        return None


def _bearer(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key if scheme.lower() == "bearer" and key else None


def _holds(headers: Headers, keys: Sequence[str]) -> bool:
    """Whether the request has one of the keys, in a time that does not tell how much of it."""
    given = _digest(_bearer(headers) or "")
    matches = [secrets.compare_digest(given, _digest(key)) for key in keys]
    return any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _unauthorized(what: str) -> Refusal:
    return Refusal(
        401,
        f"The request has {what}. Send the header Authorization: Bearer KEY.",
        reason="unauthorized",
        headers={"WWW-Authenticate": "Bearer"},
    )
