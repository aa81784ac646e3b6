"""Game of 24 and Blocks World: counts, answers, parents and log Z by independent enumeration."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest

from flowrl.config import ConfigError
from flowrl.records import Prompt, Rollout
from flowrl.tasks import blocksworld, game24
from flowrl.tasks.blocksworld import BlocksWorld
from flowrl.tasks.countdown_solver import solve
from flowrl.tasks.game24 import Game24, as_expression, problem_space
from flowrl.tasks.step_task import StepTask


@pytest.fixture(scope="module")
def small() -> Game24:
    return Game24(game24.Options(high=6))


@pytest.fixture(scope="module")
def blocks() -> BlocksWorld:
    return BlocksWorld(blocksworld.Options())


def hand(*numbers: int) -> Prompt:
    text = " ".join(map(str, numbers))
    return Prompt(0, f"{text}:", data={"problem": text, "numbers": list(numbers)})


def score(task: StepTask, prompt: Prompt, text: str):
    (found,) = task.score([Rollout(prompt, 0, (), (), False, 0, text)])
    return found


def test_known_counts_of_24(small):
    """Of all legal three-step answers: 15 and 61 are right; four ones have the fewest, 135."""
    assert small.num_answers({"numbers": [4, 5, 6, 10]})[1] == 15
    assert small.num_answers({"numbers": [1, 2, 3, 4]})[1] == 61
    assert small.num_answers({"numbers": [1, 1, 1, 1]}) == (135, 0)
    assert small.num_answers({"numbers": [7, 11, 12, 13]})[0] == 3888
    assert len(small.solutions(hand(4, 5, 6, 10))) == 15


def brute_force(numbers: list[Fraction], steps: int = 0) -> Counter[Fraction]:
    """Final values, once for every way to write the steps over positions; equal steps differ."""
    if len(numbers) == 1:
        return Counter(numbers)
    total: Counter[Fraction] = Counter()
    seen = set()
    for i, j in permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        results = {"-": a - b}
        if a >= b:
            results |= {"+": a + b, "*": a * b}
        if b:
            results["/"] = a / b
        for operator, value in results.items():
            if (a, operator, b) not in seen:
                seen.add((a, operator, b))
                total += brute_force([*rest, value])
    return total


@pytest.mark.parametrize("numbers", [(1, 3, 4, 6), (3, 3, 5, 5), (2, 2, 2, 2), (1, 5, 5, 5)])
def test_24_by_brute_force_with_fractions(small, numbers):
    values = brute_force([Fraction(n) for n in numbers])
    assert small.num_answers({"numbers": numbers}) == (sum(values.values()), values[Fraction(24)])
    outcomes = small.outcomes(hand(*numbers))
    assert len({o.text for o in outcomes}) == len(outcomes) == sum(values.values())
    assert sum(o.reward for o in outcomes) == values[Fraction(24)]


def test_a_problem_that_needs_a_fraction(small):
    """6 / (1 - 3/4): the only solution goes through 1|4."""
    prompt = hand(1, 3, 4, 6)
    assert small.solutions(prompt) == {"3/4=3|4,1-3|4=1|4,6/1|4=24"}
    assert score(small, prompt, "3/4=3|4,1-3|4=1|4,6/1|4=24").correct


@pytest.mark.parametrize(
    "text",
    [
        "", "10-4=6", "10-4=6,5*6=30", "10-4=6,6*5=30,30-6=25", "10-4=6,6*5=30,30-5=25",
        "10-4=6,6*5=30,30-6=24,24+0=24", "4+10=14,14+5=19,19+6=25", " 10-4=6,6*5=30,30-6=24",
        "10-4=6;6*5=30;30-6=24", "24", "__import__('os')", "9" * 10**6, ",,,",
    ],
)  # fmt: skip
def test_24_refuses_all_else(small, text):
    found = score(small, hand(4, 5, 6, 10), text)
    assert (found.reward, found.correct, found.solution, found.error) == (0.0, False, None, None)


def test_24_accepts_the_documented_answer(small):
    found = score(small, hand(4, 5, 6, 10), "10-4=6,6*5=30,30-6=24")
    assert (found.reward, found.correct) == (1.0, True)


def test_levels_of_a_solution():
    prompt = hand(1, 2, 3, 4)
    forms = Game24(game24.Options(high=6, solution="expression")).solutions(prompt)
    assert forms == {"1*2*3*4", "2*3*4/1", "(1+3)*(2+4)", "4*(1+2+3)"}
    assert forms == solve((1, 2, 3, 4), 24, exact_use=True)
    operators = Game24(game24.Options(high=6, solution="operations")).solutions(prompt)
    assert {"***", "**/", "*++"} <= operators
    text = "3*2=6,6*4=24,24*1=24"
    assert score(Game24(game24.Options(high=6, solution="expression")), prompt, text).solution == (
        "1*2*3*4"
    )
    assert score(Game24(game24.Options(high=6, solution="operations")), prompt, text).solution == (
        "***"
    )


def test_a_step_takes_the_equal_number_made_last():
    """(10 - 4) * 5 - 6 and 6 * 5 - (10 - 4) have the same steps: the made 6 is multiplied."""
    expression = as_expression([4, 5, 6, 10], "10-4=6,6*5=30,30-6=24")
    assert game24.form_text(game24.normal_form(expression)) == "5*(10-4)-6"


def test_split_of_24_is_alike_among_easy_and_hard():
    task = Game24(game24.Options(high=9))
    counts = problem_space(1, 9)
    sides = {
        split: {
            tuple(task.prompt(split, i).data["numbers"]) for i in range(task.num_prompts(split))
        }
        for split in ("train", "eval")
    }
    assert not sides["train"] & sides["eval"]
    assert sides["train"] | sides["eval"] == {h for h, count in counts.items() if count >= 4}
    for low, high in ((4, 20), (21, 60)):
        held, all_of = (
            sum(low <= counts[h] <= high for h in side)
            for side in (sides["eval"], sides["train"] | sides["eval"])
        )
        assert 0.1 < held / all_of < 0.3
    for index in range(200):
        prompt_text, _ = task.example(index)
        assert tuple(map(int, prompt_text[:-1].split(" "))) in sides["train"]


def test_blocks_world_has_the_known_states():
    for num_blocks, states, empty_arm, branching in ((3, 22, 13, 1.909), (4, 125, 73, 2.176)):
        found = blocksworld.reachable(num_blocks)
        assert len(found) == states
        assert sum(not arm for _, arm in found) == empty_arm
        moves = sum(len(blocksworld.actions(state)) for state in found)
        assert moves / states == pytest.approx(branching, abs=1e-3)
        assert len(blocksworld.problem_space(num_blocks)) == empty_arm * (empty_arm - 1)


def test_plans_by_powers_of_the_adjacency_matrix():
    """Walks that end at the goal the first time they meet it, of the allowed lengths."""
    for num_blocks, every in ((3, 1), (4, 131)):
        states = sorted(blocksworld.reachable(num_blocks))
        edges = np.zeros((len(states), len(states)), dtype=np.int64)
        for i, state in enumerate(states):
            for after in blocksworld.actions(state).values():
                edges[i, states.index(after)] += 1
        options = blocksworld.Options(num_blocks, max_steps=12)
        task, plans = BlocksWorld(options), []
        for start, goal, shortest in blocksworld.problem_space(num_blocks)[::every]:
            end = states.index((goal, ""))
            absorbing = edges.copy()
            absorbing[end] = 0
            walks = np.zeros(len(states), dtype=np.int64)
            walks[end] = 1
            expected = 0
            for _ in range(shortest + 2):
                walks = absorbing @ walks
                expected += walks[states.index((start, ""))]
            data = task._data((start, goal, shortest))
            assert task.num_answers(data)[1] == expected
            plans.append(expected)
        if num_blocks == 3:  # a shortest plan is unique; slack 2 makes 8 of it, at most 11
            assert (np.median(plans), max(plans)) == (8, 11)


def test_blocks_world_by_hand(blocks):
    prompt = Prompt(0, "", data={"start": ["ab"], "goal": ["a", "b"], "steps": 2})
    assert blocks.legal_actions(prompt, "") == ["Uba"]
    assert blocks.legal_actions(prompt, "Uba") == [",Sba", ",Db"]
    assert blocks.legal_actions(prompt, "Uba,Db") == []
    assert score(blocks, prompt, "Uba,Db").correct
    for text in ("Uba", "Uba,Sba", "Uba,Db,Tb", "Uab,Da", "Tb,Db", ""):
        assert score(blocks, prompt, text).reward == 0
    with pytest.raises(ValueError, match="must be legal actions of prompt"):
        blocks.legal_actions(prompt, "Db")


def test_partial_credit_counts_blocks_in_place():
    task = BlocksWorld(blocksworld.Options(partial_credit=0.3))
    prompt = Prompt(0, "", data={"start": ["abc"], "goal": ["a", "b", "c"], "steps": 4})
    assert score(task, prompt, "Ucb,Dc,Uba,Sbc").reward == pytest.approx(0.3 * 2 / 3)
    assert score(task, prompt, "Ucb,Dc,Uba,Db").reward == 1.0
    assert score(task, prompt, "Ucb,Dc").reward == 0.0  # not at its end


def some_prompts(small, blocks):
    return [(small, hand(2, 3, 3, 4)), (small, hand(1, 1, 1, 1))] + [
        (blocks, blocks.prompt("eval", i)) for i in range(3)
    ]


def prefixes(text: str) -> list[str]:
    actions = text.split(",")
    return [",".join(actions[: t + 1]) for t in range(len(actions))]


def test_log_partition_is_the_sum_over_all_answers(small, blocks):
    for task, prompt in some_prompts(small, blocks):
        total = success = 0.0
        for outcome in task.outcomes(prompt):
            before = ["", *prefixes(outcome.text)[:-1]]
            chance = math.prod(1 / len(task.legal_actions(prompt, text)) for text in before)
            total += chance
            success += chance * math.exp(2.0 * outcome.reward)
        assert total == pytest.approx(1)
        assert task.log_partition(prompt, 2.0) == pytest.approx(math.log(success))


def test_backward_probabilities_of_every_end_sum_to_one(small, blocks):
    """Over all ways into an end, products of 1 / num_parents: a distribution only if the parents
    are counted as edges of what the start can reach."""
    met_again = False
    for task, prompt in some_prompts(small, blocks):
        mass, ways = defaultdict(float), Counter()
        for outcome in task.outcomes(prompt):
            end = task.walk(prompt.data, outcome.text)
            parents = [task.num_parents(prompt, text) for text in prefixes(outcome.text)]
            mass[end] += math.prod(1 / n for n in parents)
            ways[end] += 1
        met_again = met_again or max(ways.values()) > 1
        assert all(m == pytest.approx(1) for m in mass.values())
    assert met_again  # without a state that several ways lead into, any parents would do


@pytest.mark.parametrize("task_name", ["small", "blocks"])
def test_examples_are_legal_and_right_by_chance(task_name, request):
    task = request.getfixturevalue(task_name)
    right = 0
    for index in range(300):
        prompt_text, answer = task.example(index)
        prompt = next(p for i in range(task.num_prompts("train"))
                      if (p := task.prompt("train", i)).text == prompt_text)  # fmt: skip
        assert task.legal_actions(prompt, answer) == []
        right += score(task, prompt, answer).correct
    assert right / 300 < 0.5


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (game24.build, {"low": 5, "high": 4}, "task.low and task.high"),
        (game24.build, {"eval_fraction": 0.0}, "task.eval_fraction"),
        (game24.build, {"high": 1, "min_solutions": 1}, "must leave problems on both sides"),
        (game24.build, {"solution": "form"}, "task.solution must be one of"),
        (blocksworld.build, {"num_blocks": 5}, "task.num_blocks must be 2 to 4"),
        (blocksworld.build, {"slack": 3}, "task.slack must be 0, 2, 4 or 6"),
        (blocksworld.build, {"min_steps": 9}, "task.min_steps and task.max_steps"),
        (blocksworld.build, {"partial_credit": 1.0}, "task.partial_credit"),
    ],
)
def test_impossible_options(build, options, message):
    with pytest.raises(ConfigError, match=message):
        build(options, 1.0)
