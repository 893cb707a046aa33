"""The GGUF that the benchmark compares with, behind llama.cpp's own server.

It is `xllamacpp`, llama.cpp as a Python wheel, which no requirements file names: `pip install xllamacpp`.
"""

from __future__ import annotations

import threading
from importlib.util import find_spec

from scripts.common.errors import UserError


def check_installed() -> None:
    """Refuse where the wheel is absent.

    Raises: UserError with how to install it.
    """
    if find_spec("xllamacpp") is None:
        raise UserError(
            "--llama-cpp: found no xllamacpp, which is llama.cpp as a Python wheel. Install it with `pip install xllamacpp`, "
            "or with --target into a folder that PYTHONPATH then names."
        )


def serve(file: str, threads: int, slots: int, context: int, port: int) -> None:
    """Answer from a GGUF file until the process is ended, so many requests at once of so many tokens each."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.port = file, port
    parameters.n_parallel, parameters.n_ctx = slots, slots * context
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.n_gpu_layers = 0
    server = xllamacpp.Server(parameters)  # listens until it is collected
    threading.Event().wait()
    del server
