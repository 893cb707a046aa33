"""What the training benchmark found, as Markdown tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.benchmarks.training_growth import draw_growth, growth_table
from scripts.common.config import ROOT
from scripts.common.errors import UserError

README = ROOT / "eval" / "benchmarks" / "README.md"
START, END = "<!-- training: generated -->", "<!-- end of training -->"
UNITS = {"sft": "samples", "dpo": "pairs"}


def pasted(path: Path, table: str) -> str:
    """Return a file's text with the tables between its markers."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    head, start, rest = text.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end:
        raise UserError(f"--paste {path}: found no lines `{START}` and `{END}`, between which the tables go. Add them.")
    return f"{head}{START}\n{table}\n{END}{tail}"


def tables(found: dict[str, Any]) -> list[str]:
    """Render every part that was measured."""
    lines: list[str] = []
    if speed := found.get("speed"):
        lines += [
            *_about(speed, f"of {speed['model']}; its matrix product reaches {speed['matrix_tflops']:.2f} TFLOP/s."),
            f"Each peer ran beside this project for {speed['steps']} steps, in turns of a step; the first quarter is warm-up. Medians of "
            f"{speed['rounds']} {'round' if speed['rounds'] == 1 else 'rounds with different seeds'}.",
        ]
        for stage in ("sft", "dpo"):
            if stage in speed:
                lines += ["", *_speed_table(stage, speed[stage])]
    if growth := found.get("growth"):
        lines += ["", *_about(growth, "of Llama shapes with random weights."), "", *growth_table(growth["axes"])]
    if quality := found.get("quality"):
        lines += ["", *_about(quality, f"of {quality['model']}."), "", *_quality_table(quality)]
    return lines[1:] if lines and not lines[0] else lines


def _about(part: dict[str, Any], what: str) -> list[str]:
    return [f"Measured on {part['hardware']}, {part['date']}: LoRA r 16 on all linear layers {what}"]


def _number(value: float | None, pattern: str) -> str:
    return "–" if value is None else pattern.format(value)


def _speed_table(stage: str, part: dict[str, Any]) -> list[str]:
    unit = UNITS[stage]
    rows = [
        f"| {stage.upper()}, batch {part['batch']} | {unit}/s | tokens/s | of the limit | start, warm-up | 1,000 {unit}, all in "
        "| peak memory | held-out loss | times as fast |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for pair in part["pairs"]:
        for system in pair:
            own, other = system.get("tokens_per_second"), pair[-1].get("tokens_per_second")
            cells = [
                f"{system['system']} beside {pair[-1]['system']}" if system is not pair[-1] else system["system"],
                _number(system.get("samples_per_second"), "{:.2f}"),
                _number(own, "{:.0f}"),
                _number(system.get("limit_share"), "{:.0%}"),
                _number(system.get("start_seconds"), "{:.0f} s"),
                _number(system.get("minutes_for_1000"), "{:.1f} min"),
                _number(system["peak_memory_gib"], "{:.1f} GiB"),
                ", ".join(f"{loss:.3f}" for loss in system["losses"]) or "–",
                f"{own / other:.1f} ×" if own and other and system is not pair[-1] else "–",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return [
        *rows,
        "",
        f"Tokens are real ones, without padding. The losses are those of {part['held_out']} held-out {unit} after training on the same "
        f"{part['samples']} ({part['loss_before']:.3f} before), one per round.",
    ]


def _quality_table(part: dict[str, Any]) -> list[str]:
    rows = [
        f"| {Path(part['data']).parent.name}: exact match of {part['level']:.0%} | reached after | best seen |",
        "|---|---|---|",
    ]
    for system in part["systems"]:
        after = (
            f"{system['seconds']:.0f} s" if system["seconds"] else f"not within {part['minutes']:.0f} min or one epoch"
        )
        best = max((point["exact_match"] for point in system["course"]), default=None)
        rows.append(f"| {system['system']} | {after} | {_number(best, '{:.1%}')} |")
    return [
        *rows,
        "",
        f"Wall-clock from the command on; every {part['save_steps']} steps a checkpoint is scored on {part['held_out']} held-out "
        "records while the clock and the training stand still.",
    ]


def write_pictures(found: dict[str, Any], out: Path) -> None:
    """Draw speed as bars and growth as curves."""
    if growth := found.get("growth"):
        draw_growth(growth["axes"], out / "growth.png")
    if speed := found.get("speed"):
        _draw_speed({stage: speed[stage]["pairs"] for stage in UNITS if stage in speed}, out / "speed.png")


def _draw_speed(stages: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(stages), figsize=(6 * len(stages), 2.8), squeeze=False, layout="constrained")
    for axis, (stage, pairs) in zip(axes[0], stages.items(), strict=True):
        systems = [system for pair in reversed(pairs) for system in reversed(pair)]
        speeds = [system.get("tokens_per_second") or 0 for system in systems]
        bars = axis.barh(range(len(systems)), speeds, tick_label=[system["system"] for system in systems])
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.margins(x=0.12)
        axis.set(title=stage.upper(), xlabel="real tokens per second")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
