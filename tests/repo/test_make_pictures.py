"""The pictures of the READMEs are made by one command, and are small enough to be kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from scripts import make_pictures
from tests.conftest import ROOT
from tests.support.browser import needs_browser
from tests.support.serving import save_adapter

LARGEST = 300_000  # bytes, of all together


def test_a_missing_report_names_the_command_that_makes_it(write_config, tmp_path, capsys) -> None:
    config = write_config(eval={"output_dir": str(tmp_path / "none")})
    assert make_pictures.main(["--config", str(config)]) == 2
    assert "holds no report.html. Run `make demo` first." in capsys.readouterr().err


def flags_for(write_config, tiny_llama: Path, folder: Path, report: str, prompt: str, **serve: object) -> list[str]:
    """Write a report, a sample and a configuration; return the arguments that make every picture of them."""
    comparison = folder / "comparison"
    comparison.mkdir()
    (comparison / "report.html").write_text(report)
    rows = [{"prompt": f"{prompt}, who is there?", "source": "a:1"}, {"prompt": prompt, "source": "a:2"}]
    (comparison / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    serve = {"adapter_path": str(save_adapter(folder / "sft", tiny_llama)), "default_max_new_tokens": 4, **serve}
    config = write_config(base_model_id=str(tiny_llama), performance={"threads": 1, "dtype": "fp32"}, serve=serve)
    return ["--config", str(config), "--set", f"eval.output_dir={comparison}", "--all", str(folder / "pictures")]


@needs_browser
def test_report_and_playground_are_kept_in_every_width_and_scheme(write_config, tiny_llama: Path, tmp_path) -> None:
    report = "<style>@media (prefers-color-scheme: dark) { html { background: black; } }</style><h1>Report</h1>"

    assert make_pictures.main(flags_for(write_config, tiny_llama, tmp_path, report, "Hello")) == 0

    made = {path.stem: Image.open(path) for path in (tmp_path / "pictures").iterdir()}
    assert {name: picture.width for name, picture in made.items()} == {
        f"{page}-{width}-{scheme}": width
        for page in ("report", "playground")
        for width in (1280, 390)
        for scheme in ("light", "dark")
    }
    light, dark = (made[f"report-1280-{scheme}"].convert("L").getpixel((640, 800)) for scheme in ("light", "dark"))
    assert light > 200 > 60 > dark


@needs_browser
def test_a_model_that_does_not_answer_is_named_and_no_picture_shows_its_error(
    write_config, tiny_llama: Path, tmp_path, capsys
) -> None:
    flags = flags_for(write_config, tiny_llama, tmp_path, "<h1>Report</h1>", "word " * 60, max_context_tokens=32)

    assert make_pictures.main(flags) == 2

    said = capsys.readouterr().err
    assert "the playground has no answer from\n  base: " in said
    assert "\n  sft: " in said
    assert not list((tmp_path / "pictures").glob("playground*"))


@needs_browser
@pytest.mark.slow
def test_a_server_that_wants_a_key_is_said(write_config, tiny_llama: Path, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("SERVE_API_KEYS", "a-key-that-is-long-enough-for-a-server")

    assert make_pictures.main(flags_for(write_config, tiny_llama, tmp_path, "<h1>Report</h1>", "Hello")) == 2

    said = capsys.readouterr().err
    assert "the playground shows no model; it says: " in said
    assert "API key" in said


def test_pictures_of_the_readme_are_there_and_small() -> None:
    files = [ROOT / make_pictures.REPORT, ROOT / make_pictures.PLAYGROUND]
    assert sum(file.stat().st_size for file in files) <= LARGEST
