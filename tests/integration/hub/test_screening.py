import base64
import random
import string
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow.parquet import ParquetWriter, write_table

from distill_datasets.errors import ScreeningError
from distill_datasets.hub import screening
from distill_datasets.hub.credentials import matched
from distill_datasets.hub.personal_data import personal_data
from distill_datasets.hub.screening import Finding, require_clean, screen


def invented(prefix: str, length: int, signs: str = string.ascii_letters + string.digits) -> str:
    """A key that nobody has; put together here, so that no scanner finds it in this file."""
    chance = random.Random(prefix)
    return prefix + "".join(chance.choice(signs) for _ in range(length))


HUB = invented("hf_", 34, string.ascii_letters)
GITHUB = invented("ghp_", 36)
TINKER = invented("tml-", 43)


def release(folder: Path, **columns: list[object]) -> Path:
    (folder / "data").mkdir(parents=True)
    write_table(pa.table(columns), folder / "data" / "train-00000-of-00001.parquet")
    return folder


def test_a_key_in_a_row_is_found_by_row_and_column(tmp_path: Path) -> None:
    place = release(
        tmp_path / "release",
        id=["a1", "b2", "c3"],
        query=["Guten Tag", f"use {HUB}, please", "नमस्ते"],
        sample=[0, 0, 0],
    )
    (finding,) = screen(place)
    assert finding.secret
    assert finding.kind == "huggingface-access-token"
    assert finding.where == "data/train-00000-of-00001.parquet, row b2, column query"


@pytest.mark.parametrize(
    "around", ["({})", "'{}'.", "密钥{}谢谢", "*{}*, say", "{}؟", "{}: so", "a,{},b"]
)
def test_a_key_is_found_among_the_signs_of_prose(around: str, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(around.format(HUB), encoding="utf-8")
    (finding,) = screen(tmp_path)
    assert finding.kind == "huggingface-access-token"


def test_a_key_in_the_prompt_is_found_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "prompt.md").write_text(f"Classify.\n\nToken {GITHUB}\n")
    (finding,) = screen(tmp_path)
    assert finding.where == "recipe/prompt.md, line 3"


def test_a_key_over_several_lines_is_one_finding(tmp_path: Path) -> None:
    body = base64.b64encode(random.Random(0).randbytes(600)).decode()
    lines = "\n".join(body[start : start + 64] for start in range(0, len(body), 64))
    kind = "PRIVATE KEY"
    (tmp_path / "prompt.md").write_text(
        f"a\nb\n-----BEGIN {kind}-----\n{lines}\n-----END {kind}-----\n"
    )
    (finding,) = screen(tmp_path)
    assert finding.where == "prompt.md, line 3"


def test_nested_strings_are_read_and_one_value_is_one_finding(tmp_path: Path) -> None:
    said = [f"{HUB} in row {number}" for number in range(5)]
    messages = [[{"role": "user", "content": text}] for text in said]
    (finding,) = screen(release(tmp_path / "r", messages=messages, note=[None] * 5))
    assert finding.where.endswith("row 0, column messages")
    assert finding.places == 5


def test_no_finding_shows_the_value(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(f"{HUB}\n{GITHUB}\n{TINKER}\nana.perez@gmail.com\n")
    findings = screen(tmp_path)
    with pytest.raises(ScreeningError) as raised:
        require_clean(findings)
    shown = str(raised.value) + repr(findings)
    for value in (HUB, GITHUB, TINKER, "ana.perez@gmail.com"):
        assert value not in shown
        assert value[5:] not in shown
    assert len(findings) == 4


@pytest.mark.parametrize(
    "text",
    [
        f"TINKER_API_KEY={TINKER}",
        f'password = "{invented("", 16)}"',
        f"api_key: {invented('', 32)}",
        f"aws_secret_access_key = {invented('', 40)}",
        f'{{"client_secret": "{invented("", 24)}"}}',
    ],
)
def test_what_the_scanner_leaves_out_is_found_too(text: str) -> None:
    assert [rule for rule, _, _ in matched(text)]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("email", "Schreiben Sie an jürgen.o'neil+x@uni-köln.de, danke: info@uni-koeln.de."),
        ("email", "联系bob@sina.com.cn谢谢"),
        ("phone", "Ruf an: +49 30 901820"),
        ("phone", "call (415) 703-9123 or don't"),
        ("phone", "call 415-703-9123"),
        ("card", "4111 1111 1111 1111"),
        ("card", "paid with 378282246310005 today"),
        ("iban", "DE89 3704 0044 0532 0130 00"),
        ("iban", "GB82WEST12345698765432"),
        ("ip", "from 84.115.3.7, twice"),
        ("ip", "2001:4860:4860::8888"),
    ],
)
def test_personal_data_is_found(kind: str, text: str) -> None:
    assert {found for found, _, _ in personal_data(text)} == {kind}


