"""Countdown: the solver against brute force, known counts, scores, splits and examples."""

from __future__ import annotations

import random
import time
from fractions import Fraction
from itertools import combinations, combinations_with_replacement, permutations

import pytest

from flowrl.config import ConfigError
from flowrl.records import Prompt, Rollout
from flowrl.tasks.countdown import Countdown, Options, build, problem_space
from flowrl.tasks.countdown_solver import candidate_forms, forms, solve
from flowrl.tasks.expression import Expression, Operation, form_text, normal_form, read_answer

GAME_OF_24 = Options(num_numbers=4, high=13, target_low=24, target_high=24, exact_use=True)


def rollout(prompt: Prompt, text: str) -> Rollout:
    return Rollout(prompt, 0, (), (), False, 0, text)


def reward(task: Countdown, prompt: Prompt, text: str) -> float:
    (score,) = task.score([rollout(prompt, text)])
    assert score.error is None
    assert score.correct == (score.reward == 1.0)
    assert (score.solution is not None) == score.correct
    return score.reward


def every_tree(numbers: tuple[int, ...]) -> list[tuple[Fraction, Expression]]:
    """All expressions over the numbers in this order, with values: the independent brute force."""
    if len(numbers) == 1:
        return [(Fraction(numbers[0]), numbers[0])]
    found: list[tuple[Fraction, Expression]] = []
    for cut in range(1, len(numbers)):
        for a, left in every_tree(numbers[:cut]):
            for b, right in every_tree(numbers[cut:]):
                results = [("+", a + b), ("-", a - b), ("*", a * b)]
                results += [("/", a / b)] if b else []
                found += [(v, Operation(op, left, right)) for op, v in results]
    return found


def brute_force(numbers: tuple[int, ...], target: int, exact_use: bool) -> frozenset[str]:
    sizes = [len(numbers)] if exact_use else range(1, len(numbers) + 1)
    orders = {o for k in sizes for c in combinations(numbers, k) for o in permutations(c)}
    return frozenset(
        form_text(normal_form(tree)) for o in orders for v, tree in every_tree(o) if v == target
    )


def test_number_of_forms_over_distinct_slots():
    # T(n) = 2 S(n); S(n) sums, over set partitions into k >= 2 blocks, (2^k - 1) choices of signs
    # times the forms of the blocks: 3; 7 + 3*3*3; 15 + 6*3*7 + 3*9*3 + 4*34*3 = 630.
    assert [len(forms(tuple(range(n)))) for n in (1, 2, 3, 4)] == [1, 6, 68, 1260]
    for n in (2, 3, 4):
        assert len({form_text(f) for f in forms(tuple(range(n)))}) == len(forms(tuple(range(n))))
    assert len(candidate_forms((0, 0), True)) == 4  # a+a, a-a, a*a, a/a


@pytest.mark.parametrize("exact_use", [False, True])
def test_solver_is_complete_against_brute_force_three_numbers(exact_use):
    source = random.Random(0)
    for _ in range(60):
        numbers = tuple(sorted(source.randint(0, 9) for _ in range(3)))
        for target in source.sample(range(0, 40), 4):
            assert solve(numbers, target, exact_use) == brute_force(numbers, target, exact_use)


def test_solver_is_complete_against_brute_force_four_numbers():
    hands = [(4, 5, 6, 10), (1, 2, 3, 4), (3, 3, 8, 8), (1, 5, 5, 5), (2, 2, 4, 12), (1, 1, 1, 1)]
    for numbers in hands:
        assert solve(numbers, 24, True) == brute_force(numbers, 24, True)
    zero = (0, 1, 2, 3)  # 1/(2+3/0) must not count as 0
    assert solve(zero, 0, True) == brute_force(zero, 0, True)
    assert solve((3, 3, 8, 8), 24, True) == {"8/(3-8/3)"}
    assert solve((1, 1, 1, 1), 24, True) == frozenset()


def test_game_of_24_has_1362_solvable_hands():
    hands = {numbers for numbers, _ in problem_space(GAME_OF_24)}
    assert len(list(combinations_with_replacement(range(1, 14), 4))) == 1820
    assert len(hands) == 1362
    task = Countdown(GAME_OF_24)
    prompt = Prompt(0, "", data={"numbers": [3, 3, 8, 8], "target": 24})
    assert task.solutions(prompt) == {"8/(3-8/3)"}
    assert reward(task, prompt, "8/(3-8/3)") == 1
    assert reward(task, prompt, "3*8") == 0  # not every number
    at_most_once = Countdown(Options(target_high=24))
    assert reward(at_most_once, prompt, "3*8") == 1


def test_problem_space_is_what_the_solver_says():
    options = Options(low=2, high=6, target_high=30)
    expected = {
        (numbers, target)
        for numbers in combinations_with_replacement(range(2, 7), 3)
        for target in range(1, 31)
        if target not in numbers and solve(numbers, target, False)
    }
    assert set(problem_space(options)) == expected
    for least in (2, 4):
        fewer = Options(low=2, high=6, target_high=30, min_solutions=least)
        assert set(problem_space(fewer)) == {
            (n, t) for n, t in expected if len(solve(n, t, False)) >= least
        }


