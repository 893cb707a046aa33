"""Refuse every connection but loopback, in this process and in those it starts (they find this file by PYTHONPATH)."""

import sys


def _refuse(event: str, arguments: tuple) -> None:
    if event == "socket.connect":
        address = arguments[1]
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise ConnectionRefusedError(f"the test suite is offline: connection to {address[0]!r} refused")
    elif event == "socket.getaddrinfo" and arguments[0] not in (
        None,
        "",
        "localhost",
        "127.0.0.1",
        "::1",
        "0.0.0.0",
        b"localhost",
    ):
        raise OSError(f"the test suite is offline: look-up of {arguments[0]!r} refused")


sys.addaudithook(_refuse)
