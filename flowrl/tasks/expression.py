"""Arithmetic answers: read without eval, valued exactly, and brought to a normal form.

    read_answer("7 + 3*5")  ->  Answer(value=22, numbers=(3, 5, 7), form="7+3*5")

Model text is hostile input: it is limited in length, alphabet, depth and magnitude, and whatever
breaks a limit is simply not an answer (None), never an exception.

The normal form identifies expressions that differ by commutativity and associativity only (chains
flattened with a-b as a+(-b) and a/b as a*b^-1, then sorted), so that these pairs are one solution:
`3*5+7`, `7+5*3`; `9-(2-1)`, `9+1-2`; `8/(2/3)`, `8*3/2`. It does not move a sign through a product
(`1-(2-3)*4` and `1+(3-2)*4` are two), nor drop neutral elements (`5*1` and `5/1` are two). A normal
form is itself an answer of the same value and the same numbers.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 200  # characters
MAX_DEPTH = 32  # nested operations; a chain a+b+c+... nests once per operator
MAX_MAGNITUDE = 10**18  # numerator and denominator of every literal and intermediate value

_ALPHABET = re.compile(r"[0-9+\-*/() ]+")  # ASCII only: Python also reads other scripts' digits
_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


@dataclass(frozen=True)
class Operation:
    """left operator right."""

    operator: str  # one of + - * /
    left: Expression
    right: Expression


Expression = int | Operation


@dataclass(frozen=True)
class Chain:
    """A sum (operator +) or product (*) of two or more sorted parts, none of them the same kind.

    `inverted` parts are subtracted, or divided by. `kept` is never empty: without a unary minus
    every expression has a leading part."""

    operator: str
    kept: tuple[Form, ...]
    inverted: tuple[Form, ...]
    text: str


Form = int | Chain


@dataclass(frozen=True)
class Answer:
    value: Fraction
    numbers: tuple[int, ...]  # the integers used, sorted, repeated as often as used
    form: str  # normal form


def read_answer(text: str) -> Answer | None:
    """The answer that `text` is, or None: not well-formed, over a limit, or a division by zero.

    Numbers are unsigned decimal integers; operators + - * / and parentheses; no unary sign."""
    expression = parse(text)
    if expression is None:
        return None
    result = value(expression)
    if result is None:
        return None
    return Answer(result, tuple(sorted(numbers(expression))), form_text(normal_form(expression)))


def parse(text: str) -> Expression | None:
    """The expression tree of `text`, or None where it is not one within the limits."""
    if len(text) > MAX_LENGTH or not _ALPHABET.fullmatch(text):
        return None
    try:
        tree = ast.parse(text.strip(" "), mode="eval")
    except (SyntaxError, MemoryError, RecursionError):
        # Besides plain syntax errors: the parser's own limits on nested parentheses, which some
        # Python versions report as MemoryError.
        return None
    return _convert(tree.body, MAX_DEPTH)


def _convert(node: ast.expr, depth: int) -> Expression | None:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value if node.value <= MAX_MAGNITUDE else None
    if not isinstance(node, ast.BinOp) or type(node.op) not in _OPERATORS or depth == 0:
        return None
    left = _convert(node.left, depth - 1)
    right = _convert(node.right, depth - 1)
    if left is None or right is None:
        return None
    return Operation(_OPERATORS[type(node.op)], left, right)


def value(expression: Expression) -> Fraction | None:
    """The exact value; None where it divides by zero or passes MAX_MAGNITUDE on the way."""
    if isinstance(expression, int):
        return Fraction(expression)
    left, right = value(expression.left), value(expression.right)
    if left is None or right is None or (expression.operator == "/" and right == 0):
        return None
    match expression.operator:
        case "+":
            result = left + right
        case "-":
            result = left - right
        case "*":
            result = left * right
        case _:
            result = left / right
    bounded = max(abs(result.numerator), result.denominator) <= MAX_MAGNITUDE
    return result if bounded else None


def numbers(expression: Expression) -> list[int]:
    """The integers of the expression, from left to right."""
    if isinstance(expression, int):
        return [expression]
    return numbers(expression.left) + numbers(expression.right)


def render(expression: Expression) -> str:
    """The expression as text, with only those parentheses that its value needs."""
    if isinstance(expression, int):
        return str(expression)
    own = _PRECEDENCE[expression.operator]

    def side(child: Expression, is_right: bool) -> str:
        text = render(child)
        if isinstance(child, int) or _PRECEDENCE[child.operator] > own:
            return text
        needed = _PRECEDENCE[child.operator] < own or (is_right and expression.operator in "-/")
        return f"({text})" if needed else text

    return f"{side(expression.left, False)}{expression.operator}{side(expression.right, True)}"


def normal_form(expression: Expression) -> Form:
    """The commutative and associative normal form. Defined by structure: it looks at no value."""
    if isinstance(expression, int):
        return expression
    left, right = normal_form(expression.left), normal_form(expression.right)
    operator = "+" if expression.operator in "+-" else "*"
    if expression.operator == operator:
        return chain(operator, (left, right), ())
    return chain(operator, (left,), (right,))


def chain(operator: str, kept: Iterable[Form], inverted: Iterable[Form]) -> Chain:
    """The flattened, sorted chain of these parts."""
    sides: tuple[list[Form], list[Form]] = ([], [])
    for flip, parts in enumerate((kept, inverted)):
        for part in parts:
            if isinstance(part, Chain) and part.operator == operator:
                sides[flip].extend(part.kept)  # a-(b-c): b joins the subtracted parts,
                sides[1 - flip].extend(part.inverted)  # and c the added ones
            else:
                sides[flip].append(part)
    plus, minus = (tuple(sorted(side, key=_sort_key)) for side in sides)
    inverse = "-" if operator == "+" else "/"
    text = operator.join(_part_text(p, operator) for p in plus)
    text += "".join(inverse + _part_text(p, operator) for p in minus)
    return Chain(operator, plus, minus, text)


def form_text(form: Form) -> str:
    return form.text if isinstance(form, Chain) else str(form)


def substitute(form: Form, values: Sequence[int]) -> Form:
    """The normal form with every integer i replaced by values[i]."""
    if isinstance(form, int):
        return values[form]
    return chain(
        form.operator,
        [substitute(part, values) for part in form.kept],
        [substitute(part, values) for part in form.inverted],
    )


def _part_text(part: Form, operator: str) -> str:
    text = form_text(part)
    return f"({text})" if isinstance(part, Chain) and operator == "*" else text


def _sort_key(form: Form) -> tuple[int, int, str]:
    return (0, form, "") if isinstance(form, int) else (1, 0, form.text)
