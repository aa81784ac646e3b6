"""Arithmetic answers: what is read, exact values, the normal form, and hostile texts."""

from __future__ import annotations

import time
import warnings
from fractions import Fraction
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowrl.tasks.expression import (
    MAX_DEPTH,
    MAX_LENGTH,
    Expression,
    Operation,
    form_text,
    normal_form,
    numbers,
    parse,
    read_answer,
    render,
    value,
)

expressions: st.SearchStrategy[Expression] = st.recursive(
    st.integers(0, 12),
    lambda inner: st.builds(Operation, st.sampled_from("+-*/"), inner, inner),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "expected_value", "used", "form"),
    [
        ("3*5+7", 22, (3, 5, 7), "7+3*5"),
        ("7+5*3", 22, (3, 5, 7), "7+3*5"),
        (" ( 7 ) + (5*3) ", 22, (3, 5, 7), "7+3*5"),
        ("9-(2-1)", 8, (1, 2, 9), "1+9-2"),
        ("9+1-2", 8, (1, 2, 9), "1+9-2"),
        ("9-(2+1)", 6, (1, 2, 9), "9-1-2"),
        ("8/(2/3)", 12, (2, 3, 8), "3*8/2"),
        ("8*(3/2)", 12, (2, 3, 8), "3*8/2"),
        ("8/2/3", Fraction(4, 3), (2, 3, 8), "8/2/3"),
        ("8/(3*2)", Fraction(4, 3), (2, 3, 8), "8/2/3"),
        ("6*(5-(10-4))", -6, (4, 5, 6, 10), "6*(4+5-10)"),
        ("10-(2*3)/4", Fraction(17, 2), (2, 3, 4, 10), "10-2*3/4"),
        ("(1+2)*(3+0)", 9, (0, 1, 2, 3), "(0+3)*(1+2)"),
        ("5*1", 5, (1, 5), "1*5"),
        ("5/1", 5, (1, 5), "5/1"),
        ("12", 12, (12,), "12"),
        ("1-(2-3)*4", 5, (1, 2, 3, 4), "1-4*(2-3)"),
        ("1+(3-2)*4", 5, (1, 2, 3, 4), "1+4*(3-2)"),
        ("10+9", 19, (9, 10), "9+10"),
    ],
)
def test_hand_computed(text, expected_value, used, form):
    answer = read_answer(text)
    assert answer is not None
    assert (answer.value, answer.numbers, answer.form) == (expected_value, used, form)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "()", "+", "3+", "*3", "3 5", "3(5)", "(3)(5)", "3,5", "3;5", "3+5\n", "#3",
        "-3+5", "+3", "3--5", "2**3", "9**9**9", "7//2", "7%2", "1/0", "3/(2-2)", "0/0",
        "1/(2/(3-3))", "1.5+2", "1e9", "0x10", "1_000", "007", "3==3", "x", "3+x", "1j",
        "__import__('os').system('true')", "[3]", "lambda:3", "3 if 1 else 5", "\x003", "(3", "3)",
        "٣+٥", "²+3", "3×5", "３+５", "\ud800",  # noqa: RUF001
        "9" * 19, "9" * MAX_LENGTH, "9" * 5000, "*".join(["999999999"] * 3), "3" + "+1" * 40,
        "(" * MAX_LENGTH, "(" * 99 + "3" + ")" * 100, "-" * 199 + "3", "3+" * 99 + "3" + " " * 200,
    ],
)  # fmt: skip
def test_not_an_answer(text):
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_answer(text) is None
    assert time.perf_counter() - start < 0.5


def test_limits_are_where_they_are_said_to_be():
    assert read_answer("3" + " " * (MAX_LENGTH - 1)) is not None
    assert read_answer("3" + " " * MAX_LENGTH) is None
    assert read_answer("1" + "+1" * MAX_DEPTH) is not None
    assert read_answer("1" + "+1" * (MAX_DEPTH + 1)) is None
    assert read_answer("1" + "0" * 18) is not None
    assert read_answer("1" + "0" * 18 + "+1") is None
    assert read_answer("1/1" + "0" * 18 + "/10") is None  # a denominator past the limit
    assert read_answer("(" * 90 + "3" + ")" * 90) is not None


