"""The de-identification command: what it writes, what it refuses, and that it never leaves half an output."""

from __future__ import annotations

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from scripts.common.artifacts import sha256_file
from scripts.common.deid_report import check_deid_report, report_path
from scripts.common.errors import UserError
from scripts.common.schema import Deid
from tests.conftest import ROOT, run_python, write_jsonl
from tests.dataset.test_columns import workbook

pytest.importorskip("presidio_analyzer", reason="needs requirements.extra.txt")

from scripts.deid.report import Report, render_html
from scripts.deid_presidio import main, worker_count

PLUMBING = ["--profile", "secrets-only"]  # the quick profile, where names do not matter
SECRET = "password: hunter2x"


@pytest.fixture
def scrub(tmp_path):
    """Return a function that runs the command on a file and gives its exit code and output path."""

    def run(source, *flags, out="out"):
        target = tmp_path / (out + source.suffix)
        return main(["--in", str(source), "--out", str(target), "--set", "deid.rampart=off", *map(str, flags)]), target

    return run


def read_report(out):
    return json.loads(report_path(out).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def sample_run(tmp_path_factory):
    """Scrub the sample with invented personal data once, with a measurement."""
    folder = tmp_path_factory.mktemp("deid")
    gold = write_jsonl(
        folder / "gold.jsonl",
        [
            {"text": "I am Maria Gonzalez", "spans": [{"start": 5, "end": 19, "label": "PERSON"}]},
            {"text": "fine", "spans": []},
        ],
    )
    out = folder / "sample.deid.jsonl"
    source = ROOT / "data/sft/sample_pii.jsonl"
    code = main(["--in", str(source), "--out", str(out), "--evaluate", str(gold), "--set", "deid.rampart=off"])
    return code, source, out


def test_the_sample_loses_its_people_and_keeps_its_shape(sample_run):
    code, source, out = sample_run
    before = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    after = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert code == 0
    assert [row["id"] for row in after] == [row["id"] for row in before]
    assert [list(row) for row in after] == [list(row) for row in before]
    text = out.read_text(encoding="utf-8")
    for value in (
        "Featherstone",
        "Quillfeather",
        "Pennywhistle",
        "Ottoline",
        "Leopold",
        "Araminta",
        "4111",
        "536904399",
        "62704",
    ):
        assert value not in text
    assert after[-1] == before[-1]


def test_the_report_accounts_for_every_record_and_holds_no_personal_data(sample_run):
    _, source, out = sample_run
    report = read_report(out)
    counts = report["counts"]
    assert counts["input"] == counts["output"] + counts["quarantined"] == 8
    assert report["input"]["sha256"] == sha256_file(source)
    assert report["output"]["sha256"] == sha256_file(out)
    assert report["entities"]["PERSON"] >= 9
    assert len(report["hipaa"]) == 18
    assert report["evaluation"]["recall"] == {"hits": 1, "total": 1, "share": 1.0, "wilson95": [0.2065, 1.0]}
    page = report_path(out).with_suffix(".html").read_text(encoding="utf-8")
    for text in (json.dumps(report), page):
        assert "Featherstone" not in text
        assert "536" not in text.replace(report["input"]["sha256"], "").split('"git"')[0].split("sha256")[0]


REPORT_KEYS = [
    "schema", "created", "input", "output", "counts", "entities", "operators", "fields", "scores", "recognizers", "config",
    "hipaa", "residual_scan", "evaluation", "limits", "timing", "git",
]  # fmt: skip


def test_the_keys_of_the_report_stay_and_its_page_shows_text_as_text(sample_run):
    _, _, out = sample_run
    content = read_report(out)
    assert list(content) == REPORT_KEYS
    assert list(content["counts"]) == ["input", "output", "quarantined", "reasons"]
    assert list(content["timing"]) == ["seconds", "workers", "peak_memory_gib", "characters", "characters_per_second"]
    content["input"]["name"] = "<script>alert(1)</script>"
    content["counts"]["reasons"] = {"a & b": 1}
    page = render_html(Report.model_validate(content))
    assert "<script>" not in page
    assert "<td>&lt;script&gt;alert(1)&lt;/script&gt;</td>" in page
    assert "<td>a &amp; b</td>" in page


def test_a_page_without_findings_or_measurement_says_so(sample_run):
    _, _, out = sample_run
    page = render_html(Report.model_validate(read_report(out) | {"entities": {}, "evaluation": None}))
    assert "0 findings replaced" in page
    assert page.count("<p>None.</p>") == 2
    assert "Not measured in this run; see --evaluate." in page


def test_training_is_bound_to_the_report(sample_run, tmp_path):
    _, source, out = sample_run
    assert check_deid_report(out, sha256_file(out))["counts"]["output"] == 8
    with pytest.raises(UserError, match="no such report"):
        check_deid_report(source, sha256_file(source))
    with pytest.raises(UserError, match="changed after it was scrubbed"):
        check_deid_report(source, sha256_file(source), report_path(out))
    broken = tmp_path / "broken.json"
    broken.write_text("[]")
    with pytest.raises(UserError, match="not a de-identification report"):
        check_deid_report(out, sha256_file(out), broken)


def test_any_number_of_workers_writes_the_same_bytes(scrub, tmp_path):
    rows = [json.loads(line) for line in (ROOT / "data/sft/sample_pii.jsonl").read_text(encoding="utf-8").splitlines()]
    source = write_jsonl(
        tmp_path / "many.jsonl", [{**row, "id": f"{n}-{row['id']}"} for n in range(40) for row in rows]
    )
    one, first = scrub(source, "--workers", 1, "--operator", "surrogate", out="one")
    two, second = scrub(source, "--workers", 2, "--operator", "surrogate", out="two")
    assert (one, two) == (0, 0)
    assert first.read_bytes() == second.read_bytes()


def test_as_many_processes_work_as_asked_for(tmp_path):
    source = write_jsonl(tmp_path / "small.jsonl", [{"text": "fine"}])
    assert [worker_count(Deid(workers=workers), source) for workers in ("auto", 3)] == [1, 3]


def test_records_that_cannot_be_vouched_for_are_held_back_with_place_and_reason(scrub, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(
        b'{"id": "a", "text": "fine"}\n{"id": "b", "text": "\xff"}\nnot json\n{"id": "d", "text": "data:image/png;base64,AAAA"}\n'
    )
    code, out = scrub(source, *PLUMBING)
    assert code == 3
    assert out.read_text() == '{"id": "a", "text": "fine"}\n'
    held = [json.loads(line) for line in (tmp_path / "out.jsonl.quarantine.jsonl").read_text().splitlines()]
    assert [row["record"] for row in held] == ["in.jsonl:2", "in.jsonl:3", "in.jsonl:4"]
    assert all(set(row) == {"record", "reason"} for row in held)
    assert scrub(source, *PLUMBING, "--max-quarantine", 3, "--overwrite")[0] == 0


def test_every_file_format_keeps_its_rows_and_order(scrub, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"id": "1", "text": SECRET, "note": 'a "quoted", cell\nof two lines'},
        {"id": "2", "text": "", "note": "ü\u2028x"},
    ]
    expected = [{**rows[0], "text": "password: <SECRET>"}, rows[1]]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    with (tmp_path / "in.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    assert scrub(tmp_path / "in.json", *PLUMBING)[0] == 0
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == expected
    assert scrub(tmp_path / "in.csv", *PLUMBING)[0] == 0
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == expected
    assert scrub(tmp_path / "in.parquet", *PLUMBING)[0] == 0
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist() == expected
    (tmp_path / "in.txt").write_text(f"one\n\n{SECRET}\u2028two\n", encoding="utf-8")
    assert scrub(tmp_path / "in.txt", *PLUMBING)[0] == 0
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == "one\n\npassword: <SECRET>\u2028two\n"


def test_a_column_of_numbers_that_cannot_hold_a_tag_is_held_back(scrub, tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"password": 12345678, "n": 1}, {"password": None, "n": 2}])
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    code, out = scrub(tmp_path / "in.parquet", *PLUMBING)
    assert code == 3
    assert pyarrow.parquet.read_table(out).to_pylist() == [{"password": None, "n": 2}]


