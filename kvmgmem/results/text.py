"""Text of tests and kernels made safe to print: no control character reaches a terminal or a parser."""

import os
from collections.abc import Mapping
from typing import Final, TextIO

EXCERPT_HEAD: Final = 8
EXCERPT_TAIL: Final = 24


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def printable(text: str) -> str:
    """Return the text with control characters, lone surrogates and the like as escapes; newlines and tabs stay."""
    if text.isprintable():
        return text
    return "".join(character if character in "\n\t" else _visible(character) for character in text)


def one_line(text: str) -> str:
    """Return the text on one line: `printable`, with newlines and tabs as escapes too."""
    return text if text.isprintable() else "".join(map(_visible, text))


def lines_of(text: str) -> list[str]:
    """Return the lines of the text, each printable. Only a newline ends a line; CR before it is dropped."""
    return [printable(line.removesuffix("\r")) for line in text.rstrip("\n").split("\n")] if text else []


def excerpt(lines: list[str]) -> list[str]:
    """Return the first and last of many lines, with the number of those left out between them."""
    left_out = len(lines) - EXCERPT_HEAD - EXCERPT_TAIL
    if left_out <= 1:
        return lines
    return [*lines[:EXCERPT_HEAD], f"... {left_out} lines left out ...", *lines[-EXCERPT_TAIL:]]


def wants_colour(out: TextIO, environment: Mapping[str, str] | None = None) -> bool:
    """Say whether to colour what goes to `out`: a terminal, not a dumb one, and NO_COLOR unset or empty."""
    environment = os.environ if environment is None else environment
    return out.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"