@given(st.text(alphabet="0123456789+-*/() ", max_size=40) | st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused(text):
    answer = read_answer(text)
    if answer is not None:  # then Python itself agrees, in exact arithmetic
        exact = eval(
            "".join(f"F({t})" if t.isdigit() else t for t in _tokens(text)), {"F": Fraction}
        )
        assert answer.value == exact


def _tokens(text: str) -> list[str]:
    spaced = "".join(c if c.isdigit() else f" {c} " for c in text.strip())
    return spaced.split()


@given(expressions)
@example(Operation("-", 0, Operation("+", 0, Operation("-", 0, 0))))
@settings(deadline=None)
def test_rendered_text_reads_back_to_the_same_value_and_form(expression):
    text = render(expression)
    again = parse(text)
    assert again is not None
    assert value(again) == value(expression)
    assert numbers(again) == numbers(expression)
    assert form_text(normal_form(again)) == form_text(normal_form(expression))
    distinct = "".join(  # of equal numbers another grouping may be the same by chance
        str(place) if token.isdigit() else token for place, token in enumerate(_tokens(text), 1)
    )
    form = form_text(normal_form(_parsed(distinct)))
    for i, character in enumerate(distinct):  # no pair of parentheses could be left out
        if character == "(":
            close = _closing(distinct, i)
            bare = parse(distinct[:i] + distinct[i + 1 : close] + distinct[close + 1 :])
            assert bare is None or form_text(normal_form(bare)) != form


def _parsed(text: str) -> Expression:
    found = parse(text)
    assert found is not None, text
    return found


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise AssertionError(text)


@given(expressions)
@settings(deadline=None)
def test_normal_form_is_an_answer_of_the_same_value_and_stays_itself(expression):
    exact = value(expression)
    text = form_text(normal_form(expression))
    again = parse(text)
    assert again is not None
    assert sorted(numbers(again)) == sorted(numbers(expression))
    assert form_text(normal_form(again)) == text
    if exact is not None:  # a form may be defined where 1/(1/0) was not, never the reverse
        assert value(again) == exact


@given(expressions, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_normal_form_is_invariant_under_commuting_and_reassociating(expression, random):
    moved = _shuffled(expression, random)
    assert form_text(normal_form(moved)) == form_text(normal_form(expression))


def test_the_shuffle_moves_and_a_wrong_move_is_seen():
    start = parse("1+2-3*(4/5)")
    assert start is not None
    seen = {_shuffled(start, Random(i)) for i in range(50)}
    assert len(seen) >= 10
    for wrong in ("1+2-3*(5/4)", "1-2-3*(4/5)", "1+2+3*(4/5)", "(1+2-3)*(4/5)"):
        other = parse(wrong)
        assert other is not None
        assert form_text(normal_form(other)) != form_text(normal_form(start))


def _shuffled(expression: Expression, random: Random) -> Expression:
    """An expression of the same laws: a+b = b+a, (a+b)+c = a+(b+c), (a-b)+c = a-(b-c), (a-b)-c =
    a-(b+c), and the same for * and /."""
    if isinstance(expression, int):
        return expression
    op = expression.operator
    left, right = _shuffled(expression.left, random), _shuffled(expression.right, random)
    plus, minus = ("+", "-") if op in "+-" else ("*", "/")
    if op == plus and random.random() < 0.5:
        left, right = right, left
    if isinstance(left, Operation) and left.operator in (plus, minus) and random.random() < 0.5:
        a, b, c = left.left, left.right, right
        inner = op if left.operator == plus else (minus if op == plus else plus)
        return Operation(left.operator, a, Operation(inner, b, c))
    return Operation(op, left, right)