def test_encrypted_records_can_be_restored_with_the_key(scrub, tmp_path, monkeypatch):
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    monkeypatch.setenv("DEID_KEY_FILE", str(key))
    source = write_jsonl(tmp_path / "in.jsonl", [{"messages": [{"role": "user", "content": SECRET}]}])
    code, out = scrub(source, *PLUMBING, "--operator", "encrypt")
    assert code == 0
    assert "hunter2x" not in out.read_text()
    assert main(["--in", str(out), "--out", str(tmp_path / "back.jsonl"), "--decrypt"]) == 0
    assert (tmp_path / "back.jsonl").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--profile", "gdpr"], "deid.profile"),
        (["--operator", "shred"], "deid.operator"),
        (["--fields", "text,body"], "body"),
        (["--set", 'deid.entities=["NAMES"]'], "NAMES"),
        (["--set", "deid.spacy_model=en_core_web_none", "--profile", "default"], "no installed spaCy model"),
        (["--set", "deid.language=fr", "--profile", "default"], "reads en"),
        (["--operator", "hash"], "DEID_KEY_FILE"),
        (["--evaluate", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--workers", "0"], "deid.workers"),
    ],
)
def test_mistakes_are_named_and_leave_no_output(scrub, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.delenv("DEID_KEY_FILE", raising=False)
    source = write_jsonl(tmp_path / "in.jsonl", [{"id": 1, "text": "fine"}])
    code, out = scrub(source, *PLUMBING, *flags)
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert not out.exists()


def test_paths_that_would_lose_something_are_refused(scrub, tmp_path, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "fine"}])
    before = source.read_bytes()
    for target, message in (("in.jsonl", "is the input"), ("other.csv", "wanted `.jsonl`")):
        assert main(["--in", str(source), "--out", str(tmp_path / target), "--overwrite"]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "out.jsonl").write_text("precious")
    assert scrub(source, *PLUMBING)[0] == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "precious"
    assert source.read_bytes() == before
    assert main(["--in", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "x.jsonl")]) == 2
    (tmp_path / "empty.jsonl").write_text("")
    assert scrub(tmp_path / "empty.jsonl", *PLUMBING, "--overwrite")[0] == 2


