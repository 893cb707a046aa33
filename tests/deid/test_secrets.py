"""Secrets: keys with a format of their own, and values that only their label makes a secret. Placeholders stay."""

from __future__ import annotations

import json

import pytest
import yaml

from scripts.common.errors import UserError
from scripts.common.schema import Deid

pytest.importorskip("presidio_analyzer", reason="needs requirements.extra.txt")

from scripts.deid.recognizers import OWN_RECOGNIZERS, load_detector
from scripts.deid.replacement import Replacer
from scripts.deid.scrubbing import scrub_chunk
from tests.conftest import write_jsonl

LINES = "Zm9vYmFyYmF6cXV4MDEyMzQ1Njc4OWFiY2RlZmdoaWprbG1ub3BxcnN0dXZ3eHl6\n" * 3
ENDING = "PRIVATE KEY"  # put together here, so that scanners of secrets pass this file by


def block(kind: str, ending: str = ENDING) -> str:
    return f"-----BEGIN {kind}{ending}-----\n{LINES}-----END {kind}{ending}-----"


@pytest.fixture(scope="module")
def scrub():
    """Return a function that scrubs one text for secrets only."""
    settings = Deid(profile="secrets-only")
    detector = load_detector(settings)

    def run(text):
        [outcome] = scrub_chunk([(1, "f:1", {"text": text})], detector, Replacer(settings, 0, None))
        assert not outcome.reason, outcome.reason
        return outcome.row["text"]

    return run


@pytest.mark.parametrize("before", ["", "the key was:\n", "> "])
@pytest.mark.parametrize(
    "key",
    [
        block(""), block("RSA "), block("EC "), block("OPENSSH "), block("ENCRYPTED "), block("DSA "),
        block("PGP ", ENDING + " BLOCK"),
        block("RSA ").replace("\n", "\\n"),  # as JSON writes it
        block("RSA ").replace("\n", "\r\n"),
        block("RSA ").replace("\n", "\n    "),
        block("RSA ").rpartition("\n")[0],  # cut off
    ],
)  # fmt: skip
def test_a_private_key_leaves_whole(scrub, before, key):
    left = scrub(f"{before}{key}\nAsk the office.")
    assert "Zm9v" not in left
    assert left.startswith(before)
    assert left.endswith("\nAsk the office.")


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("DB_PASSWORD=tulip-Grove-7", "tulip-Grove-7"),
        ("export AWS_SECRET_ACCESS_KEY=wJalr/XUtnFEMI+K7MDENGbPxRfiCYzEXAM21KEY", "wJalr/XUtnFEMI+K7MDENGbPxRfiCYzEXAM21KEY"),
        ("MYSQL_ROOT_PASSWORD: 'plum tree 22'", "plum tree 22"),
        ("PGPASSWORD=quince88 psql", "quince88"),
        ("dbPassword = \"Willow_31\";", "Willow_31"),
        ("spring.datasource.password=kiwi-Lane4", "kiwi-Lane4"),
        ("smtp_pass: Rowan*55", "Rowan*55"),
        ("Authorization: Bearer 9f8e7d6c5b4a39281706", "9f8e7d6c5b4a39281706"),
        ("Authorization: Basic YWxpY2U6d29uZGVybGFuZDE=", "YWxpY2U6d29uZGVybGFuZDE="),
        ("authorization: token 0a1b2c3d4e5f60718293", "0a1b2c3d4e5f60718293"),
        ("X-Api-Key: 5f4dcc3b5aa765d61d8327deb882cf99", "5f4dcc3b5aa765d61d8327deb882cf99"),
        ("Cookie: session=Ab3dE6gH9jK2mN5p", "Ab3dE6gH9jK2mN5p"),
        ("token: Q2hlc3RudXQtMTk4NC1maWc", "Q2hlc3RudXQtMTk4NC1maWc"),
        ('{"client_secret": "V8x-2kQ9-mm3T"}', "V8x-2kQ9-mm3T"),
        ("curl -u bob:maple!Syrup https://host/x", "maple!Syrup"),
        ("curl --user 'bob:maple!Syrup' https://host/x", "maple!Syrup"),
        ("mysql -h db -uroot -pSpruce99 shop", "Spruce99"),
        ("sshpass -p 'larch&Oak1' ssh a@b", "larch&Oak1"),
        ("tool --password hazel_Nut2 --port 80", "hazel_Nut2"),
        ("postgres://svc:fir-Cone-9@db:5432/x", "fir-Cone-9"),
        ("mongodb+srv://u:p4ssM0ngo@cluster0.host/x", "p4ssM0ngo"),
        ("Server=db;Uid=sa;Pwd=Acacia#12;", "Acacia#12"),
        ("DefaultEndpointsProtocol=https;AccountKey=abcDEF123+/ghiJKL456==;", "abcDEF123+/ghiJKL456=="),
        ("https://x.org/cb?access_token=aZ09bY18cX27&lang=de", "aZ09bY18cX27"),
        ("PIN: 4821", "4821"),
        ("my pin is 9034", "9034"),
        ("the door code is 77#12", "77#12"),
        ("CVV 481", "481"),
        ("your verification code: 553201", "553201"),
        ("690142 is your login code.", "690142"),
        ("backup codes: 1122-3344, 5566-7788", "5566-7788"),
        ("seed phrase: lava harbor mint canoe olive piano rabbit silver tunnel velvet window zebra", "zebra"),
        ("The passphrase is purple monkey dishwasher lamp", "dishwasher"),
        ("wifi password is Sunny-Beach-7", "Sunny-Beach-7"),
        ("root pw: b1rch!", "b1rch!"),
        ("login pia@fjord.test / Caramel_55", "Caramel_55"),
        ("pia@fjord.test:Caramel_55", "Caramel_55"),
        ("ALTER USER etl WITH PASSWORD 'alder7x'", "alder7x"),
        ("CREATE USER r IDENTIFIED BY 'alder7x'", "alder7x"),
        ('var key = []byte("7c4a8d09ca3762af61e59520943dc26494f8941b")', "7c4a8d09ca3762af61e59520943dc26494f8941b"),
    ],
)  # fmt: skip
def test_a_value_that_its_surroundings_call_secret_is_found(scrub, text, secret):
    left = scrub(text)
    assert secret not in left
    assert "<SECRET>" in left


