"""From a config to the parts of a run: task, objective, model, tokenizer, sampler, backend."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from flowrl_kernels import backends

from flowrl import objectives
from flowrl.config import Config, LogZConfig, ValueHeadConfig
from flowrl.data.prompts import encode_prompts
from flowrl.experience import Experience
from flowrl.loop_config import OFF, LoopConfig, with_defaults
from flowrl.model_shape import read_shape
from flowrl.models import Backend, base_model, hf_files, natural_gradient
from flowrl.models.megatron_cpu_shim import silence_megatron
from flowrl.objectives.base import Objective
from flowrl.parallel import Parallel
from flowrl.replica import ReplicaSampler, ReplicaTask
from flowrl.rollout import Sampler, build_sampler
from flowrl.rollout.model_limits import check_length, positions
from flowrl.rollout_config import RolloutConfig
from flowrl.schema import ConfigError, nearest
from flowrl.staleness import AheadSampler, ReplicaAheadSampler
from flowrl.step_config import StepsConfig
from flowrl.step_expansion import StepExpansion
from flowrl.tasks import Task, build_task
from flowrl.tasks.step_task import StepTask

DEFAULT_TARGET_BETA = 3.0  # of the exact target, for objectives without one of their own
MAX_CHECKED_PROMPTS = 100_000  # of a split, before a run starts


@dataclass(frozen=True)
class Parts:
    task: Task
    objective: Objective
    model_dir: Path
    tokenizer: Any
    sampler: Sampler
    backend: Backend

    def close(self) -> None:
        self.sampler.close()
        self.task.close()


def resolve(config: Config) -> tuple[Config, Objective]:
    """The config with what the objective's preset decides filled in, and the objective itself.

    Raises ConfigError for options that the objective or the kernels refuse."""
    backend = None if config.kernels.backend == "auto" else config.kernels.backend
    objective = objectives.build(config.objective.name, config.objective.options, backend=backend)
    log_z = _resolved_log_z(config, objective)
    loop = _resolved_loop(config, objective)
    if "values" not in objective.needs and config.value_head != ValueHeadConfig():
        raise ConfigError(
            f"value_head.* is set, but objective {objective.name} has no value head; leave it out"
        )
    if objective.compares_group and config.batch.group_size < 2:
        raise ConfigError(
            f"objective {objective.name} compares the members of a group, got batch.group_size="
            f"{config.batch.group_size}; set batch.group_size=8"
        )
    _check_steps(config, objective)
    region = objective.trust_region
    if region and region.method == "conjugate_gradient" and config.model.backend == "megatron":
        raise ConfigError(
            "the natural gradient is for small models on the hf backend, got objective.method="
            "conjugate_gradient with model.backend=megatron; set objective.method=line_search"
        )
    beta = config.eval.target_beta or objective.beta or DEFAULT_TARGET_BETA
    available = backends.available(device(config).type)
    if config.kernels.backend not in ("auto", *available):
        raise ConfigError(
            f"kernels.backend={config.kernels.backend} cannot run here"
            f"{nearest(config.kernels.backend, ['auto', *available])}"
        )
    target = dataclasses.replace(config.eval, target_beta=beta)
    return dataclasses.replace(config, log_z=log_z, loop=loop, eval=target), objective


def _check_steps(config: Config, objective: Objective) -> None:
    """Raises ConfigError for settings that do not go with what the objective's policy draws."""
    if objective.policy == "tokens":
        if config.steps != StepsConfig():
            raise ConfigError(
                f"steps.* is set, but objective {objective.name} draws tokens, not legal actions; "
                "leave it out"
            )
        return
    for name, wanted, given in (
        ("model.backend", "hf", config.model.backend),
        ("rollout.engine", "hf", config.rollout.engine),
        ("rollout.max_staleness", 0, config.rollout.max_staleness),
        ("rollout.correction", "none", config.rollout.correction),
        ("rollout.temperature", 1.0, config.rollout.temperature),
        ("rollout.old_logprobs", "trainer", config.rollout.old_logprobs),
        ("eval.top_p", 1.0, config.eval.top_p),
        *(
            (f"loop.{name}", OFF[name], getattr(config.loop, name))
            for name in ("overlong_buffer", "truncated_reward", "mask_truncated")
        ),
    ):
        if given not in (wanted, None):
            raise ConfigError(
                f"objective {objective.name} draws legal actions and needs {name}={wanted}, got "
                f"{given}; set {name}={wanted}"
            )
    if objective.fixed_point is None and config.eval.exact_prompts:
        raise ConfigError(
            f"objective {objective.name} with these options has no target that is a table of ends; "
            "set eval.exact_prompts=0, or objective.ll_weight=0"
        )


