"""Where the `vllm serve` that a command starts will listen, and a question to it over HTTP, TLS or a Unix socket.

The words of a `--config` file count as vLLM counts them: before those of the command line, of which the last is taken.
No proxy of the environment is asked, and no certificate is verified: it is the asker's own child.
"""

import contextlib
import http.client
import itertools
import json
import os
import socket
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TIMEOUT_S = 5.0
# Where a server is reached that listens on every address.
_LOOPBACK = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
_FLAGS = ("host", "port", "uds", "ssl-certfile", "ssl-keyfile", "api-key")


@dataclass(frozen=True)
class ServerAddress:
    """`socket_path`, if there is one, is asked in place of host and port."""

    host: str
    port: int
    socket_path: str | None = None
    is_tls: bool = False
    key: str | None = field(default=None, repr=False)

    def get(self, path: str) -> tuple[int, bytes]:
        """(status, body). Raises OSError or http.client.HTTPException."""
        connection = http.client.HTTPConnection("localhost" if self.socket_path else self.host, self.port)
        with contextlib.closing(connection):
            connection.sock = self._connected()
            connection.request("GET", path, headers={"Authorization": f"Bearer {self.key}"} if self.key else {})
            with connection.getresponse() as response:
                return response.status, response.read()

    def _connected(self) -> socket.socket:
        if self.socket_path:
            plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        else:
            plain = socket.create_connection((self.host, self.port), TIMEOUT_S)
        try:
            if self.socket_path:
                plain.settimeout(TIMEOUT_S)
                plain.connect(self.socket_path)
            if not self.is_tls:
                return plain
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            return context.wrap_socket(plain)
        except BaseException:
            plain.close()
            raise


def address_in(command: Sequence[str]) -> ServerAddress:
    """Where the server of this `vllm serve` command listens; what vLLM will refuse is left to it."""
    given = {flag: values for flag, values in _options([*_configured(command), *command]) if flag in _FLAGS}
    one = {flag: values[0] for flag, values in given.items() if values}
    keys = given.get("api-key") or [os.environ.get("VLLM_API_KEY", "")]
    host, port = one.get("host", ""), one.get("port", "")
    return ServerAddress(
        host=_LOOPBACK.get(host, host),
        port=int(port) if port.isdecimal() else 8000,
        socket_path=one.get("uds") or None,
        is_tls=bool(one.get("ssl-certfile") or one.get("ssl-keyfile")),
        key=next(filter(None, keys), None),
    )


def adapters_in(command: Sequence[str]) -> dict[str, str]:
    """Name -> path of the adapters that this `vllm serve` command names itself; what vLLM will refuse is in none."""
    given = dict(_options([*_configured(command), *command]))
    found: dict[str, str] = {}
    for word in given.get("lora-modules", ()):
        if "=" in word and "," not in word:  # as vLLM's LoRAParserAction tells them apart
            name, _, path = word.partition("=")
            found[name] = path
            continue
        with contextlib.suppress(ValueError, TypeError, KeyError):
            module = json.loads(word)
            found[module["name"]] = module["path"]
    return found


def _configured(command: Sequence[str]) -> list[str]:
    """Words of the command's `--config` file, none if vLLM will not be able to read it."""
    import yaml

    path = next((following for word, following in itertools.pairwise(command) if word == "--config"), None)
    try:
        settings = yaml.safe_load(Path(path).read_text()) if path else None
    except (OSError, ValueError, yaml.YAMLError):
        return []
    words: list[str] = []
    for name, value in settings.items() if isinstance(settings, dict) else ():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def _options(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(name without dashes, values) of each option in turn."""
    name, values = "", []
    for word in words:
        if word.startswith("--"):
            yield name, values
            name, equals, value = word.removeprefix("--").partition("=")
            name, values = name.replace("_", "-"), [value] if equals else []
        else:
            values.append(word)
    yield name, values
