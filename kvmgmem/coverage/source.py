"""The functions of a C file in the kernel's style: where each begins and ends."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

_NAME = re.compile(r"\b(?!__attribute__|__printf)([A-Za-z_]\w*)\s*\(")


@dataclass(frozen=True)
class Function:
    """A function's name, its first line (where its type stands) and its last, counted from 1."""

    name: str
    first: int
    last: int


class Source:
    """A source file's lines, and whose they are."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        self.functions = tuple(_functions(self.lines))
        self._starts = [function.first for function in self.functions]

    def text(self, number: int) -> str:
        """A line without the white space around it, and with single spaces in it."""
        return " ".join(self.lines[number - 1].split()) if 0 < number <= len(self.lines) else ""

    def text_before(self, number: int) -> str:
        """The last line above that is neither empty nor a part of a comment."""
        for above in range(number - 1, 0, -1):
            text = self.text(above)
            if text and not text.startswith(("/*", "*", "//")):
                return text
        return ""

    def function_of(self, number: int) -> str:
        """The name of the function that a line is in; "" outside of all."""
        index = bisect_right(self._starts, number) - 1
        return self.functions[index].name if index >= 0 and number <= self.functions[index].last else ""


def _functions(lines: Sequence[str]) -> list[Function]:
    """Kernel style: what begins at the margin, has its brace there alone, and ends with one there."""
    found = []
    number = 0
    while number < len(lines):
        if lines[number] != "{":
            number += 1
            continue
        begin = number
        while begin > 0 and lines[begin - 1].strip() and not lines[begin - 1].rstrip().endswith(("}", ";", "*/")):
            if lines[begin - 1].startswith("#"):
                break
            begin -= 1
        end = next((at for at in range(number, len(lines)) if lines[at].startswith("}")), len(lines) - 1)
        if name := _NAME.search(" ".join(lines[begin:number])):
            found.append(Function(name[1], begin + 1, end + 1))
        number = end + 1
    return found
