"""Placeholders for personal data and keys: what must be replaced, and what looks like it and must stay."""

import sys

import pytest

from clippy_train.errors import ConfigError
from clippy_train.shards.redact import KINDS, redacted

TOKEN = "ghp_" + "a1B2c3D4e5F6" * 3  # of GitHub's form
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIBOgIBAAJBAKj34GkxFhD9\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("emails", "# Jo <jo.doe+x@mail.example.org>, <a@b.io>", "# Jo <<EMAIL>>, <<EMAIL>>"),
        ("ips", "dns 8.8.8.8, [2001:4860:4860::8888]:53", "dns <IP_ADDRESS>, [<IP_ADDRESS>]:53"),
    ],
    ids=["emails", "ips"],
)
def test_personal_data_is_replaced_and_counted(kind: str, text: str, expected: str) -> None:
    assert redacted(text, [kind]) == (expected, {kind: 2})


@pytest.mark.parametrize(
    "text",
    [
        "git@github.com:octo/cat.git",
        "@app.route('/')",
        "icon@2x.png",
        "lodash@4.17.21",
        "127.0.0.1 10.0.0.7 192.168.1.1 0.0.0.0",
        "version 1.2.3.4.5, 300.1.1.1, v1.2.3",
        "std::map a::b 2024:10:12 fe80::1",
    ],
)
def test_what_only_looks_like_personal_data_stays(text: str) -> None:
    assert redacted(text, ["emails", "ips"]) == (text, {})


def test_nothing_is_replaced_unless_it_is_asked_for() -> None:
    text = f"jo@example.org 8.8.8.8 {TOKEN}"
    assert redacted(text, []) == (text, {})
    assert redacted(text, ["ips"])[0] == f"jo@example.org <IP_ADDRESS> {TOKEN}"


def test_keys_of_known_forms_are_replaced_whole() -> None:
    pytest.importorskip("detect_secrets")
    secret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzzzzzzKEY"
    text = f'token = "{TOKEN}"\n{PEM}\naws_secret_key = "{secret}"\n'
    assert redacted(text, ["keys"]) == ('token = "<KEY>"\n<KEY>\naws_secret_key = "<KEY>"\n', {"keys": 3})
    ordinary = "sha = 'da39a3ee5e6b4b0d3255bfef95601890afd80709'\nAPPENDIX = APCollector\npassword = 'hunter2'\n"
    assert redacted(ordinary, KINDS) == (ordinary, {})


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "detect_secrets.core.plugins.util", None)
    KINDS["keys"][0].cache_clear()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"filter\.redact=\[keys\] needs detect-secrets: pip install"):
        redacted("", ["keys"])