def _resolved_loop(config: Config, objective: Objective) -> LoopConfig:
    """[loop] over the objective's defaults. Raises ConfigError for what cannot work together."""
    loop = with_defaults(config.loop, objective.loop_defaults, objective.name)
    if config.rollout.max_staleness and loop.shares_groups:
        raise ConfigError(
            "rollout.max_staleness generates the batches to come, and loop.dynamic_sampling and "
            "loop.replay_fraction choose prompts by what was generated; set rollout.max_staleness=0"
        )
    if config.rollout.engine == "replay" and loop.shares_groups:
        raise ConfigError(
            "recorded rollouts have the prompts of their own run; set loop.dynamic_sampling=false "
            "and loop.replay_fraction=0 with rollout.engine=replay"
        )
    own_ratio = "old" in objective.needs and config.rollout.old_logprobs != "rollout"
    if loop.replay_fraction and own_ratio:
        raise ConfigError(
            f"objective {objective.name} has a ratio to the policy that sampled, which for "
            "replayed groups is an older one; set rollout.old_logprobs=rollout or "
            "loop.replay_fraction=0"
        )
    if loop.dynamic_sampling and config.batch.group_size < 2:
        raise ConfigError(
            "loop.dynamic_sampling compares the members of a group, got batch.group_size="
            f"{config.batch.group_size}; set batch.group_size=8"
        )
    if loop.reference_reset_patience and not (config.eval.every and config.eval.num_prompts):
        raise ConfigError(
            "loop.reference_reset_patience counts evaluations, and there are none; set eval.every "
            "and eval.num_prompts, or loop.reference_reset_every"
        )
    return loop


def _resolved_log_z(config: Config, objective: Objective) -> LogZConfig:
    """The [log_z] section over the preset's values. Raises ConfigError where nothing reads it."""
    if "log_z" not in objective.needs:
        if config.log_z != LogZConfig():
            raise ConfigError(
                f"log_z.* is set, but objective {objective.name} learns no log Z; leave it out, or "
                "set objective.log_z=learned where the objective has that option"
            )
        return config.log_z
    defaults = dataclasses.asdict(objective.log_z_defaults)
    given = {k: v for k, v in dataclasses.asdict(config.log_z).items() if v is not None}
    return dataclasses.replace(config.log_z, **{**defaults, **given})


def kernel_backend(config: Config) -> str:
    """Name of the backend that the fused head will use."""
    if config.kernels.backend != "auto":
        return config.kernels.backend
    call = backends.Call(device(config), getattr(torch, config.model.dtype))
    return backends.resolve("linear_policy_loss", None, call).backend


def device(config: Config) -> torch.device:
    """Where this process computes."""
    is_cuda = config.model.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if is_cuda else "cpu")


def model_dir(
    config: Config, task: Task | None, parallel: Parallel, say: Callable[[str], None]
) -> Path:
    """The starting model's directory; where none is given rank 0 builds the task's base model."""
    if config.model.path:
        path = Path(config.model.path)
        hf_files.check_model_dir(path)
        return path
    assert task is not None
    built = parallel.agree(
        lambda: base_model.build_base(task, config.base, say) if parallel.is_main else None
    )
    path = parallel.broadcast(built)
    assert path is not None
    return path


def check_prompts(config: Config, task: Task, directory: Path | None, tokenizer: Any) -> None:
    """Raises ConfigError for a problem whose prompt the model cannot be given, or whose response
    has no room, before a run comes to it. `directory` is the model's, None for a base model that
    is not built yet."""
    longest = 0
    for split in ("train", "eval"):
        count = min(task.num_prompts(split), MAX_CHECKED_PROMPTS if config.model.path else 1000)
        for start in range(0, count, 1000):
            indices = range(start, min(start + 1000, count))
            prompts = [task.prompt(split, index) for index in indices]
            encoded = encode_prompts(prompts, tokenizer, config.rollout.max_prompt_tokens)
            longest = max(longest, *(len(prompt.token_ids) for prompt in encoded))
    if config.rollout.engine == "vllm":  # makes room for the longest that is allowed
        longest = config.rollout.max_prompt_tokens
    limit: int | None = base_model.CONTEXT_TOKENS
    if directory is not None:
        limit = positions(hf_files.load_model_config(directory).get_text_config().to_dict())
    check_length(limit, longest, config.rollout.max_new_tokens)
    if directory is not None and config.model.backend == "hf":
        from flowrl.models.hf_forward import check_config

        check_config(directory, longest + config.rollout.max_new_tokens)


def notes(config: Config, task: Task) -> list[str]:
    """What these settings leave out, though they seem to ask for it. `config` is a resolved one."""
    found = []
    if config.eval.num_prompts and not task.num_prompts("eval"):
        found.append(f"task {task.name} holds no problem out with these options: no evaluation")
    share, prompts = config.loop.replay_fraction or 0.0, config.batch.prompts_per_step
    if share and int(prompts * share) == 0:
        found.append(
            f"loop.replay_fraction={share} of {prompts} prompts a step is less than one: no replay"
        )
    return found


