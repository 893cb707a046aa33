"""What the training benchmark found, as Markdown tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.benchmarks.training_growth import draw_growth, growth_table
from scripts.common.errors import UserError
from scripts.common.paths import ROOT

README = ROOT / "eval" / "benchmarks" / "README.md"
UNITS = {"sft": "samples", "dpo": "pairs"}


def markers(kind: str) -> tuple[str, str]:
    """Return the lines between which the tables of one kind of processor stand."""
    return f"<!-- training, {kind}: generated -->", f"<!-- end of training, {kind} -->"


def pasted(path: Path, table: str, first: str, last: str) -> str:
    """Return a file's text with the tables between its markers."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    head, start, rest = text.partition(first)
    _, end, tail = rest.partition(last)
    if not start or not end:
        raise UserError(
            f"--paste {path}: found no lines `{first}` and `{last}`, between which the tables go. Add them."
        )
    return f"{head}{first}\n{table}\n{last}{tail}"


def tables(found: dict[str, Any]) -> list[str]:
    """Render every part that was measured."""
    lines: list[str] = []
    if speed := found.get("speed"):
        lines += dict.fromkeys(line for pair in speed.values() for line in _about(pair, f"of {pair['model']}."))
        lines.append(
            "Each peer ran beside this project, in turns of a step; the first quarter of the steps is warm-up. Medians of all rounds, each with its own seed."
        )
        for stage in UNITS:
            if pairs := [pair for pair in speed.values() if pair["stage"] == stage]:
                lines += ["", *_speed_table(stage, pairs)]
    if growth := found.get("growth"):
        lines += ["", *_about(growth, "of Llama shapes with random weights."), "", *growth_table(growth["axes"])]
    if quality := found.get("quality"):
        lines += ["", *_about(quality, f"of {quality['model']}."), "", *_quality_table(quality)]
    return lines[1:] if lines and not lines[0] else lines


def _about(part: dict[str, Any], what: str) -> list[str]:
    return [f"Measured on {part['hardware']}, {part['date']}: LoRA r 16 on all linear layers {what}"]


def _number(value: float | None, pattern: str) -> str:
    return "–" if value is None else pattern.format(value)


def _speed_table(stage: str, pairs: list[dict[str, Any]]) -> list[str]:
    unit = UNITS[stage]
    rows = [
        f"| {stage.upper()}, batch {pairs[0]['batch']} | {unit}/s | tokens/s | of the limit | start, warm-up | 1,000 {unit}, all in "
        "| peak memory | held-out loss | times as fast |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for pair in pairs:
        *_, last = pair["systems"]
        for system in pair["systems"]:
            own, other = system.get("tokens_per_second"), last.get("tokens_per_second")
            cells = [
                system["system"] if system is last else f"{system['system']}, beside {last['system']}",
                _number(system.get("samples_per_second"), "{:.2f}"),
                _number(own, "{:.0f}"),
                _number(system.get("limit_share"), "{:.0%}"),
                _number(system.get("start_seconds"), "{:.0f} s"),
                _number(system.get("minutes_for_1000"), "{:.1f} min"),
                _number(system["peak_memory_gib"], "{:.1f} GiB"),
                ", ".join(f"{loss:.3f}" for loss in system["losses"]) or "–",
                f"{own / other:.1f} ×" if own and other and system is not last else "–",
            ]
            rows.append(f"| {' | '.join(cells)} |")
        notes.append(
            f"Beside {last['system']}: {pair['steps']} steps, {pair['samples']} {unit}, {pair['rounds']} round(s); the matrix product "
            f"reached {pair['matrix_tflops']:.2f} TFLOP/s; losses on {pair['held_out']} held-out {unit}, {pair['loss_before']:.3f} before."
        )
    return [*rows, "", *notes, "Tokens are real ones, without padding."]


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
        _draw_speed(list(speed.values()), out / "speed.png")


def _draw_speed(pairs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = [stage for stage in UNITS if any(pair["stage"] == stage for pair in pairs)]
    figure, axes = pyplot.subplots(1, len(stages), figsize=(6 * len(stages), 2.8), squeeze=False, layout="constrained")
    for axis, stage in zip(axes[0], stages, strict=True):
        systems = [system for pair in pairs if pair["stage"] == stage for system in pair["systems"]][::-1]
        speeds = [system.get("tokens_per_second") or 0 for system in systems]
        bars = axis.barh(range(len(systems)), speeds, tick_label=[system["system"] for system in systems])
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.margins(x=0.12)
        axis.set(title=stage.upper(), xlabel="real tokens per second")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
