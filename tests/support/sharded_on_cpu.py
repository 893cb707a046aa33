"""Run a stage under FSDP2 on CPU processes, which accelerate shards over GPUs only; started by tests/common/test_distributed.py."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

if not __package__:  # the repository root in place of this folder, which has a numbers.py of its own
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import accelerate.state
import torch

from scripts.training import start

ENVIRONMENT = {  # what `accelerate launch --config_file configs/accelerate/fsdp2.yaml` hands over
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}

if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    torch.distributed.init_process_group("gloo")
    state = accelerate.state.PartialState
    state._prepare_backend = lambda *arguments: ("gloo", accelerate.state.DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    state.set_device = lambda self: setattr(self, "device", torch.device("cpu"))  # type: ignore[method-assign]
    start.check_launch = lambda *arguments: None  # it refuses this combination
    code = importlib.import_module(f"scripts.{sys.argv[1]}").main(sys.argv[2:])
    assert accelerate.state.AcceleratorState().distributed_type == "FSDP", "the run was not sharded"
    sys.exit(code)
