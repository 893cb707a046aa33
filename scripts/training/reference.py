"""What DPO and KTO share: a policy that trains against a frozen reference model, and the proofs at step 0 and at the end."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from tqdm import tqdm

from scripts.common.distributed import all_gather, all_reduce_sum, equal_batches, is_main_process, world_size
from scripts.common.errors import UserError
from scripts.common.machine import Machine
from scripts.common.run import Run
from scripts.model.adapter import adapter_kept, add_lora, load_adapter, save_initialisation, whole_weights
from scripts.model.base import load_base
from scripts.training.batching import GroupedByLength
from scripts.training.dropout import switch_off_dropout
from scripts.training.reference_logps import LOGPS_ARGUMENTS, LOGPS_FOLDER, KeptLogps, Logps
from scripts.training.start import Start

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.05}
# By which the logps of one token differ between batches of other shapes; over many tokens such differences cancel in part.
ROUNDING_PER_TOKEN = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.25}


def load_policy(run: Run, machine: Machine, start: Start) -> Any:
    """Load the base with the adapter that trains; the reference will share the base's weights."""
    values, init_from = run.values, getattr(run.values, run.stage).init_from
    base = load_base(start.base_folder, values, machine)
    if init_from is None:
        policy = add_lora(base, values.lora, values.base_model_id)
        save_initialisation(policy, run.run_dir)
        policy.peft_config["default"].init_lora_weights = True  # TRL's copy must not move a part of the base again
        return policy
    # TRL expects the name "default", and trains nothing unless the adapter is loaded as trainable.
    policy = load_adapter(base, init_from, trainable=True, name="default")
    if not any(bool(value.any()) for name, value in policy.named_parameters() if "lora_B" in name):
        raise UserError(f"{init_from}: its adapter is untrained (all B matrices are zero). Run train_sft first.")
    return policy


