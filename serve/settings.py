"""What the server is started with: the configuration, SERVE_* of the environment, and the API keys."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from scripts.common.config import DEFAULT_CONFIG, load_config
from scripts.common.errors import UserError
from scripts.common.machine import Machine, choose_machine, give_freed_memory_back, prepare_environment
from scripts.common.schema import Config, Serve

log = logging.getLogger(__name__)


def load_settings() -> Config:
    """Load the configuration that LLM_CONFIG names; SERVE_<KEY> in the environment wins over the file."""
    variables = {name: f"SERVE_{name.upper()}" for name in Serve.model_fields}
    overrides = [f"serve.{name}={os.environ[key]}" for name, key in variables.items() if key in os.environ]
    return load_config(os.environ.get("LLM_CONFIG", DEFAULT_CONFIG), overrides, origin="environment SERVE_*").values


def settle_machine(config: Config) -> Machine:
    """Choose where a process that answers computes, and set its threads and allocator.

    Rows of all lengths come and go. Kept for the next, as training keeps it, their memory would only grow.
    """
    # A server computes now and then, a training all the time: it may wait ten times as long for the next of the 500 products
    # of a step, which then takes 0.8 of the time.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    prepare_environment(config)
    machine = choose_machine(config)
    import torch

    torch.set_num_threads(machine.threads)
    give_freed_memory_back()
    return machine


def load_api_keys(serve: Serve) -> list[str]:
    """Collect the keys from the environment and from the key file.

    Raises: UserError when a key is too short to be one, or when others can read the file.
    """
    lines = _keys_of_environment("SERVE_API_KEYS")
    if serve.api_keys_file:
        path = Path(serve.api_keys_file)
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            lines += path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"serve.api_keys_file: {path}: {error.strerror}. Correct the path.") from None
        if os.name == "nt":  # whose permission bits say nothing about other users
            log.warning(
                "serve.api_keys_file: on Windows who may read %s is not checked; keep it in your user folder", path
            )
        elif mode & 0o077:
            raise UserError(f"serve.api_keys_file: {path}: others can read it (mode {mode:o}). Run `chmod 600 {path}`.")
    return _checked_keys(lines, "SERVE_API_KEYS / serve.api_keys_file")


def load_admin_keys() -> list[str]:
    """Return the keys that may add and remove adapters; without one nobody may.

    Raises: UserError when a key is too short to be one.
    """
    return _checked_keys(_keys_of_environment("SERVE_ADMIN_KEYS"), "SERVE_ADMIN_KEYS")


def _keys_of_environment(name: str) -> list[str]:
    return os.environ[name].split(",") if name in os.environ else []


def _checked_keys(lines: list[str], where: str) -> list[str]:
    keys = [line.strip() for line in lines if line.strip()]
    if lines and not keys:
        raise UserError(f"{where}: found no key in it. Remove it, or put a key into it.")
    if short := [key for key in keys if len(key) < 8 or not key.isascii() or key.split() != [key]]:
        raise UserError(
            f"{where}: {len(short)} keys are not ASCII, hold white space, or are shorter than 8 characters."
        )
    return keys
