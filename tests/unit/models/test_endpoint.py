"""Keys, addresses and proxies, and whose matter a refusal is."""

import pytest
from yarl import URL

from distill_datasets.errors import (
    AccessError,
    ModelError,
    ServiceError,
)
from distill_datasets.models.endpoint import (
    Endpoint,
    find_proxy,
    read_address,
    read_key,
)

KEY = "sk-mine-0123456789"


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("text", [KEY, f"{KEY}\r", f"{KEY}\n", f" {KEY}\t\r\n"])
def test_a_key_is_read_without_the_blanks_around_it(text: str) -> None:
    assert read_key(text, "OPENAI_API_KEY") == KEY


@pytest.mark.parametrize("text", [None, "", " \r\n"])
def test_an_empty_key_is_none(text: str | None) -> None:
    assert read_key(text, "OPENAI_API_KEY") is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"“{KEY}”", "a quotation mark at place 1 of"),
        (f'"{KEY}"', "a quotation mark at place 1 of"),
        (f"{KEY}\n{KEY}", "a blank or a sign beyond ASCII at place 19 of"),
        (f"{KEY}\u200b", "a blank or a sign beyond ASCII"),
        (f"{KEY}é", "a blank or a sign beyond ASCII"),
        (f"Bearer {KEY}", "a blank or a sign beyond ASCII"),
    ],
)
def test_a_key_in_quotes_or_with_other_signs_is_refused_unseen(text: str, found: str) -> None:
    with pytest.raises(AccessError, match=f"OPENAI_API_KEY: expected a key, found {found}") as said:
        read_key(text, "OPENAI_API_KEY")
    assert KEY not in str(said.value)


@pytest.mark.parametrize("text", ["http://h:8000/v1", " http://h:8000/v1 ", "http://h:8000/v1\r\n"])
def test_an_address_is_read_without_the_blanks_around_it(text: str) -> None:
    assert read_address(text, "OPENAI_BASE_URL") == URL("http://h:8000/v1")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost:8000",
        "ftp://h/v1",
        "http://",
        "http://[h",
        "http://h:port/v1",
        "http://me:secret@h/v1",
        "me:secret@h",
        "http://me:secret@",
        '"http://h/v1"',
        "“http://h/v1”",
        "http://h/v1 http://h/v2",
    ],
)
def test_what_is_no_address_is_refused_without_its_user(text: str) -> None:
    with pytest.raises(ModelError, match="OPENAI_BASE_URL: expected https://") as raised:
        read_address(text, "OPENAI_BASE_URL")
    assert "secret" not in str(raised.value)


def test_the_query_of_an_address_is_kept_and_never_shown() -> None:
    endpoint = Endpoint(URL("https://h/v1?api-version=2024&key=hidden-value"), KEY, "X")
    assert endpoint.at("chat/completions") == URL(
        "https://h/v1/chat/completions?api-version=2024&key=hidden-value"
    )
    assert str(endpoint) == "https://h/v1"
    assert endpoint.hide(f"at {endpoint.url} with {KEY}") == (
        "at https://h/v1?api-version=2024&key=[hidden] with [hidden]"
    )


def test_a_word_that_serves_as_a_key_is_no_secret() -> None:
    assert Endpoint(URL("http://h"), "EMPTY", "X").hide("an EMPTY answer") == "an EMPTY answer"


@pytest.mark.parametrize(
    ("environment", "address", "proxy"),
    [
        ({}, "http://h/v1", None),
        ({"http_proxy": "http://p:8080"}, "http://h/v1", "http://p:8080 (HTTP_PROXY)"),
        ({"HTTP_PROXY": "http://p/"}, "http://h/v1", "http://p/ (HTTP_PROXY)"),
        ({"http_proxy": "p:8080"}, "http://h/v1", "http://p:8080 (HTTP_PROXY)"),
        ({"http_proxy": "http://u:pw@p:8080"}, "http://h", "http://p:8080 (HTTP_PROXY)"),
        ({"http_proxy": "https://p:8080"}, "http://h", "https://p:8080 (HTTP_PROXY)"),
        ({"http_proxy": "http://p:8080"}, "https://h/v1", None),
        ({"https_proxy": "http://p:8080"}, "https://h", "http://p:8080 (HTTPS_PROXY)"),
        ({"ALL_PROXY": "http://p:8080"}, "https://h", "http://p:8080 (ALL_PROXY)"),
        (
            {"ALL_PROXY": "http://a:1", "https_proxy": "http://p:1"},
            "https://h",
            "http://p:1 (HTTPS_PROXY)",
        ),
        ({"http_proxy": ""}, "http://h/v1", None),
        ({"http_proxy": "http://p", "NO_PROXY": "other,h"}, "http://h/v1", None),
        ({"http_proxy": "http://p", "NO_PROXY": ".h.example"}, "http://a.h.example", None),
        ({"http_proxy": "http://p", "NO_PROXY": "*"}, "http://h/v1", None),
        ({"http_proxy": "http://p", "NO_PROXY": "10.0.0.0/8, x"}, "http://10.1.2.3:8000", None),
        ({"http_proxy": "http://p", "NO_PROXY": "fd00::/8"}, "http://[fd00::1]:80", None),
        (
            {"http_proxy": "http://p:1", "NO_PROXY": "10.0.0.0/8"},
            "http://11.1.2.3",
            "http://p:1 (HTTP_PROXY)",
        ),
        ({"http_proxy": "http://p:1", "NO_PROXY": "h:8000"}, "http://h:8000", None),
    ],
)
def test_the_proxy_is_the_environments(
    environment: dict[str, str],
    address: str,
    proxy: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = find_proxy(URL(address))
    assert (None if found is None else str(found)) == proxy


@pytest.mark.parametrize("text", ["socks5://u:pw@p:1080", "http://[p", "http://"])
def test_a_proxy_that_cannot_be_used_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", text)
    with pytest.raises(ServiceError, match=r"ALL_PROXY: expected http://host:port") as raised:
        find_proxy(URL("https://h/v1"))
    assert "pw" not in str(raised.value)
