"""The GGUF that the benchmark compares with: llama.cpp's own server, on our export of the default adapter.

It is `xllamacpp`, llama.cpp as a Python wheel, which `requirements.txt` does not name: `pip install xllamacpp`. Not for use.

    python -m eval.benchmarks.llama_server model.gguf --port 8002 --threads 2 --slots 16 --context 2048
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence
from importlib.util import find_spec

from scripts.common.errors import UserError, entry_point


def check_installed() -> None:
    """Refuse where the wheel is absent.

    Raises: UserError with how to install it.
    """
    if find_spec("xllamacpp") is None:
        raise UserError(
            "--llama-cpp: found no xllamacpp, which is llama.cpp as a Python wheel. Install it with `pip install xllamacpp`, "
            "into a virtual environment of its own if you like, which PYTHONPATH then names."
        )


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Serve a GGUF until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="FILE", help="a GGUF file")
    parser.add_argument("--port", type=int, required=True, help="where it listens")
    parser.add_argument("--threads", type=int, required=True, help="threads that compute")
    parser.add_argument("--slots", type=int, required=True, help="requests that run at once")
    parser.add_argument("--context", type=int, required=True, help="tokens of each of them")
    arguments = parser.parse_args(argv)
    check_installed()
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = arguments.model
    parameters.port, parameters.n_parallel = arguments.port, arguments.slots
    parameters.n_ctx = arguments.slots * arguments.context
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = arguments.threads
    parameters.n_gpu_layers = 0
    server = xllamacpp.Server(parameters)
    sys.stderr.write(f"llama.cpp listens at {server.listening_address}\n")
    threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