def test_a_pattern_that_runs_out_of_time_holds_the_record_back(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        "recognizers:\n- name: slow\n  supported_entity: SECRET\n  patterns: [{name: s, regex: '^(?:x|x|xx)+$', score: 0.9}]\n"
    )
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "x" * 60 + "!"}, {"text": "fine"}])
    out = tmp_path / "out.jsonl"
    done = run_python(
        "-m", "scripts.deid_presidio", "--in", source, "--out", out, *PLUMBING, "--set", f"deid.recognizers={own}",
        REGEX_TIMEOUT_SECONDS="1",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert out.read_text() == '{"text": "fine"}\n'
    assert "RecognizerError" in (tmp_path / "out.jsonl.quarantine.jsonl").read_text()


def test_a_pattern_that_runs_out_of_time_is_noticed_without_any_log(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        "recognizers:\n- name: slow\n  supported_entity: SECRET\n  patterns: [{name: s, regex: '^(?:x|x|xx)+$', score: 0.9}]\n"
    )
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "x" * 60 + "!"}])
    out = tmp_path / "out.jsonl"
    silent = "import logging, sys\nlogging.disable(logging.CRITICAL)\nfrom scripts.deid_presidio import main\nsys.exit(main(sys.argv[1:]))"
    done = run_python(
        "-c", silent, "--in", source, "--out", out, *PLUMBING, "--set", f"deid.recognizers={own}", REGEX_TIMEOUT_SECONDS="1"
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert out.read_text() == ""


def test_a_review_sheet_is_drawn_only_when_asked_for_and_is_its_owners_alone(scrub, tmp_path):
    rows = [{"id": n, "text": f"{SECRET}{n} <b>& more</b>", "note": {"a": [None, 1.5]}} for n in range(40)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    sheet = tmp_path / "out.jsonl.deid_sample.html"
    assert scrub(source, *PLUMBING)[0] == 0
    assert not sheet.exists()
    pages = []
    for _ in range(2):
        code, out = scrub(source, *PLUMBING, "--sample", 5, "--overwrite")
        assert code == 0
        assert sheet.stat().st_mode & 0o777 == 0o600
        pages.append(sheet.read_text(encoding="utf-8"))
    page = pages[0]
    assert page == pages[1]  # the same seed draws the same records
    assert page.count('<article class="sample">') == 5
    assert page.count("<del>hunter2x") == page.count("<ins>&lt;SECRET&gt;</ins>") == 5
    assert "<b>" not in page
    assert sha256_file(out) in page
    assert "hunter2x" not in report_path(out).read_text() + report_path(out).with_suffix(".html").read_text()
    assert scrub(source, *PLUMBING, "--sample", 0, "--overwrite")[0] == 2


def test_records_of_the_review_sheet_are_those_written(scrub, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "one"}\nnot json\n\n{"text": "two"}\n')
    scrub(source, *PLUMBING, "--sample", 9)
    page = (tmp_path / "out.jsonl.deid_sample.html").read_text(encoding="utf-8")
    assert page.count('<article class="sample">') == 2
    assert "in.jsonl:1 " in page
    assert "in.jsonl:4 " in page


def test_columns_say_what_they_hold(scrub, tmp_path):
    source = tmp_path / "in.csv"
    source.write_text(f"id,who,ssn,note\nx1,Quux,n/a,{SECRET}\nx2,,pending,fine\n")
    columns = ["--set", 'deid.columns={"who": "PERSON", "ssn": "text", "id": "ID_NUMBER"}', "--profile", "default"]
    code, out = scrub(source, *columns)
    assert code == 0
    assert (
        out.read_text() == "id,who,ssn,note\n<ID_NUMBER>,<PERSON>,n/a,password: <SECRET>\n<ID_NUMBER>,,pending,fine\n"
    )


@pytest.mark.parametrize(
    ("columns", "message"), [('{"whom": "PERSON"}', "whom"), ('{"who": "PERSONS"}', "found PERSONS, wanted entities")]
)
def test_columns_that_cannot_be_meant_are_refused(scrub, tmp_path, capsys, columns, message):
    source = tmp_path / "in.csv"
    source.write_text("who,note\nQuux,fine\n")
    assert scrub(source, "--set", f"deid.columns={columns}", *PLUMBING)[0] == 2
    assert message in capsys.readouterr().err


def test_a_header_in_any_language_is_read(scrub, tmp_path):
    source = tmp_path / "in.csv"
    header = "Größe;Prénom du client;名前;First Name (legal)"
    source.write_text(f"{header}\n1;a;b;{SECRET}\n2;c;d;fine\n", encoding="utf-8")
    code, out = scrub(source, "--profile", "default")
    assert code == 0
    assert out.read_text(encoding="utf-8").startswith(header + "\n")


@pytest.mark.parametrize(
    "row", [{"text": None}, {"text": 5}, {"text": 536904399}, {"text": True}, {"text": []}, {}, {"text": {}}]
)
def test_a_row_without_text_passes(scrub, tmp_path, row):
    source = write_jsonl(tmp_path / "in.jsonl", [row, {"text": "fine"}])
    code, out = scrub(source, *PLUMBING)
    assert code == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == [row, {"text": "fine"}]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", '{"a": [NaN]}'])
def test_a_number_that_json_does_not_know_holds_its_record_back(scrub, tmp_path, value):
    source = tmp_path / "in.jsonl"
    source.write_text(f'{{"text": "a", "n": {value}}}\n{{"text": "fine"}}\n')
    code, out = scrub(source, *PLUMBING)
    assert code == 3
    assert out.read_text() == '{"text": "fine"}\n'


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "txt"])
def test_other_encodings_than_utf8_are_refused_with_what_to_do(scrub, tmp_path, capsys, encoding, ending):
    source = tmp_path / f"in.{ending}"
    source.write_bytes('[{"text": "fine"}]\n'.encode(encoding))
    code, out = scrub(source, *PLUMBING)
    error = capsys.readouterr().err
    assert code == 2
    assert "wanted UTF-8" in error
    assert "iconv" in error
    assert not out.exists()


