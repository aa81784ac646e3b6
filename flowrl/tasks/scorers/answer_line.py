"""Reward of a mathematical answer on a line `Answer: ...`: +1 if it is the reference answer, -1 if
not. After the training rewards of FlowRL and DAPO (arXiv:2509.15207, arXiv:2503.14476).

The last such line within the response's last 300 characters counts. Both sides are brought into one
form (`normal_form`) and compared as texts, or as exact fractions where both are numbers. There is
no algebra in it: that is what the scorer `math_verify` is for.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

WINDOW = 300  # characters at the end of a response
ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:/\d+)?")
WRAPPER = re.compile(r"\\(?:boxed|fbox|mbox|text|textbf|textit|mathrm|mathbf)\s*\{")
FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
DECORATION = re.compile(
    r"\\[()\[\]!,;:$% ]|\\(?:left|right)(?![a-z])|\^\{?\\circ\}?|\\(?:degree|circ)|[$%°*`]"
)
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
UNITS = re.compile(
    r"\s*(?<![a-z])(?:square|cubic|sq|squares?|units?|points?|ways?|times|integers?|digits?|numbers?|pairs?"
    r"|solutions?|people|students?|sides|edges|mm|cm|dm|km|in|ft|mph|inch(?:es)?|foot|feet|yards?"
    r"|miles?|(?:centi|milli|kilo)?met(?:er|re)s?|(?:kilo|milli)?grams?|kg|pounds?|lbs?|ounces?"
    r"|seconds?|sec|minutes?|min|hours?|hrs?|days?|weeks?|months?|years?|degrees?|radians?"
    r"|dollars?|cents?|percent)\b\.?\s*(?:\^\{?[23]\}?)?\s*$",
    re.IGNORECASE,
)


def score(prompt: str, response: str, answer: str, row: dict[str, Any]) -> dict[str, Any]:
    lines = ANSWER.findall(response[-WINDOW:])
    right = bool(lines) and equal(lines[-1], answer)
    return {"reward": 1.0 if right else -1.0, "correct": right}


def equal(given: str, reference: str) -> bool:
    given, reference = normal_form(given), normal_form(reference)
    if given == reference:
        return bool(given)
    value = number(given)
    return value is not None and value == number(reference)


def normal_form(answer: str) -> str:
    r"""What follows the last `=`, without LaTeX's wrappers and decorations, units at the end,
    commas between thousands and white space: `$x = \boxed{1{,}200\text{ cm}}$.` is `1200`."""
    text = _unwrapped(answer).rsplit("=", 1)[-1].replace("{,}", ",")
    text = FRACTION.sub(lambda m: f"{m[1] or m[2]}/{m[3] or m[4]}", text)
    text = THOUSANDS.sub("", DECORATION.sub("", text)).strip().rstrip(".")
    while (without := UNITS.sub("", text)) and without != text:
        text = without
    return re.sub(r"\s", "", text)


def number(text: str) -> Fraction | None:
    r"""The exact value of `-3`, `0.5`, `.5` or `1/2`; None for anything else."""
    if not NUMBER.fullmatch(text):
        return None
    above, _, below = text.partition("/")
    return Fraction(above) / int(below or 1) if int(below or 1) else None


def _unwrapped(text: str) -> str:
    r"""Every `\boxed{...}` and the like replaced by what is inside."""
    while match := WRAPPER.search(text):
        end, depth = match.end(), 1
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        inside = text[match.end() : end - (not depth)]
        text = f"{text[: match.start()]} {inside} {text[end:]}"
    return text