def build_backend(
    config: Config, objective: Objective, parallel: Parallel, say: Callable[[str], None]
) -> Backend:
    """The backend alone, for what needs no sampler. `config` is a resolved one."""
    with ExitStack() as opened:
        task = None
        if not config.model.path:  # the base model is found by what its task makes of it
            task = build_task(config.task.name, config.task.options, config.reward.timeout_s)
            opened.callback(task.close)
        directory = model_dir(config, task, parallel, say)
    return _backend(config, directory, objective, parallel)


def _backend(config: Config, directory: Path, objective: Objective, parallel: Parallel) -> Backend:
    check_shape(config, directory)
    if config.model.backend == "hf":
        from flowrl.models.hf_backend import HFBackend

        backend = HFBackend(config, directory, objective.needs, parallel)
        check_step(objective, sum(p.numel() for p in backend.model.parameters()))
        return backend
    check_megatron()
    silence_megatron()
    from flowrl.models.megatron_backend import MegatronBackend

    return MegatronBackend(config, directory, objective.needs, parallel)


def check_step(objective: Objective, num_parameters: int) -> None:
    """Raises ConfigError where the objective's way to move is not for a model of this size."""
    if objective.trust_region and objective.trust_region.method == "conjugate_gradient":
        natural_gradient.check_size(num_parameters)


def check_megatron() -> None:
    """Raises ConfigError where megatron-core is not installed."""
    if importlib.util.find_spec("megatron") is None:
        raise ConfigError(
            "model.backend=megatron needs megatron-core, which is not installed; "
            "pip install 'flowrl-trainer[megatron]', or set model.backend=hf"
        )


def check_shape(config: Config, directory: Path) -> None:
    """Raises ConfigError where the model in `directory` is not the one that the recipe is for."""
    if config.model.shape:
        wanted, found = read_shape(config.model.shape), read_shape(directory)
        if wanted != found:
            raise ConfigError(
                f"the model in {directory} is not {config.model.shape}: "
                f"{wanted.difference(found)}; set model.path to it, or leave model.shape out"
            )


def expansion(parts: Parts) -> Callable[[Experience], Experience]:
    """What turns a step's rollouts into the sequences of its loss."""
    if parts.objective.policy == "tokens":
        return lambda experience: experience
    return StepExpansion(_step_task(parts.task), parts.tokenizer)


def _build_sampler(
    config: Config,
    objective: Objective,
    task: Task,
    directory: Path,
    tokenizer: Any,
    parallel: Parallel,
) -> Sampler:
    if objective.policy == "tokens":
        return build_sampler(config, directory, tokenizer, parallel)
    from flowrl.rollout.step_sampler import StepSampler

    return StepSampler(
        directory,
        getattr(torch, config.model.dtype),
        parallel.device,
        tokenizer,
        config.rollout.max_batch_sequences,
        _step_task(task),
        config.steps,
    )


def _sampler(build: Callable[[], Sampler], rollout: RolloutConfig, parallel: Parallel) -> Sampler:
    ahead = rollout.max_staleness > 0
    if parallel.model_size > 1:
        makes_room = rollout.sleep or rollout.restart > 0
        kind = ReplicaAheadSampler if ahead else ReplicaSampler
        return kind(build, parallel, makes_room=makes_room)
    return AheadSampler(build(), parallel.device) if ahead else build()


def _step_task(task: Task) -> StepTask:
    if not isinstance(task, StepTask):
        raise ConfigError(
            f"task {task.name} has no legal actions, which this objective's policy chooses among; "
            "set task.name=game24 or blocksworld, or subclass StepTask"
        )
    return task


def assemble(config: Config, parallel: Parallel, say: Callable[[str], None]) -> Parts:
    """All parts of a run. `config` is a resolved one."""
    _, objective = resolve(config)
    with ExitStack() as opened:  # closed again where a later part cannot be had
        task = build_task(config.task.name, config.task.options, config.reward.timeout_s)
        opened.callback(task.close)
        if objective.policy == "legal_actions":
            _step_task(task)
        directory = model_dir(config, task, parallel, say)
        tokenizer = hf_files.load_tokenizer(directory)
        check_prompts(config, task, directory, tokenizer)
        backend = _backend(config, directory, objective, parallel)

        def sampler_of_one() -> Sampler:
            return _build_sampler(config, objective, task, directory, tokenizer, parallel)

        sampler = _sampler(sampler_of_one, config.rollout, parallel)
        opened.callback(sampler.close)
        sampler.load_weights(backend.named_weights(), backend.policy_version)
        opened.pop_all()
    if parallel.model_size > 1:
        task = cast(Task, ReplicaTask(task, parallel))
    return Parts(task, objective, directory, tokenizer, sampler, backend)
