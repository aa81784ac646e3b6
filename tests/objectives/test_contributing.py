"""The worked example of CONTRIBUTING.md, "Adding an objective", run as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from loss_batches import assert_close, random_batch
from test_objective_gradients import differences, prepared_batch
from test_objective_invariance import prepared, sum_over_parts

from flowrl import objectives
from flowrl.objectives import Objective, build

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"
OBJECTIVE, TEST = "flowrl/objectives/maxrl.py", "tests/objectives/test_maxrl.py"


def blocks() -> dict[str, str]:
    """Path named in a block's first line -> the block."""
    section = GUIDE.read_text().split("## Adding an objective")[1].split("\n## ")[0]
    found = re.findall(r"```python\n# (\S+)\n(.*?)```", section, flags=re.DOTALL)
    return dict(found)


def load(path: str, text: str) -> ModuleType:
    module = ModuleType(path.removesuffix(".py").replace("/", "."))
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(text, path, "exec"), module.__dict__)
    return module


def register(monkeypatch, text: str) -> None:
    """As its line in POLICY_GRADIENTS would."""
    defined = [
        value
        for value in vars(load(OBJECTIVE, text)).values()
        if isinstance(value, type)
        and issubclass(value, Objective)
        and value.__module__ == "flowrl.objectives.maxrl"
    ]
    assert len(defined) == 1
    monkeypatch.setitem(objectives.OBJECTIVES, defined[0].name, defined[0])


def run_test() -> int:
    tests = [v for name, v in vars(load(TEST, blocks()[TEST])).items() if name.startswith("test_")]
    for test in tests:
        test()
    return len(tests)


@pytest.fixture(autouse=True)
def _clean_modules():
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_the_example_passes_its_test(monkeypatch):
    assert set(blocks()) == {OBJECTIVE, TEST}
    register(monkeypatch, blocks()[OBJECTIVE])
    assert run_test() == 1


def test_the_example_joins_the_shared_checks(monkeypatch):
    register(monkeypatch, blocks()[OBJECTIVE])
    objective = build("maxrl")
    batch = prepared(objective, random_batch(2, [4, 3]))
    whole = sum_over_parts(objective, batch, [torch.arange(7)])
    parts = sum_over_parts(objective, batch, [torch.arange(2), torch.arange(2, 7)])
    for found, expected in zip(parts, whole, strict=True):
        assert_close(found, expected)
    batch = prepared_batch(objective, seed=3)
    _, gradient = sum_over_parts(objective, batch, [torch.arange(batch.num_sequences)])
    assert_close(gradient, differences(objective, batch, moves_old=False), atol=1e-6, rtol=1e-6)


def test_the_examples_test_sees_a_mistake(monkeypatch):
    text = blocks()[OBJECTIVE]
    broken = text.replace("centred(rewards, group_ids) /", "centred(rewards, group_ids) *")
    assert broken != text
    register(monkeypatch, broken)
    with pytest.raises(AssertionError):
        run_test()


def test_the_guide_keeps_to_the_line_length():
    for text in blocks().values():
        assert max(map(len, text.splitlines())) <= 100
