"""Secrets in arguments and variables, detected by their names, and their replacement in output and records."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_lrpath.plan.arguments import parser_facts

HIDDEN = "***"
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_WORDS = {"key", "token", "secret", "password", "passwd", "passphrase", "credential", "credentials"}
_WITHIN = ("secret", "password", "passwd", "apikey", "authtoken")
_PAIR = re.compile(r"([A-Za-z_][\w.-]*)([=:])([^\s,;]+)")
_IN_ADDRESS = re.compile(r"(\w+://[^\s/:@]*:)[^\s/@]+@")


def is_secret(name: str) -> bool:
    """Return whether an argument or variable with this name is a secret; none of Megatron's own arguments is."""
    plain = name.lstrip("-").replace("-", "_").lower()
    if plain in _megatron_names():
        return False
    words = {word.lower() for word in _WORD.findall(name)}
    return bool(words & _WORDS) or any(part in plain.replace("_", "") for part in _WITHIN)


@functools.cache
def _megatron_names() -> frozenset[str]:
    """Return the arguments of Megatron's parser, by destination and by spelling: `moe_token_dispatcher_type`."""
    return frozenset(
        name.replace("-", "_") for fact in parser_facts() for name in (fact["name"], *fact["options"])
    )


def hide_words(words: Sequence[str]) -> list[str]:
    """Return a command line without the values of secrets."""
    found: list[str] = []
    hiding = False  # the values that follow a secret's option
    for word in words:
        if word.startswith("--"):
            option, equals, _ = word.partition("=")
            hiding = is_secret(option) and not equals
            found.append(f"{option}={HIDDEN}" if equals and is_secret(option) else hide_text(word))
        else:
            found.append(HIDDEN if hiding else hide_text(word))
    return found


def hide_text(text: str) -> str:
    """Return text without the values after `NAME=` of a secret, and without passwords in URLs."""

    def hidden(match: re.Match[str]) -> str:
        return f"{match[1]}{match[2]}{HIDDEN}" if is_secret(match[1]) else match[0]

    return _PAIR.sub(hidden, _IN_ADDRESS.sub(rf"\g<1>{HIDDEN}@", text))


def hide_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return named values without those of secrets."""
    return {
        name: HIDDEN
        if value not in (None, "", False, True) and is_secret(name)
        else hide_text(value)
        if isinstance(value, str)
        else value
        for name, value in values.items()
    }


def hide_message(text: str) -> str:
    """Return a message that can quote a command line, without the values of secrets."""
    return " ".join(hide_words(text.split(" ")))


def secret_words(words: Sequence[str]) -> list[str]:
    """Return the names of the secrets whose values are in a command line."""
    shown = hide_words(words)
    names = []
    for number, (word, kept) in enumerate(zip(words, shown, strict=True)):
        if word != kept:
            behind_option = kept == HIDDEN and number and words[number - 1].startswith("--")
            names.append(words[number - 1] if behind_option else re.split(r"[=:]", kept)[0])
    return names


def secret_problem(words: Sequence[str]) -> str | None:
    """Return why words must not be on a child's command line, which all users of the machine can read; None
    if they can.
    """
    if not (names := secret_words(words)):
        return None
    return (
        f"{', '.join(dict.fromkeys(names))}: looks like a secret, and every user of the machine can read a command "
        "line. Export it as an environment variable (trainings and jobs inherit those of your shell, or of the "
        "settings' setup script) and let the training read it from there."
    )