@pytest.mark.parametrize(
    "text",
    [
        "api_key = 'your-key-here'", "API_KEY=YOUR_API_KEY", "PASSWORD=changeme", "password: <your password>", "token: ${{ secrets.TOKEN }}",
        "password = os.environ['DB_PASSWORD']", "token = get_token(request)", "secret = settings.SECRET_KEY", "Authorization: Bearer $TOKEN",
        "password: ********", "api_key: xxxxxxxxxxxx", "def login(user: str, password: str) -> bool:", "postgres://user:password@localhost/db",
        "The password must have 12 characters.", "I forgot my password, what now?", "Set max_tokens: 256 and tokens = 5.",
        "error code: 503", "promo code SPRING24", "zip code", "the PIN of my card does not work", "git checkout 7c4a8d09ca3762af61e59520943dc26494f8941b",
        "sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "Key: value", "the token is wrong",
        "-----BEGIN CERTIFICATE-----", "A key point: planning helps.",
    ],
)  # fmt: skip
def test_placeholders_and_talk_about_secrets_stay(scrub, text):
    assert scrub(text) == text


def test_every_pattern_of_ours_has_an_example_that_the_start_checks(tmp_path):
    entries = yaml.safe_load(OWN_RECOGNIZERS.read_text(encoding="utf-8"))["recognizers"]
    without = [f"{e['name']}: {p['name']}" for e in entries for p in e["patterns"] if not p.get("example")]
    assert without == []
    broken = tmp_path / "own.yaml"
    pattern = "{name: badge, regex: 'B-[0-9]{4}', score: 0.9, example: B-12}"
    broken.write_text(f"recognizers:\n- name: badges\n  supported_entity: SECRET\n  patterns: [{pattern}]\n")
    with pytest.raises(UserError, match="`badge` does not find its own example"):
        load_detector(Deid(profile="secrets-only", recognizers=str(broken)))


def test_the_command_leaves_no_key_in_any_file(tmp_path):
    from scripts.deid_presidio import main

    source = write_jsonl(tmp_path / "in.jsonl", [{"text": f"see\n{block('OPENSSH ')}\nDB_PASSWORD=tulip-Grove-7"}])
    out = tmp_path / "out.jsonl"
    assert main(["--in", str(source), "--out", str(out), "--profile", "secrets-only"]) == 0
    assert json.loads(out.read_text())["text"] == "see\n<SECRET>\nDB_PASSWORD=<SECRET>"
    for path in tmp_path.glob("out*"):
        assert "Zm9v" not in path.read_text()
