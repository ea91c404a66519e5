"""Personal data and secrets in a text -> placeholders: e-mail addresses, public IP addresses, keys of known forms.

Keys are those that detect-secrets has a pattern for, and private keys in PEM blocks; passwords and other random strings
have no form of their own, and stay. Patterns miss some and replace too much elsewhere (a version of four numbers is an
IP address). Pure. Cost: 8 MB/s of text without keys, 1.4 MB/s with them.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache

from clippy_train.errors import ConfigError

# Not `git@github.com`, which is a login, and not `icon@2x.png`.
_EMAIL = re.compile(r"(?<![\w.+-])(?!git@)[\w.+-]{1,64}@(?!\dx\.)(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])")
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\w)")
_IPV6 = re.compile(r"(?<![\w:])[23][0-9a-fA-F]{3}:[0-9a-fA-F:]{2,34}(?![\w:])")  # 2000::/3 holds all public ones
_PEM = re.compile(r"-----BEGIN ([A-Z ]*PRIVATE KEY)-----[\s\S]{1,20000}?-----END \1-----")
# Detectors of a keyword before any string, of a header, of addresses, and one whose pattern matches ordinary words.
_LEFT_OUT = {"KeywordDetector", "PrivateKeyDetector", "BasicAuthDetector", "IPPublicDetector", "ArtifactoryDetector"}
_SHORTEST_KEY = 16


def redacted(text: str, kinds: Iterable[str]) -> tuple[str, Counter[str]]:
    """A text with placeholders, and how many of each kind were put there.

    Args:
        kinds: of `KINDS`.

    Raises:
        ConfigError: detect-secrets is not installed, and `keys` needs it.
    """
    counts: Counter[str] = Counter()
    for kind, (patterns, placeholder, is_one) in KINDS.items():
        for pattern in patterns() if kind in kinds else ():
            spans = [_span(match) for match in pattern.finditer(text) if is_one(match[0])]
            counts[kind] += len(spans)
            text = _replaced(text, spans, placeholder)
    return text, +counts


def _replaced(text: str, spans: list[tuple[int, int]], placeholder: str) -> str:
    begins = [0, *(end for _, end in spans)]
    ends = [*(begin for begin, _ in spans), len(text)]
    return placeholder.join(text[begin:end] for begin, end in zip(begins, ends, strict=True))


def _span(match: re.Match[str]) -> tuple[int, int]:
    """Where the secret is: a group, if a long one is marked in the pattern."""
    longest = max(range(1, len(match.groups()) + 1), key=lambda group: len(match[group] or ""), default=0)
    return match.span(longest if len(match[longest] or "") >= _SHORTEST_KEY else 0)


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def _always(_: str) -> bool:
    return True


@cache
def _key_patterns() -> tuple[re.Pattern[str], ...]:
    try:
        from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
        from detect_secrets.plugins.base import RegexBasedDetector
    except ImportError:
        raise ConfigError("filter.redact=[keys] needs detect-secrets: pip install 'clippy_train[redact]'") from None
    detectors = get_mapping_from_secret_type_to_class().values()
    known = [each for each in detectors if issubclass(each, RegexBasedDetector) and each.__name__ not in _LEFT_OUT]
    return _PEM, *(pattern for each in known for pattern in each.denylist)


# Kind -> patterns, placeholder (StarCoder's), and what a match must be.
KINDS: dict[str, tuple[Callable[[], tuple[re.Pattern[str], ...]], str, Callable[[str], bool]]] = {
    "keys": (_key_patterns, "<KEY>", _always),
    "emails": (lambda: (_EMAIL,), "<EMAIL>", _always),
    "ips": (lambda: (_IPV4, _IPV6), "<IP_ADDRESS>", _is_public),
}
