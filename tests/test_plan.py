"""Shapes, plans and the recipes of large models: exact counts, and settings that are refused."""

import dataclasses
import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from flowrl.cli import main
from flowrl.model_shape import check_fp8, check_split, read_shape, shape_names, shape_of
from flowrl.parallel_config import ParallelConfig
from flowrl.plan import Assumptions, _stage_parameters, make_plan, remedies
from flowrl.schema import ConfigError
from flowrl.settings import load

torch = pytest.importorskip("torch")
GIVEN = Assumptions("h100", 32, 4096, 256, frozenset({"ref", "log_z"}), 52_464_641, True)
SMALL = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-32b", 32_763_876_352),
    ],
)
def test_shipped_shapes_have_the_models_parameters(name, count):
    assert read_shape(name).num_parameters == count
    assert name in shape_names()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_count_is_that_of_the_model(tmp_path, family, tied):
    fields = {**SMALL, "model_type": family, "tie_word_embeddings": tied}
    fields |= {"head_dim": 16} if family == "qwen3" else {}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert read_shape(tmp_path).num_parameters == model.num_parameters()


def test_the_processes_of_a_replica_hold_the_model_together():
    shape, config = read_shape("qwen2.5-32b"), load("qwen2.5_32b_math")
    for tensor, pipeline in ((8, 1), (4, 4), (2, 8)):
        layout = dataclasses.replace(config.parallel, tensor=tensor, pipeline=pipeline)
        stages = _stage_parameters(dataclasses.replace(config, parallel=layout), shape)
        norms = (2 * shape.num_layers + 1) * shape.hidden_size  # whole on every tensor rank
        assert sum(stages) * tensor == shape.num_parameters + norms * (tensor - 1)


def test_what_does_not_fit_names_a_setting_that_does():
    shape, config = read_shape("qwen2.5-32b"), load("qwen2.5_32b_math")
    assert make_plan(config, shape, GIVEN).fits
    always = dataclasses.replace(config.rollout, sleep=False, gpu_memory_utilization=0.45)
    awake = dataclasses.replace(config, rollout=always)
    layout = dataclasses.replace(config.parallel, tensor=4)
    wide = dataclasses.replace(config, parallel=layout)
    for changed, remedy in ((awake, "rollout.sleep=true"), (wide, "parallel.tensor=8")):
        assert not make_plan(changed, shape, GIVEN).fits
        assert remedy in list(remedies(changed, shape, GIVEN))


def test_host_memory_and_fp8_copies_are_listed():
    shape, config = read_shape("qwen2.5-32b"), load("qwen2.5_32b_math")
    plan = make_plan(config, shape, GIVEN)
    count = plan.parameters_per_process
    assert sum(plan.host.values()) == (4 + 12) * count + 2 * shape.num_parameters / 8
    eight = load("qwen2.5_32b_math", {"model": {"fp8": "hybrid"}})
    matrices = shape.num_layers * shape.layer_matrices / 8
    more = make_plan(eight, shape, GIVEN).memory.peak - plan.memory.peak
    assert more == pytest.approx(2 * matrices)


def test_operations_are_six_per_parameter_and_token_and_the_attentions():
    """The updates of a model whose vocabulary and attention are small beside its matrices."""
    shape = dataclasses.replace(read_shape("qwen2.5-32b"), vocab_size=8)
    config = load("qwen2.5_32b_math", {"parallel": {"recompute": "none"}})
    plan = make_plan(config, shape, dataclasses.replace(GIVEN, response_tokens=1, prompt_tokens=1))
    matrices = shape.num_layers * shape.layer_matrices
    expected = 6 * matrices * plan.tokens_per_step
    assert plan.flops["updates: layers, forward and backward"] == pytest.approx(expected, rel=1e-3)


def test_plan_prints_the_table(capsys):
    main(["plan", "qwen2.5_32b_math"])
    printed = capsys.readouterr().out
    assert "32,763,876,352 (32.8B)" in printed
    assert "fits: " in printed
    main(["plan", "qwen2.5_1.5b_math"])
    assert "fits: " in capsys.readouterr().out
    main(["plan", "qwen2.5_32b_math", "--parallel.tensor", "4"])
    assert "does not fit" in capsys.readouterr().out


def test_remedies_are_settings_of_the_backend(capsys):
    """And each of them, set, makes the plan fit."""
    args = ["plan", "qwen2.5_1.5b_math", "--model.gradient_checkpointing", "false"]
    main(args)
    said = capsys.readouterr().out.strip().splitlines()[-1]
    remedies = said.partition("set one of: ")[2].split(", ")
    assert [r.partition("=")[0] for r in remedies] == [
        "model.gradient_checkpointing", "batch.tokens_per_microbatch"
    ]  # fmt: skip
    for remedy in remedies:
        main([*args, f"--{remedy}"])
        assert "fits: " in capsys.readouterr().out.strip().splitlines()[-1]


