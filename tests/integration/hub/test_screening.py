import base64
import random
import shutil
import string
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow.parquet import ParquetWriter, write_table

from distill_datasets.errors import ScreeningError
from distill_datasets.hub import screening
from distill_datasets.hub.screening import Finding, matched, personal_data, require_clean, screen


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


def test_a_key_is_found_among_the_signs_of_prose(tmp_path: Path) -> None:
    around = ["({})", "'{}'.", "密钥{}谢谢", "*{}*, say", "{}؟", "{}: so", "a,{},b"]
    keys = [invented(f"hf_{letter}", 33, string.ascii_letters) for letter in "abcdefg"]
    for number, (signs, key) in enumerate(zip(around, keys, strict=True)):
        (tmp_path / f"{number}.md").write_text(signs.format(key), encoding="utf-8")
    found = [(one.kind, one.where, one.places) for one in screen(tmp_path)]
    expected = [("huggingface-access-token", f"{n}.md, line 1", 1) for n in range(len(keys))]
    assert sorted(found) == expected


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
        f"id {invented('AKIA', 16, string.ascii_uppercase + string.digits)} alone",
        f"bot 123456789:{invented('AA', 33)}, say",
        f"Authorization: Bearer {invented('', 24)}",
        f'{{"authorization": "Basic {invented("", 20)}=="}}',
        f"https://discord.com/api/webhooks/123456789012345678/{invented('', 68)}",
        f"https://discordapp.com/api/v10/webhooks/123456789012345678/{invented('', 68)}",
        "password: hunter2!",
        "My password is Tr0ub4dor&3.",
        '"Passwort": "Sommer2024"',
        f"postgres://ann:{invented('', 12)}@db.host.net:5432/x",
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
        ("phone", "Büro 030 901820-0, danke"),
        ("phone", "ring 020 7946 0958 today"),
        ("phone", "06 12 34 56 78"),
        ("phone", "Telefon: 089/9980000"),
        ("phone", "mi móvil es 612 34 56 78"),
        ("phone", "WhatsApp 98765 43210"),
        ("ssn", "my number is 536-90-4399"),
        ("tax-id", "SSN: 536904399"),
        ("tax-id", "Steuer-ID 36 574 261 809"),
        ("tax-id", "EIN 91-1144442"),
        ("tax-id", "CPF 390.533.447-05"),
        ("tax-id", "54362315K"),
        ("tax-id", "RCCMNL83S18D969H"),
        ("tax-id", "NI number AB 12 34 56 C"),
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
        "git clone git@github.com:org/repo.git, ssh://git@host:22/x, https://user@host/x",
        "On 01.02.2024 and 03-04-2024 at 07:30, 05/06/2024 12:00, ISBN 0-306-40615-2",
        "password: required, Password: ********, password: your_password1, password: string",
        "Authorization: Bearer $TOKEN, authorization: Bearer <token>, Authorization: Basic your-1",
        "http://user:pass@example, AKIA is a prefix, 12:30, ratio 123456789:short",
        "the tax number is secret, a phone call at 10, call 12345678 times, 000-12-3456, 12345678A",
    ],
)
def test_ordinary_text_raises_nothing(text: str) -> None:
    assert not list(personal_data(text))
    assert not list(matched(text))


def test_the_machines_own_keys_are_found_whatever_they_look_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"OPENAI_API_KEY": "team-llm-gateway\r", "SOME_SERVICE_SECRET": "“open sesame”"}
    for name, value in {**keys, "SHORT_TOKEN": "abc", "HOME_PAGE": "not-a-key"}.items():
        monkeypatch.setenv(name, value)
    said = "Incorrect API key provided: team-llm-gateway. abc, not-a-key, open sesame!"
    place = release(tmp_path / "release", id=["a"], error=[{"type": "x", "message": said}])
    findings = screen(place)
    assert [one.kind for one in findings] == [
        "the value of OPENAI_API_KEY",
        "the value of SOME_SERVICE_SECRET",
    ]
    assert all(one.secret and "row a, column error" in one.where for one in findings)
    with pytest.raises(ScreeningError) as raised:
        require_clean(findings)
    assert "team-llm" not in str(raised.value) and "sesame" not in str(raised.value)


def test_real_sentences_in_fifteen_languages_raise_nothing(tmp_path: Path) -> None:
    import tinker_cookbook

    source = Path(tinker_cookbook.__file__).parent / "example_data" / "multilingual.txt"
    lines = source.read_text("utf-8").splitlines()
    assert len(lines) == 2100
    assert screen(release(tmp_path / "release", query=lines)) == []


def test_what_ships_raises_nothing(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    for name in ("builders", "cards"):
        shutil.copytree(root / name, tmp_path / name)
    assert screen(tmp_path) == []


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