@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("csv", ";"), ("csv", "\t"), ("tsv", "\t")])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_table_keeps_its_separator_and_byte_order_mark(scrub, tmp_path, ending, separator, mark):
    text = f"{mark}id{separator}text\n1{separator}{SECRET}\n2{separator}fine\n"
    source = tmp_path / f"in.{ending}"
    source.write_text(text, encoding="utf-8")
    code, out = scrub(source, *PLUMBING)
    assert code == 0
    assert out.read_text(encoding="utf-8") == text.replace("hunter2x", "<SECRET>")


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
from scripts.deid_presidio import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
def test_a_full_disk_leaves_no_output(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "x " * 500}] * 100)
    done = run_python("-c", LIMITED, "--in", source, "--out", tmp_path / "out.jsonl", *PLUMBING)
    assert done.returncode == 2
    assert "cannot write" in done.stderr
    assert not list(tmp_path.glob("out.jsonl"))
    assert not list(tmp_path.glob("*.deid_report.json"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_run_leaves_nothing_that_looks_finished_and_the_next_one_succeeds(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": f"line {n} " + "word " * 400} for n in range(4000)])
    out = tmp_path / "out.jsonl"
    command = ["-m", "scripts.deid_presidio", "--in", str(source), "--out", str(out), *PLUMBING, "--workers", "2"]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.DEVNULL, env=dict(os.environ))
    part = tmp_path / "out.jsonl.run" / "out.jsonl"
    for _ in range(600):
        if part.exists() and part.stat().st_size:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert part.exists()
    assert not out.exists()
    assert not report_path(out).exists()
    small = write_jsonl(tmp_path / "small.jsonl", [{"text": SECRET}])
    assert main(["--in", str(small), "--out", str(out), *PLUMBING]) == 0
    assert out.read_text() == '{"text": "password: <SECRET>"}\n'
    assert not part.parent.exists()


WATCHED = """
import sys
calls = []
sys.addaudithook(lambda event, arguments: calls.append(event) if event in ("socket.connect", "socket.getaddrinfo") else None)
from scripts.deid_presidio import main
code = main(sys.argv[1:])
print("calls:", calls)
sys.exit(code)
"""


def test_no_network_call_is_made(tmp_path):
    source = ROOT / "data/sft/sample_pii.jsonl"  # e-mail addresses and URLs are what makes libraries look up domains
    done = run_python("-c", WATCHED, "--in", source, "--out", tmp_path / "out.jsonl", "--set", "deid.rampart=off")
    assert done.returncode == 0, done.stderr
    assert "calls: []" in done.stdout


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.csv.gz", "in.xlsx"])
def test_compressed_files_and_sheets_are_read_and_written_as_jsonl(scrub, tmp_path, capsys, name):
    source = tmp_path / name
    if name.endswith("xlsx"):
        source.write_bytes(workbook([["id", "note"], ["x1", SECRET], ["x2", "fine"]]))
    elif "csv" in name:
        source.write_bytes(gzip.compress(f"id,note\nx1,{SECRET}\nx2,fine\n".encode()))
    else:
        rows = [{"id": "x1", "note": SECRET}, {"id": "x2", "note": "fine"}]
        source.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert scrub(source, *PLUMBING)[0] == 2
    assert "wanted `.jsonl`; a compressed file or a sheet is written as JSONL" in capsys.readouterr().err
    out = tmp_path / "out.jsonl"
    assert main(["--in", str(source), "--out", str(out), "--set", "deid.rampart=off", *map(str, PLUMBING)]) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"id": "x1", "note": "password: <SECRET>"},
        {"id": "x2", "note": "fine"},
    ]
