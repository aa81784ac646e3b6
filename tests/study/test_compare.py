"""`flowrl compare` end to end on the smoke study: runs, controls, resuming, failing, reporting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flowrl.cli import main
from flowrl.settings import RECIPES_DIR
from flowrl.study.controls import rejection


@pytest.fixture(scope="module")
def study(tmp_path_factory, base_cache) -> Path:
    """The smoke study with an arm that cannot go on, in a directory of its own."""
    folder = tmp_path_factory.mktemp("study")
    text = (RECIPES_DIR / "studies" / "smoke.toml").read_text()
    cache = f'[worlds.toy_tree.settings.base]\ncache_dir = "{base_cache}"\n'
    text = text.replace("[worlds.toy_tree.settings.base]\n", cache)
    text += (
        "\n[arms.broken]\nsettings = { objective = { name = 'tb' }, "
        "optimizer = { lr = 1e30, grad_clip = 0.0 } }\n"
    )
    path = folder / "smoke.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def results(study) -> dict:
    """Of a study of which one run was cut short and one arm fails."""
    out = ["--out", str(study.parent), "--workers", "2"]
    with pytest.raises(SystemExit) as stopped:
        main(["compare", str(study), *out])
    assert stopped.value.code == 1
    return json.loads((study.parent / "smoke" / "study.json").read_text())


def test_a_failing_arm_is_reported_and_the_others_go_on(results):
    status = {(r["arm"], r["seed"]): r["status"] for r in results["runs"] if not r["point"]}
    assert status == {
        ("vargrad", 0): "done", ("vargrad", 1): "done", ("grpo", 0): "done", ("grpo", 1): "done",
        ("broken", 0): "failed", ("broken", 1): "failed",
    }  # fmt: skip
    failed = next(r for r in results["runs"] if r["status"] == "failed")
    assert failed["message"]
    assert "intervals" not in next(p for p in results["points"] if p["arm"] == "broken")


def test_every_number_has_its_command_and_its_target(results):
    for run in results["runs"]:
        assert run["command"].startswith("flowrl train toy_tree_cpu ")
        assert f"--seed {run['seed']}" in run["command"]
    points = {p["label"]: p for p in results["points"]}
    assert points["vargrad"]["target"]["nominal_beta"] == 3.0
    assert points["vargrad"]["target"]["fixed_point"]["length_normalised"] is False
    assert points["vargrad beta=1.0"]["target"]["nominal_beta"] == 1.0
    assert points["grpo"]["target"] == {
        "beta": 3.0, "nominal_beta": None, "fixed_point": None, "reference_version": 0,
    }  # fmt: skip
    assert points["vargrad"]["seeds"] == [0, 1]
    interval = points["vargrad"]["intervals"]["l1_to_target"]
    assert 0 < interval["low"] <= interval["mean"] <= interval["high"] < 2
    for name in ("pass@1", "self_bleu", "vendi", "judge_score", "creativity", "for_diversity"):
        assert name in points["grpo"]["intervals"], name


def test_a_runs_numbers_are_those_of_its_directory(results):
    run = next(r for r in results["runs"] if r["arm"] == "grpo")
    lines = (Path(run["directory"]) / "metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, lines) if row["kind"] == "eval"][-1]
    for name in ("l1_to_target", "effective_modes", "expected_coverage", "success_exact"):
        assert run["per_prompt"][name] == [pytest.approx(last[f"diversity/{name}"], rel=1e-5)]
    environment = json.loads((Path(run["directory"]) / "env.json").read_text())
    assert environment["command"] == run["command"]
    assert environment["threads"] == 1


def test_controls_are_exact(results):
    def held(kind, value, source=None):
        return next(
            c["intervals"] for c in results["controls"]
            if (c["kind"], c["value"]) == (kind, value) and source in (None, c["source"])
        )  # fmt: skip

    assert held("target", 3.0)["l1_to_target"]["mean"] == pytest.approx(0.0, abs=1e-9)
    assert held("target", 1.0)["l1_to_target"]["mean"] > 0.1
    one, many = held("rejection", 1)["success_exact"], held("rejection", 16)["success_exact"]
    assert many["mean"] == pytest.approx(1 - (1 - one["mean"]) ** 16, rel=1e-4)
    same = next(p for p in results["points"] if p["label"] == "grpo")["intervals"]
    at_one = held("temperature", 1.0, "grpo")
    assert at_one["l1_to_target"]["mean"] == pytest.approx(same["l1_to_target"]["mean"], rel=1e-4)
    assert at_one["effective_modes"]["mean"] < held("temperature", 2.0)["effective_modes"]["mean"]


def test_what_is_done_is_skipped_and_what_was_cut_short_is_resumed(results, study, capsys):
    folder = study.parent / "smoke" / "toy_tree"
    kept = folder / "grpo" / "seed_0" / "metrics.jsonl"
    before = kept.read_bytes(), kept.stat().st_mtime_ns
    cut = folder / "vargrad" / "seed_1"  # killed after its only checkpoint was lost
    whole = (cut / "metrics.jsonl").read_bytes()
    shutil.rmtree(cut / "checkpoints")
    (cut / "report.html").unlink()
    args = ["compare", str(study), "--out", str(study.parent), "--workers", "1"]
    main([*args, "--arms", "vargrad,grpo"])
    shown = capsys.readouterr().out
    assert "5 runs, 4 of them done" in shown
    assert "vargrad seed 1: done" in shown
    assert (kept.read_bytes(), kept.stat().st_mtime_ns) == before
    assert (cut / "metrics.jsonl").read_bytes() == whole


def test_a_study_that_was_moved_goes_on_where_it_is(results, study, capsys, tmp_path):
    shutil.copytree(study.parent / "smoke", tmp_path / "smoke")
    main(["compare", str(study), "--out", str(tmp_path), "--arms", "grpo", "--workers", "1"])
    assert "2 runs, 2 of them done" in capsys.readouterr().out


def test_a_misspelt_table_of_a_worlds_recipe_is_refused(study, capsys, tmp_path):
    recipe = tmp_path / "mine.toml"
    shipped = (RECIPES_DIR / "toy_tree_cpu.toml").read_text()
    recipe.write_text(shipped + "\n[objective.vargrd]\nbeta = 3.0\n")
    changed = tmp_path / "smoke.toml"
    changed.write_text(study.read_text().replace('"toy_tree_cpu"', f'"{recipe}"'))
    with pytest.raises(SystemExit) as stopped:
        main(["compare", str(changed), "--out", str(tmp_path), "--dry-run"])
    assert stopped.value.code == 2
    assert "[objective.vargrd] names no objective" in capsys.readouterr().err


def test_other_settings_in_a_directory_are_refused(results, study, capsys, tmp_path):
    changed = tmp_path / "smoke.toml"
    changed.write_text(study.read_text().replace("\nsteps = 4", "\nsteps = 5"))
    with pytest.raises(SystemExit) as stopped:
        main(["compare", str(changed), "--out", str(study.parent)])
    assert stopped.value.code == 2
    assert "trainer.steps=4" in capsys.readouterr().err


def test_the_page_is_self_contained_and_the_table_is_markdown(results, study, capsys):
    main(["compare", str(study), "--out", str(study.parent), "--report"])
    page = (study.parent / "smoke" / "study.html").read_text()
    for name in ("coverage", "kl", "l1", "modes", "found"):
        assert f'id="fig-toy_tree-{name}"' in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "vargrad beta=1.0" in page
    assert "2 runs are not done yet" in page
    capsys.readouterr()
    main(["compare", str(study), "--out", str(study.parent), "--table"])
    table = capsys.readouterr().out
    assert "## toy_tree" in table
    assert "| vargrad | pi_ref exp(3 r)/Z |" in table
    assert "| rejection from pi_ref, at most 16 draws |" in table


def test_dry_run_lists_commands_and_trains_nothing(study, capsys, tmp_path):
    main(["compare", str(study), "--out", str(tmp_path), "--dry-run"])
    shown = capsys.readouterr().out
    assert "7 runs" in shown
    assert shown.count("flowrl train toy_tree_cpu") == 7
    assert not list(tmp_path.iterdir())


def test_rejection_by_hand():
    class Answers:
        reference = (0.1, 0.3, 0.6)
        solutions = ("a", "b", None)

    assert rejection(Answers(), 1) == pytest.approx([0.1, 0.3, 0.6])  # type: ignore[arg-type]
    found = rejection(Answers(), 2)  # type: ignore[arg-type]
    assert found == pytest.approx([0.1 * 1.6, 0.3 * 1.6, 0.36])
    assert found.sum() == pytest.approx(1.0)
    many = rejection(Answers(), float("inf"))  # type: ignore[arg-type]
    assert many == pytest.approx([0.25, 0.75, 0.0])


def test_a_place_where_no_study_can_lie(study, capsys, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        main(["compare", str(study), "--out", str(tmp_path / "file" / "studies")])
    assert stopped.value.code == 2
    assert "Not a directory; choose another with --out DIR" in capsys.readouterr().err
