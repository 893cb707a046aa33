"""Run a stage under FSDP2 on CPU processes, which accelerate shards over GPUs only; started by test_processes."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import accelerate.state
import torch

from scripts.common import stage

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
    stage.check_launch = lambda *arguments: None  # it refuses this combination
    code = importlib.import_module(f"scripts.{sys.argv[1]}").main(sys.argv[2:])
    assert accelerate.state.AcceleratorState().distributed_type == "FSDP", "the run was not sharded"
    sys.exit(code)
