"""Refuse every connection but loopback, in this process and in those it starts (they find this file by PYTHONPATH).

Where REFUSALS names a file, unpickling is refused too: a pickle that looks up a class or function by its name can run
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


def _ignore(name: str) -> None:
    """Make one configuration key or flag do nothing: whoever reads it gets its default. See tests/repo/test_no_dead_keys.py."""
    if name.startswith("--"):
        import argparse

        parse = argparse.ArgumentParser.parse_args

        def parse_args(self, args=None, namespace=None):
            parsed = parse(self, args, namespace)
            for action in self._actions:
                if name in action.option_strings:
                    setattr(parsed, action.dest, action.default)
            return parsed

        argparse.ArgumentParser.parse_args = parse_args
        return
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    from scripts.common import schema

    *sections, key = name.split(".")
    model = schema.Config
    for section in sections:
        model = model.model_fields[section].annotation if section in model.model_fields else getattr(schema, section)
    field = model.model_fields[key]
    default = "ignored" if field.is_required() else field.get_default(call_default_factory=True)
    setattr(model, key, property(lambda self: default))


if "IGNORED" in os.environ:
    _ignore(os.environ["IGNORED"])