def refused(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        main(list(args))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_plan_without_a_shape_says_what_to_set(capsys):
    assert "set model.shape to qwen2.5-1.5b, qwen2.5-32b, qwen2.5-7b or" in refused(
        capsys, "plan", "countdown_cpu"
    )
    assert "h100" in refused(capsys, "plan", "qwen2.5_32b_math", "--gpu", "h10")


@pytest.fixture
def task(tmp_path):
    rows = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scorer = tmp_path / "scorer.py"
    scorer.write_text("def score(prompt, response, answer, row):\n    return 1.0\n")
    return ["--task.train", str(tmp_path / "train.jsonl"), "--task.eval", "",
            "--task.scorer", f"{scorer}:score"]  # fmt: skip


@pytest.mark.parametrize("recipe", ["qwen2.5_7b_math", "qwen2.5_32b_math"])
def test_dry_runs_of_the_large_recipes_need_no_gpu_and_no_weights(recipe, task, capsys):
    main(["train", recipe, "--dry-run", *task])
    printed = capsys.readouterr().out
    assert "512 x 8 = 4096" in printed
    assert "weights and tokenizer have not been looked at" in " ".join(printed.split())


def test_the_recipes_have_the_papers_settings():
    for name in ("qwen2.5_7b_math", "qwen2.5_32b_math"):
        config = load(name)
        batch, optimizer, rollout = config.batch, config.optimizer, config.rollout
        assert (batch.prompts_per_step, batch.prompts_per_update, batch.group_size) == (512, 32, 8)
        assert batch.tokens_per_microbatch == 10_240
        assert (optimizer.lr, optimizer.warmup_updates, optimizer.grad_clip) == (1e-6, 10, 1.0)
        assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.999), 0.1)
        assert (rollout.max_prompt_tokens, rollout.max_new_tokens) == (2048, 8192)
        assert rollout.temperature == 1.0
        assert config.objective.options["beta"] == 15.0


def test_a_layout_that_the_model_does_not_divide_into_is_refused(task, capsys):
    args = ("train", "qwen2.5_7b_math", "--dry-run", *task, "--parallel.processes", "8")
    assert "key-value heads" in refused(capsys, *args, "--parallel.tensor", "8")
    assert "must divide the model's 28 layers" in refused(
        capsys, *args, "--parallel.tensor", "1", "--parallel.pipeline", "8",
        "--parallel.sequence", "false",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 2}, "parallel.context must be 1"),
        ({"sequence": True}, "set parallel.tensor=2"),
        ({"virtual_pipeline": 2}, "set parallel.virtual_pipeline=1"),
        ({"pipeline": 2, "virtual_pipeline": 2, "overlap_p2p": False}, "wrong gradients"),
        ({"tensor": 0}, "must be >= 1"),
        ({"tensor": 4, "processes": 6}, "parallel.processes=8"),
    ],
)
def test_known_bad_layouts_are_refused_with_the_remedy(settings, message):
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel": {"tensor": 2}}, "set model.backend=megatron"),
        ({"model": {"fp8": "hybrid"}}, "needs model.backend=megatron"),
        ({"model": {"backend": "megatron", "fp8": "e4m3"}}, "needs model.dtype=bfloat16"),
        ({"model": {"backend": "megatron", "gradient_checkpointing": True}}, "recompute=full"),
    ],
)  # fmt: skip
def test_settings_that_nothing_would_read_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load("countdown_cpu", settings)


def test_matrices_that_fp8_does_not_take_are_refused():
    check_fp8(read_shape("qwen2.5-7b"), ParallelConfig(tensor=4), "blockwise")
    check_fp8(read_shape("qwen2.5-32b"), ParallelConfig(tensor=8), "blockwise")
    narrow = dataclasses.replace(read_shape("qwen2.5-7b"), intermediate_size=18944 + 32)
    with pytest.raises(ConfigError, match="intermediate_size of 4744 on each of 4"):
        check_fp8(narrow, ParallelConfig(tensor=4), "tensorwise")


def test_processes_that_make_no_whole_replica_are_refused():
    layout = ParallelConfig(tensor=2, pipeline=2)
    assert layout.replicas(8) == 2
    with pytest.raises(ConfigError, match="--nproc-per-node 4"):
        layout.replicas(6)
    assert layout.fitting(1) == ParallelConfig()
    assert layout.fitting(4) is layout


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gemma"}, "model_type must be one of"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "sliding windows"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling"),
        ({"vocab_size": None, "rms_norm_eps": None, "drop": "vocab_size"}, "has no 'vocab_size'"),
    ],
)
def test_variants_that_would_be_computed_wrongly_are_refused(fields, message):
    given = {**SMALL, "model_type": "llama", **fields}
    if "drop" in given:
        del given[given.pop("drop")]
    with pytest.raises(ConfigError, match=message):
        shape_of(given, "config.json")


def test_llama_3_rotary_scaling_is_read():
    scaling = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    }  # fmt: skip
    shape = shape_of({**SMALL, "model_type": "llama", "rope_parameters": scaling}, "config.json")
    assert (shape.rope_theta, shape.rope_factor) == (500000.0, 32.0)


def test_the_split_check_accepts_what_divides():
    check_split(read_shape("qwen2.5-32b"), ParallelConfig(tensor=8, pipeline=4))
