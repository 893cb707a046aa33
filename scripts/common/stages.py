"""The training stages: the one table that says how they differ, for everybody who handles more than one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from scripts.common.schema import Config

RecordKind = Literal["conversations", "preferences", "feedback"]


@dataclass(frozen=True)
class TrainingStage:
    """One way to train an adapter.

    Its name is also its section of the configuration, its stage in manifests and its name at the server.
    """

    name: str
    title: str
    script: str  # python -m …
    records: RecordKind  # what it trains on, as PARSERS of dataset/records.py reads it
    trl_config: str  # the class of TRL whose fields `<name>.trainer` takes
    continues: str | None  # the stage whose adapter it starts from; its reference model is a frozen copy of that one


SFT = TrainingStage("sft", "SFT", "scripts.train_sft", "conversations", "SFTConfig", continues=None)
DPO = TrainingStage("dpo", "DPO", "scripts.train_dpo", "preferences", "DPOConfig", continues="sft")

KTO = TrainingStage("kto", "KTO", "scripts.train_kto", "feedback", "KTOConfig", continues="sft")

TRAINING_STAGES = {stage.name: stage for stage in (SFT, DPO, KTO)}  # in the order in which they are run
ADAPTER_STAGES = tuple(TRAINING_STAGES)  # manifests of adapters
COMPARE = "eval.compare"  # the command that measures what they made
BASE = "base"  # the model without an adapter, beside those that are named after their stage
MODEL_STAGES = (*ADAPTER_STAGES, "merged")  # manifests of folders that can be served and evaluated


def planned_stages(values: Config) -> list[TrainingStage]:
    """Return the stages for which a configuration names data."""
    return [stage for name, stage in TRAINING_STAGES.items() if getattr(values, name).dataset_path is not None]