def choose_reference(
    run: Run, machine: Machine, start: Start, policy: Any, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a trainer needs to know of its reference: whether that is the bare base, and where its logps are kept."""
    values, section = run.values, getattr(run.values, run.stage)
    moved_by = values.lora.init if section.init_from is None and values.lora.init in ("pissa", "olora") else None
    # These move a part of the base into the adapter: only together with the starting adapter is what stays the base.
    base_is_reference = section.reference == "base" and not moved_by
    adapter = policy.peft_config["default"]
    basis = {
        "base": start.fingerprint, "quantization": values.quantization.model_dump(), "device": machine.device,
        "dtype": str(machine.dtype), "fast_path": values.performance.fast_path, "moved_by": moved_by,
        "adapter": not base_is_reference and [adapter.lora_alpha, adapter.use_rslora, adapter.use_dora],
        "arguments": {name: arguments[name] for name in LOGPS_ARGUMENTS if name in arguments},
    }  # fmt: skip
    kept_logps = KeptLogps(Path(section.output_dir).parent / LOGPS_FOLDER, basis)
    return {"base_is_reference": base_is_reference, "kept_logps": kept_logps}


class Starting(NamedTuple):
    """What a trainer's own loss says of one row at step 0."""

    reward: float  # implicit; DPO's is the margin of the pair
    loss: float


class Evaluated(NamedTuple):
    """What one batch of the validation side gave."""

    batch: Mapping[str, Any]  # this rank's part of it
    rows: int  # over all ranks
    numbers: Mapping[str, float]  # over all ranks


class FrozenReference(GroupedByLength):
    """Give a trainer of TRL our token ids and an explicit reference model, whose logps are asked once and kept.

    It stands before TRL's class, whose methods it calls.
    """

    reference_columns: ClassVar[tuple[str, str]]  # of the two logps of each row, as TRL names them
    reward_name: ClassVar[str]
    loss_at_start: ClassVar[tuple[str, float]]  # where policy and reference are the same model
    stage: ClassVar[str]
    remedy: ClassVar[str]  # against answers that degenerate
    sped_up = real_tokens_only = False
    add_callback: Any
    args: Any
    beta: float
    control: Any
    data_collator: Any
    model: Any
    processing_class: Any

    def __init__(
        self,
        *args: Any,
        group_by_length: bool,
        base_is_reference: bool,
        kept_logps: KeptLogps,
        fast_path: bool,
        **kwargs: Any,
    ) -> None:
        """Take, beside TRL's arguments, whether the reference is the bare base instead of a copy of the starting adapter."""
        self.group_by_length, self.base_is_reference, self.fast_path = group_by_length, base_is_reference, fast_path
        self.kept_logps = kept_logps
        with adapter_kept(kwargs["model"]):
            super().__init__(*args, **kwargs)
        if self.args.disable_dropout:
            switch_off_dropout(self.model)
        self._choose_reference()
        self.precompute_ref_logps = True  # TRL's loss reads columns in any case; `with_reference` adds what they lack

    def starting(self, row: dict[str, Any]) -> Starting:
        """Compute reward and loss of one row without a gradient; the model is in evaluation mode."""
        raise NotImplementedError

    def means(self, batches: Sequence[Evaluated]) -> dict[str, float]:
        """Return the means over all rows of the validation side; TRL averages batches of unequal size."""
        raise NotImplementedError

    def _longest_first(self, rows: Any) -> list[int]:
        """Return row numbers so that rows pad each other little and too little memory shows at once."""
        lengths = [self.row_length(row) for row in rows]
        return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)

    def with_reference(self, inputs: Any) -> Any:
        """Return a batch with the reference's logps, asking the reference where they were not computed beforehand."""
        if self.reference_columns[0] in inputs:
            return inputs
        logps = self.compute_ref_log_probs(self.model, inputs)
        return {**inputs, **dict(zip(self.reference_columns, logps, strict=True))}

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """Return the reference's two logps of each row, in evaluation mode: nothing about a reference is left to chance."""
        training = model.training
        model.eval()
        logps = super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]
        model.train(training)
        return logps

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # the ids are ours already

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        # TRL's own hands the numbers over in a temporary folder that only one process knows.
        self._choose_reference()
        ids = [column for column in dataset.column_names if column.endswith("_ids")]
        rows = [[row[column] for column in ids] for row in dataset]
        logps = self.kept_logps.of(
            self.reference_weights(), rows, lambda: self._ask_reference(dataset, name, batch_size)
        )
        for side, column in enumerate(self.reference_columns):
            dataset = dataset.add_column(column, [row[side] for row in logps])
        return dataset

    def _ask_reference(self, dataset: Any, name: str, batch_size: int) -> Logps:
        self.model.eval()
        found: list[tuple[int, float, float]] = []
        rounds = list(equal_batches(self._longest_first(dataset), batch_size))
        for indices, _ in tqdm(rounds, f"reference, {name} rows", disable=not is_main_process()):
            batch = self._prepare_inputs(self.data_collator([dataset[index] for index in indices]))  # type: ignore[attr-defined]
            one, other = self.compute_ref_log_probs(self.model, batch)
            found += zip(indices, one.tolist(), other.tolist(), strict=True)
        logps = {index: (one, other) for index, one, other in all_gather(found)}
        return [logps[index] for index in range(len(dataset))]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return loss and metrics over the whole validation side."""
        trainer: Any = self
        rows, batches = trainer.eval_dataset, []
        self.model.eval()
        for indices, count in equal_batches(self._longest_first(rows), self.args.eval_batch_size):
            trainer._metrics["eval"].clear()
            batch = self.data_collator([rows[index] for index in indices])
            loss = float(trainer.prediction_step(self.model, batch, prediction_loss_only=True)[0])
            (loss,) = all_reduce_sum([loss / world_size()])
            numbers = {name: value[-1] for name, value in trainer._metrics["eval"].items()}
            batches.append(Evaluated(batch, count, {"loss": loss, **numbers}))
        trainer._metrics["eval"].clear()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.means(batches).items()}
        trainer.log(metrics)
        self.control = trainer.callback_handler.on_evaluate(self.args, trainer.state, self.control, metrics)
        return metrics

    def _choose_reference(self) -> None:
        # TRL copies the starting adapter to "ref"; without the copy its reference is the base.
        if self.base_is_reference and "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")
        if self.fast_path and not self.sped_up:  # before the reference is first asked: both must compute alike
            from scripts.speed.speed_up import speed_up, stand_in_of

            speed_up(self.model, keep_weights=False)  # rows with answers of two kinds are long
            self.sped_up, self.real_tokens_only = True, stand_in_of(self.model) is not None

    @property
    def reference_adapter(self) -> str | None:
        """Name the adapter of the reference model; None is the bare base."""
        return "ref" if "ref" in self.model.peft_config else None

    def reference_weights(self) -> dict[str, torch.Tensor]:
        """Copy the reference adapter, to prove later that it never moved."""
        return whole_weights(self.model, "ref")


def prove_start(trainer: Any) -> dict[str, float]:
    """Prove that policy and reference are what the run says, on the numbers that training computes, dropout off.

    Where the reference is a copy of the starting policy, every reward must be 0 and the loss what it is there. Logps of the
    reference that were computed beforehand must be those it gives now.
    Raises: UserError when they differ.
    """
    sides = [side for side in (trainer.train_dataset, trainer.eval_dataset) if side]
    rows = [
        side[index] for side in sides for index in sorted({0, len(side) - 1})
    ]  # of a sorted side the shortest and the longest
    used = start_of(trainer, rows)
    asked_now = used
    if trainer.reference_columns[0] in rows[0]:
        bare = [{name: row[name] for name in row if name not in trainer.reference_columns} for row in rows]
        asked_now = start_of(trainer, bare)
    name, (loss_in_words, wanted) = trainer.reward_name, trainer.loss_at_start
    reward, loss = _largest_and_mean(asked_now)
    tolerance = TOLERANCE[trainer.model.get_base_model().dtype]
    if not math.isfinite(reward + loss):
        raise UserError(
            f"step 0: policy or reference gives no finite probabilities (largest {name} {reward}, loss {loss}), as when weights "
            f"are far too large. Train the adapter of {trainer.stage}.init_from again, or choose another base model. Nothing "
            "was trained."
        )
    if trainer.base_is_reference and trainer.reference_adapter is None:
        log.info("step 0: the reference is the base; the policy's largest %s against it is %.4f", name, reward)
    elif reward > tolerance or abs(loss - wanted) > tolerance:
        raise UserError(
            f"step 0: policy and reference should be the same model, but their largest {name} is {reward:.6f} and the loss "
            f"{loss:.6f} (wanted 0 and {loss_in_words} = {wanted:.6f}, within {tolerance}). Nothing was trained."
        )
    else:
        log.info(
            "step 0: reference equals the starting policy (largest %s %.2g, loss %.6f = %s)", name, reward, loss, loss_in_words
        )  # fmt: skip
    check_columns(trainer, rows, used, asked_now)
    reward, loss = _largest_and_mean(used)
    return {f"step0_{name}": reward, "step0_loss": loss}


def check_columns(
    trainer: Any, rows: Sequence[dict[str, Any]], used: Sequence[Starting], asked_now: Sequence[Starting]
) -> None:
    """Prove that rewards from logps computed beforehand are those of a reference that is asked now, but for rounding."""
    base = trainer.model.get_base_model()
    # An 8-bit base rounds the activations of a batch together.
    rounding = ROUNDING_PER_TOKEN[torch.bfloat16 if getattr(base, "hf_quantizer", None) else base.dtype]
    for row, one, other in zip(rows, used, asked_now, strict=True):
        tokens = sum(len(ids) for name, ids in row.items() if name.endswith("_ids") and name != "prompt_ids")
        if not abs(one.reward - other.reward) <= trainer.beta * rounding * tokens**0.5:
            raise UserError(
                f"step 0: the logps of the reference that training would use are not those it gives now: a {trainer.reward_name} "
                f"of {one.reward:.6f} instead of {other.reward:.6f}. Remove the folder {trainer.kept_logps.folder} and start "
                "again. Nothing was trained."
            )


def start_of(trainer: Any, rows: Sequence[dict[str, Any]]) -> list[Starting]:
    """Return reward and loss of each row out of the very loss that trains, dropout off."""
    model, metrics = trainer.model, trainer._metrics["eval"]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        found = [trainer.starting(row) for row in rows]
    metrics.clear()
    model.train(was_training)
    return found


def _largest_and_mean(found: Sequence[Starting]) -> tuple[float, float]:
    rewards, losses = (torch.tensor(numbers) for numbers in zip(*found, strict=True))
    return float(rewards.abs().max()), float(losses.mean())


def check_trainable_names(model: Any) -> None:
    """Prove that exactly the policy's adapter trains."""
    wrong = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and ".default." not in name
    ]
    if wrong:
        raise UserError(
            f"{len(wrong)} weights outside the policy's adapter would train, the first is {wrong[0]}. Nothing was trained."
        )


@contextmanager
def reference_unchanged(trainer: FrozenReference) -> Iterator[None]:
    """Prove that the reference model is after training what it was before."""
    before = trainer.reference_weights()
    yield
    moved = [
        name
        for name, value in trainer.reference_weights().items()  # DeepSpeed keeps it in bf16
        if not torch.equal(value, before[name]) and not torch.equal(value, before[name].bfloat16().float())
    ]
    if moved:
        raise UserError(
            f"the reference model changed during training ({moved[0]} and {len(moved) - 1} more); the result is void."
        )