def test_default_problem_space_takes_under_a_few_seconds():
    problem_space.cache_clear()
    candidate_forms.cache_clear()
    start = time.perf_counter()
    task = Countdown(Options())
    assert time.perf_counter() - start < 3
    assert task.num_prompts("train") + task.num_prompts("eval") == len(problem_space(Options()))
    assert 2000 < len(problem_space(Options())) < 3000


def test_every_listed_solution_scores_and_none_is_missed():
    task = Countdown(Options())
    for index in range(40):
        prompt = task.prompt("eval", index)
        solutions = task.solutions(prompt)
        assert solutions
        scores = task.score([rollout(prompt, text) for text in sorted(solutions)])
        assert [s.solution for s in scores] == sorted(solutions)
        assert all(s.correct and s.reward == 1.0 for s in scores)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3*5+7", 1), ("7+5*3", 1), (" 3 * 5 + 7", 1), ("(3*5)+7", 1), ("3*(5+7)", 0),
        ("22", 0), ("11+11", 0), ("3*5+7+7-7", 0), ("3*5+7*1", 0), ("3*5+7=22", 0), ("", 0),
        ("9**9**9", 0), ("1/0", 0), ("__import__('os')", 0), ("(" * 10000, 0), ("1+" * 10**6, 0),
        ("٣*5+7", 0), ("-3+5", 0),
    ],
)  # fmt: skip
def test_scores_by_hand(text, expected):
    task = Countdown(Options())
    prompt = Prompt(0, "3 5 7=22:", data={"numbers": [3, 5, 7], "target": 22})
    start = time.perf_counter()
    assert reward(task, prompt, text) == expected
    assert time.perf_counter() - start < 0.5


def test_a_number_may_be_used_as_often_as_it_is_given():
    task = Countdown(Options())
    twice = Prompt(0, "", data={"numbers": [2, 4, 4], "target": 8})
    once = Prompt(0, "", data={"numbers": [2, 4, 5], "target": 8})
    assert (reward(task, twice, "4+4"), reward(task, once, "4+4")) == (1, 0)


def test_splits_are_disjoint_and_depend_on_the_problem_not_on_its_neighbours():
    task = Countdown(Options())
    train, held = _problems(task, "train"), _problems(task, "eval")
    assert len(train) == task.num_prompts("train")  # one epoch: each exactly once
    assert len(held) == task.num_prompts("eval")
    assert not train & held
    assert 0.07 < len(held) / len(train | held) < 0.13
    wider = Countdown(Options(high=10))
    assert held <= _problems(wider, "eval")
    assert train <= _problems(wider, "train")
    assert _problems(Countdown(Options(seed=1)), "eval") != held


def _problems(task: Countdown, split: str) -> set[str]:
    return {task.prompt(split, i).data["problem"] for i in range(task.num_prompts(split))}


def test_prompt_text_and_data():
    prompt = Countdown(Options()).prompt("train", 3)
    numbers, target = prompt.data["numbers"], prompt.data["target"]
    assert prompt.text == " ".join(map(str, numbers)) + f"={target}:"
    assert prompt.index == 3
    assert target not in numbers


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        (Options(), 0.02, 0.05),
        (Options(min_solutions=2), 0.04, 0.09),
        (Options(num_numbers=4), 0.004, 0.02),
    ],
)
def test_examples_are_well_formed_and_right_only_by_chance(options, least, most):
    task = Countdown(options)
    train = _problems(task, "train")
    alphabet = set(task.alphabet or "")
    right, sizes = 0, set()
    for index in range(2000):
        prompt_text, answer = task.example(index)
        assert prompt_text[:-1] in train
        assert set(prompt_text + answer) <= alphabet
        left, target = prompt_text[:-1].split("=")
        numbers = [int(n) for n in left.split()]
        read = read_answer(answer)
        assert read is not None
        assert all(read.numbers.count(n) <= numbers.count(n) for n in read.numbers)
        sizes.add(len(read.numbers))
        right += read.value == int(target)
    assert sizes == set(range(2, options.num_numbers + 1))
    assert least < right / 2000 < most
    assert [task.example(i) for i in range(20)] == [
        Countdown(options).example(i) for i in range(20)
    ]
    assert len({task.example(i) for i in range(20)}) > 15


def test_exact_use_examples_use_every_number():
    task = Countdown(GAME_OF_24)
    for index in range(50):
        prompt_text, answer = task.example(index)
        read = read_answer(answer)
        assert read is not None
        assert " ".join(map(str, read.numbers)) == prompt_text.split("=")[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_number": 3}, "unknown setting task.num_number; did you mean task.num_numbers?"),
        ({"num_numbers": 7}, "task.num_numbers must be 2 to 4, got 7"),
        ({"low": 5, "high": 4}, "task.low and task.high"),
        ({"target_low": 9, "target_high": 8}, "task.target_low and task.target_high"),
        ({"eval_fraction": 1.0}, "task.eval_fraction"),
        ({"min_solutions": 0}, "task.min_solutions"),
        ({"num_numbers": 4, "high": 99}, "lower task.high"),
        ({"high": 1, "target_low": 50}, "holding out 0.1 of 0 problems"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        build(options, 1.0)
