"""A command as it may be printed: without what looks like a secret."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

_SECRET_NAME = (
    r"[\w.-]*(?:token|secret|passw|pwd|passphrase|credential|auth(?!or(?!iz))|bearer|cookie|key(?![a-z]))"
    r"[\w.-]*"
)

# Options whose value is a secret, or may be: the next argument.
_SECRET_OPTION = re.compile(rf"-{{1,2}}{_SECRET_NAME}|bearer|-H|--header", re.IGNORECASE)
_PAIR_OPTION = re.compile(r"-e|--env|--environment")

# Arguments of which the end is hidden, and then what is hidden in any: the first group stays.
_SECRET_ARGUMENTS = (
    re.compile(rf"(-{{0,2}}{_SECRET_NAME}[=:]\s*).+", re.IGNORECASE | re.DOTALL),
    re.compile(r"((?:-e|--?[\w-]+=)?[A-Z_][A-Z0-9_]*=).+", re.DOTALL),
)
_SECRET_PARTS = (
    re.compile(r"(\b(?:bearer|basic)\s+)[^\s\"']+", re.IGNORECASE),
    re.compile(rf"({_SECRET_NAME}[\"']?\s*[=:]\s*[\"']?)[^\s\"'&;,}}]+", re.IGNORECASE),
    re.compile(rf"((?<!\S)--?{_SECRET_NAME}\s+)[^\s\"'-][^\s\"']*", re.IGNORECASE),
    re.compile(r"((?<!\S)[A-Z_][A-Z0-9_]*=)\S+"),
    re.compile(r"(://)[^/@\s]+(?=@)"),
    re.compile(r"(://[^\s?]*\?)[^\s\"'#]+"),
)
_HIDDEN = "***"

_LONG_WORD = re.compile(r"(?<![\w/.@+-])[\w+-]{20,}=*(?![\w/.@])")
_HEXADECIMAL = re.compile(r"[0-9a-f-]+", re.IGNORECASE)


def shown_command(argv: Sequence[str]) -> str:
    """A command for a log or a terminal, without what `shown_arguments` hides."""
    return " ".join(
        argument if shlex.quote(bare) == bare else shlex.quote(argument)
        for argument in shown_arguments(argv)
        for bare in [argument.replace(_HIDDEN, "x")]
    )


def shown_arguments(argv: Sequence[str]) -> tuple[str, ...]:
    """The arguments of a command, with `***` for what looks like a secret.

    That is the value of an option or a name such as token, key, password or Authorization, of a
    header and of an environment variable, what follows Bearer, the password and the query of a URL,
    and a long random word. The program is shown as it is.
    """
    shown = list(argv[:1])
    before = ""
    for argument in argv[1:]:
        if _SECRET_OPTION.fullmatch(before) and not argument.startswith("--"):
            shown.append(_HIDDEN)
        elif _PAIR_OPTION.fullmatch(before) and "=" in argument:
            shown.append(f"{argument.partition('=')[0]}={_HIDDEN}")
        else:
            shown.append(_without_secrets(argument))
        before = argument
    return tuple(shown)


def without(secrets: Iterable[str], text: str) -> str:
    """The text with `***` in place of each of these secrets."""
    for secret in filter(None, secrets):
        text = text.replace(secret, _HIDDEN)
    return text


def _without_secrets(argument: str) -> str:
    for pattern in _SECRET_ARGUMENTS:
        if found := pattern.fullmatch(argument):
            return found[1] + _HIDDEN
    for pattern in _SECRET_PARTS:
        argument = pattern.sub(lambda found: found[1] + _HIDDEN, argument)
    return _LONG_WORD.sub(lambda found: _HIDDEN if _is_random(found[0]) else found[0], argument)


def _is_random(word: str) -> bool:
    """Whether a long word has digits where no word of a language, and no name, has them."""
    has_digits = any(map(str.isdigit, word)) and any(map(str.isalpha, word))
    is_mixed = word.lower() != word != word.upper()
    is_one = word.isalnum() or _HEXADECIMAL.fullmatch(word) is not None
    return has_digits and (is_mixed or is_one)