@pytest.mark.parametrize(
    "text",
    [
        "user@example.com, a@b.example.org, me@host.test, icon@2x.png, @someone",
        "On 2026-11-21 12:30:45 version 1.2.3.4 of section 3.2.1.10 came out, 10.0.0.1 and ::1.",
        "+1 000 000 0000, 123-456-7890, 3.14159265358979, 1,234,567,890.12",
        "4111 1111 1111 1112, 1234567890123456, 99999999999999999999",
        "DE00 3704 0044 0532 0130 00, order AB12 3456 7890 1234 5678",
        "std::vector<int>, face::dead, 192.168.1.1, 127.0.0.1, 0.0.0.0, 255.255.255.0",
        "password: correct-horse-battery-staple, token = step-000057, api_key: YOUR_API_KEY_HERE",
        "secret: BERT-base-uncased-2019, Token: الجملة, contraseña: ninguna",
        "वह १८८० में पैदा हुआ, ३०४५६७८९०१२, 电话号码是保密的",
    ],
)
def test_ordinary_text_raises_nothing(text: str) -> None:
    assert not list(personal_data(text))
    assert not list(matched(text))


def test_real_sentences_in_fifteen_languages_raise_nothing(tmp_path: Path) -> None:
    import tinker_cookbook

    source = Path(tinker_cookbook.__file__).parent / "example_data" / "multilingual.txt"
    lines = source.read_text("utf-8").splitlines()
    assert len(lines) == 2100
    assert screen(release(tmp_path / "release", query=lines)) == []


def test_what_ships_raises_nothing() -> None:
    root = Path(__file__).parents[3]
    assert screen(root / "builders") == []
    assert screen(root / "cards") == []


@pytest.mark.parametrize("page_texts", [1, 3, 1000])
def test_the_findings_do_not_depend_on_how_it_is_read(
    page_texts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screening, "_PAGE_TEXTS", page_texts)
    path = tmp_path / "train.parquet"
    with ParquetWriter(path, pa.schema({"id": pa.string(), "query": pa.string()})) as writer:
        for number in range(3):
            texts = [
                f"line\nwith {GITHUB}\n" if number == 2 else f"ordinary {number}",
                "bob@web.de",
            ]
            writer.write_table(pa.table({"id": [f"i{number}", f"j{number}"], "query": texts}))
    found = {finding.kind: finding.where for finding in screen(tmp_path)}
    assert found == {
        "github-pat": "train.parquet, row i2, column query",
        "email": "train.parquet, row j0, column query",
    }


def test_files_that_are_not_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\0\1\2" + HUB.encode())
    assert screen(tmp_path) == []


def test_many_values_of_a_kind_share_one_finding_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screening, "_MOST_OF_A_KIND", 2)
    (tmp_path / "a.txt").write_text("".join(f"person{number}@web.de\n" for number in range(9)))
    findings = screen(tmp_path)
    assert [(one.key == "email", one.places) for one in findings] == [
        (False, 1),
        (False, 1),
        (True, 7),
    ]
    with pytest.raises(ScreeningError):
        require_clean(findings, [one.key for one in findings[:2]])
    require_clean(findings, ["email"])


SECRET = Finding("github-pat", "recipe/prompt.md, line 3", "ghp_… (40 characters)", "0a1b2c3d4e5f")
EMAIL = Finding("email", "README.md, line 9", "an… (8 characters)", "ffeeddccbbaa", places=3)


def test_a_refusal_says_what_where_and_how_to_allow_it() -> None:
    with pytest.raises(ScreeningError) as raised:
        require_clean([SECRET, EMAIL])
    text = str(raised.value)
    assert "secret (github-pat): ghp_… (40 characters) in recipe/prompt.md, line 3" in text
    assert "[--allow 0a1b2c3d4e5f]" in text
    assert "README.md, line 9 and 2 more places  [--allow ffeeddccbbaa]" in text
    assert "--allow email" in text
    assert raised.value.exit_code == 2


def test_explicit_findings_can_be_allowed() -> None:
    require_clean([])
    require_clean([SECRET, EMAIL], [SECRET.key, EMAIL.key])
    require_clean([SECRET, EMAIL], [SECRET.key, "email"])


def test_a_secret_is_never_allowed_by_its_kind() -> None:
    with pytest.raises(ScreeningError) as raised:
        require_clean([SECRET, EMAIL], ["github-pat", "email"])
    assert "README.md" not in str(raised.value)
    assert "--allow email" not in str(raised.value)


def test_a_missing_scanner_sends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kingfisher", None)
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ScreeningError, match="pip install kingfisher-bin"):
        screen(tmp_path)


def test_findings_beyond_the_first_are_counted() -> None:
    many = [Finding("email", f"a.txt, line {n}", "…", f"{n:012x}") for n in range(25)]
    with pytest.raises(ScreeningError, match="and 5 more"):
        require_clean(many)
