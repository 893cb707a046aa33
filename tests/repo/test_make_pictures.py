"""The pictures of the READMEs are made by one command, and are small enough to be kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from scripts import make_pictures
from tests.conftest import ROOT
from tests.support.serving import save_adapter

LARGEST = 300_000  # bytes, of all together


def test_a_missing_report_names_the_command_that_makes_it(write_config, tmp_path, capsys) -> None:
    config = write_config(eval={"output_dir": str(tmp_path / "none")})
    assert make_pictures.main(["--config", str(config)]) == 2
    assert "holds no report.html. Run `make demo` first." in capsys.readouterr().err


@pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs Debian's chromium and chromium-driver",
)
def test_report_and_playground_are_kept_in_every_width_and_scheme(write_config, tiny_llama: Path, tmp_path) -> None:
    comparison = tmp_path / "comparison"
    comparison.mkdir()
    (comparison / "report.html").write_text(
        "<style>@media (prefers-color-scheme: dark) { html { background: black; } }</style><h1>Report</h1>"
    )
    rows = [{"prompt": "Hello, who is there?", "source": "a:1"}, {"prompt": "Hello", "source": "a:2"}]
    (comparison / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    serve = {"adapter_path": str(save_adapter(tmp_path / "sft", tiny_llama)), "default_max_new_tokens": 4}
    config = write_config(base_model_id=str(tiny_llama), performance={"threads": 1, "dtype": "fp32"}, serve=serve)

    flags = ["--config", str(config), "--set", f"eval.output_dir={comparison}", "--all", str(tmp_path / "pictures")]
    assert make_pictures.main(flags) == 0

    made = {path.stem: Image.open(path) for path in (tmp_path / "pictures").iterdir()}
    assert {name: picture.width for name, picture in made.items()} == {
        f"{page}-{width}-{scheme}": width
        for page in ("report", "playground")
        for width in (1280, 390)
        for scheme in ("light", "dark")
    }
    light, dark = (made[f"report-1280-{scheme}"].convert("L").getpixel((640, 800)) for scheme in ("light", "dark"))
    assert light > 200 > 60 > dark


def test_pictures_of_the_readme_are_there_and_small() -> None:
    files = [ROOT / make_pictures.REPORT, ROOT / make_pictures.PLAYGROUND]
    assert sum(file.stat().st_size for file in files) <= LARGEST
