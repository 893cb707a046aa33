"""Which addresses lead to this machine."""

from __future__ import annotations

from ipaddress import ip_address


def is_loopback(host: str) -> bool:
    """Decide by the name alone whether a host is this machine; no name server is asked."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
