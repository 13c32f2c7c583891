"""The socket of a server, and its address."""

from __future__ import annotations

import ipaddress
import socket

from iama.config.serving import ServeConfig
from iama.errors import ConfigError


def bind(config: ServeConfig) -> socket.socket:
    """The socket, taken before anything is loaded; raises `ConfigError` where it cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # The protocol is named since asyncio sends small pieces at once on sockets that are surely TCP alone.
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((config.host, config.port))
    except (OSError, UnicodeError) as error:
        taken.close()
        raise cannot_listen(config, error) from error
    taken.set_inheritable(False)
    return taken


def cannot_listen(config: ServeConfig, error: Exception) -> ConfigError:
    """What is told of a socket that cannot be bound, or on which another server has begun to listen since."""
    reason = error.strerror if isinstance(error, OSError) else "no host's name"
    return ConfigError(
        f"cannot listen on host {config.host!r}, port {config.port} ({reason}); set another host or port (0: any "
        "that is free)"
    )


def address(taken: socket.socket) -> str:
    """Where a browser finds the server."""
    host, port = taken.getsockname()[:2]
    host = socket.gethostname() if ipaddress.ip_address(host).is_unspecified else host
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"
