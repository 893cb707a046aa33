"""Refuse every connection but loopback, in this process and in those it starts (they find this file by PYTHONPATH).

Where REFUSALS names a file, unpickling is refused too: whatever looks up a class or function by a name from a pickle can run
any code. Each refusal is also written to that file, since a library may swallow the error. `torch.load` with
`weights_only=True` has a reader of its own that looks nothing up, and passes.
"""

import os
import sys

LOOPBACK = ("127.0.0.1", "::1", "localhost")
ANY_ADDRESS = (None, "", "0.0.0.0", *LOOPBACK, b"localhost")


def _watch(event: str, arguments: tuple) -> None:
    if event == "socket.connect":
        address = arguments[1]
        if isinstance(address, tuple) and address[0] not in LOOPBACK:
            _refuse(ConnectionRefusedError(f"the test suite is offline: connection to {address[0]!r} refused"))
    elif event == "socket.getaddrinfo" and arguments[0] not in ANY_ADDRESS:
        _refuse(OSError(f"the test suite is offline: look-up of {arguments[0]!r} refused"))
    elif event == "pickle.find_class" and "REFUSALS" in os.environ:
        _refuse(RuntimeError(f"a pickle asked for {arguments[0]}.{arguments[1]}"))


def _refuse(error: Exception) -> None:
    if "REFUSALS" in os.environ:
        import traceback

        with open(os.environ["REFUSALS"], "a", encoding="utf-8") as file:
            file.write(f"{error}\n{''.join(traceback.format_stack(limit=12)[:-2])}\n")
    raise error


sys.addaudithook(_watch)
