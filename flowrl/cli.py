"""The `flowrl` command: parses arguments and calls one module of flowrl.commands. Nothing else.

Bad input ends with one line on stderr and exit code 2, a run that cannot go on with exit code 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from flowrl.config import Config, EvalConfig
from flowrl.overrides import settings_called, split_overrides
from flowrl.schema import ConfigError, nearest
from flowrl.settings import load, recipe_names
from flowrl.study.plan import study_names

DEFAULT_RECIPE = "countdown_cpu"


@dataclass(frozen=True)
class TrainArgs:
    """Train a policy. Settings come from the recipe; any of them can be given as --section.key."""

    recipe: tyro.conf.Positional[str] = DEFAULT_RECIPE
    """Name of a shipped recipe, or the path of a TOML file."""
    resume: bool = False
    """Continue the run in run.dir from its newest valid checkpoint."""
    dry_run: bool = False
    """Check every setting, print the resolved config, the batch and the memory, and stop."""


@dataclass(frozen=True)
class MakeBaseArgs:
    """Build the recipe's tiny base model (a no-op if it is there) and print its directory."""

    recipe: tyro.conf.Positional[str] = DEFAULT_RECIPE
    """Name of a shipped recipe, or the path of a TOML file."""


@dataclass(frozen=True)
class PlanArgs:
    """Say what a recipe needs: parameters, memory per process, a bound on speed, fits or not."""

    recipe: tyro.conf.Positional[str]
    """Name of a shipped recipe, or the path of a TOML file."""
    gpu: str = "h100"
    """GPU whose memory and peak rates are taken: a100, h100, h200 or b200."""
    gpus: int = 0
    """Number of GPUs; 0: parallel.processes of the recipe."""
    response_tokens: int = 0
    """Mean length of a response; 0: half of rollout.max_new_tokens."""


@dataclass(frozen=True)
class EvalArgs:
    """Evaluate a run's newest checkpoint, or any model directory, on held-out problems.

    The run's rollout engine samples. Its settings may be given (--rollout.engine hf,
    --rollout.server_python PYTHON and the like), and where the run's files lie now: --model.path,
    --task.train, --task.eval. With a recipe in place of a run, and --model, all settings may."""

    source: tyro.conf.Positional[Path]
    """Run directory, or a recipe; its task and settings are used."""
    model: str = ""
    """Hugging Face directory to evaluate instead of the run's newest checkpoint."""
    samples: int = 16
    """Samples per problem (the paper: 16)."""
    temperature: float = 0.6
    """Sampling temperature (the paper: 0.6)."""
    top_p: float = 0.95
    """Nucleus (the paper: 0.95)."""
    num_prompts: int = 0
    """Problems; 0: eval.num_prompts of the run or the recipe."""
    json: str = ""
    """File to write the metrics to, too."""


@dataclass(frozen=True)
class InspectArgs:
    """Look at a run's rollouts."""

    run_dir: tyro.conf.Positional[Path]
    """Run directory."""
    step: int | None = None
    """Step; the last one by default."""
    prompt: int | None = None
    """Only this prompt index."""
    split: Literal["train", "eval"] = "train"
    """Training rollouts, or the answers of an evaluation."""
    only: Literal["all", "correct", "wrong", "truncated", "error"] = "all"
    """Only these responses."""
    limit: int = 4
    """Prompts shown; 0: all."""


@dataclass(frozen=True)
class ReportArgs:
    """Write report.html again from a run's files."""

    run_dir: tyro.conf.Positional[Path]
    """Run directory."""


@dataclass(frozen=True)
class ExportArgs:
    """Write a checkpoint's policy as a Hugging Face directory.

    --model.path DIR says where the run's starting model lies now, if it was moved."""

    run_dir: tyro.conf.Positional[Path]
    """Run directory; its newest valid checkpoint is exported."""
    hf: Path = field(default=Path("export"))
    """Directory to write; must not exist or be empty."""


@dataclass(frozen=True)
class ServeArgs:
    """Serve vLLM engines on this node to trainers on others (rollout.server_address)."""

    address: tyro.conf.Positional[str]
    """HOST:PORT to listen at; HOST is the address of one interface of this node."""
    token_file: str = ""
    """File with the token that trainers must know. Empty: it is in FLOWRL_ENGINE_TOKEN."""
    python: str = ""
    """Python of an environment with vllm. Empty: this one."""
    log: Path = field(default=Path("flowrl_serve.log"))
    """File that the engines' output is appended to."""


def _serve(args: ServeArgs, overrides: dict[str, Any]) -> None:
    from flowrl.commands import serve

    serve.run(args.address, args.token_file, args.python, args.log)


def _load(recipe: str, overrides: dict[str, Any]) -> Config:
    from flowrl.option_tables import load_checked

    return load_checked(recipe, overrides)


def _train(args: TrainArgs, overrides: dict[str, Any]) -> None:
    if args.dry_run and args.resume:
        raise ConfigError("--dry-run checks a new run and --resume continues one; leave one out")
    if args.resume:
        return _resume(args, overrides)
    config = _load(args.recipe, overrides)
    if args.dry_run:
        from flowrl.commands import dry_run

        return dry_run.run(config)
    from flowrl.commands import train

    return train.run(config)


def _resume(args: TrainArgs, overrides: dict[str, Any]) -> None:
    """The recipe says where the run is; its other settings are the run's own."""
    from flowrl.commands import train

    config = load(args.recipe, {"run": overrides.get("run", {})})
    if args.recipe != DEFAULT_RECIPE:  # named by the user, so it must be the run's
        overrides = {**overrides, "recipe": config.recipe}
    train.resume(config.run_dir, overrides)


def _make_base(args: MakeBaseArgs, overrides: dict[str, Any]) -> None:
    from flowrl.commands import make_base

    make_base.run(_load(args.recipe, overrides))


def _plan(args: PlanArgs, overrides: dict[str, Any]) -> None:
    from flowrl.commands import plan

    machine = plan.Machine(args.gpu, args.gpus, args.response_tokens)
    plan.run(_load(args.recipe, overrides), machine)


def _eval(args: EvalArgs, overrides: dict[str, Any]) -> None:
    from flowrl.commands import evaluate

    options = EvalConfig(
        samples=args.samples,
        temperature=args.temperature,
        top_p=args.top_p,
        num_prompts=args.num_prompts,
    )
    request = evaluate.Request(args.source, args.model, options, overrides, args.json)
    evaluate.run(request)


def _inspect(args: InspectArgs, overrides: dict[str, Any]) -> None:
    from rich.console import Console

    from flowrl.inspection import show

    show(
        args.run_dir,
        step=args.step,
        split=args.split,
        prompt_index=args.prompt,
        limit=args.limit,
        only=args.only,
        console=Console(),
    )


def _report(args: ReportArgs, overrides: dict[str, Any]) -> None:
    from flowrl.report import write_report

    print(write_report(args.run_dir))


def _export(args: ExportArgs, overrides: dict[str, Any]) -> None:
    from flowrl.commands import export

    export.run(args.run_dir, args.hf, overrides)


@dataclass(frozen=True)
class CompareArgs:
    """Train the arms of a study side by side and write study.json and study.html."""

    study: tyro.conf.Positional[str]
    """Name of a shipped study, or the path of a TOML file."""
    arms: str = ""
    """Only these arms, separated by commas. Empty: all."""
    workers: int = 0
    """Worker processes, one thread each; 0: as many as there are cores."""
    out: Path = Path("runs/studies")
    """Directory of studies; runs are in OUT/STUDY/WORLD/ARM/seed_N and kept: what is done is
    skipped, what was cut short is resumed."""
    dry_run: bool = False
    """Check every setting, list the runs and their commands, and stop."""
    report: bool = False
    """Train nothing: write study.json and study.html from the runs that are there."""
    table: bool = False
    """Train nothing: print the tables of study.json as Markdown."""


def _compare(args: CompareArgs, overrides: dict[str, Any]) -> None:
    from flowrl.commands import compare

    compare.run(args)


@dataclass(frozen=True)
class DoctorArgs:
    """Say what is installed, what is missing, what for, and the command that adds it."""


def _doctor(args: DoctorArgs, overrides: dict[str, Any]) -> None:
    from rich.console import Console

    from flowrl.commands import doctor

    raise SystemExit(doctor.run(Console()))


COMMANDS: dict[str, tuple[type, Callable[[Any, dict[str, Any]], None]]] = {
    "train": (TrainArgs, _train),
    "eval": (EvalArgs, _eval),
    "inspect": (InspectArgs, _inspect),
    "report": (ReportArgs, _report),
    "export": (ExportArgs, _export),
    "make-base": (MakeBaseArgs, _make_base),
    "plan": (PlanArgs, _plan),
    "compare": (CompareArgs, _compare),
    "serve": (ServeArgs, _serve),
    "doctor": (DoctorArgs, _doctor),
}
_CONTINUE = {
    "train": "; continue with --resume",
    "compare": "; the same command goes on where it stopped",
}
TAKES_SETTINGS = ("train", "make-base", "plan")  # any of them
TAKES_SOME = ("eval", "export")


def main(argv: Sequence[str] | None = None) -> None:
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # the reader of our output has gone, `| head` say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def _run(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if args[0] == "--version":
        from flowrl import __version__

        print(__version__)
        return
    try:
        _dispatch(args[0], args[1:])
    except ConfigError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted" + (_CONTINUE.get(args[0], "")), 130)
    except BrokenPipeError:
        raise  # main's to end
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        remedy = "free the disk or correct the path; a run continues with --resume"
        _fail(f"cannot read or write{where}: {error.strerror or error}; {remedy}", 1)
    except RuntimeError as error:
        if not _is_ours(error):
            raise
        _fail(str(error), 1)


def _dispatch(name: str, args: list[str]) -> None:
    if name not in COMMANDS:
        raise ConfigError(f"no command called {name!r}{nearest(name, COMMANDS)}")
    arguments, action = COMMANDS[name]
    overrides: dict[str, Any] = {}
    if name in TAKES_SETTINGS and {"-h", "--help"} & set(args):
        return _help(name, arguments, args)
    if name in (*TAKES_SETTINGS, *TAKES_SOME):
        args, overrides = split_overrides(args)
    _refuse_unknown(name, arguments, args)
    action(tyro.cli(arguments, prog=f"flowrl {name}", args=args), overrides)


def _refuse_unknown(name: str, arguments: type, args: list[str]) -> None:
    known = {f.name for f in fields(arguments)} | {"help"}
    first = fields(arguments)[0].name if fields(arguments) else ""  # the one without a flag
    for arg in args:
        key = arg.partition("=")[0].removeprefix("--").replace("-", "_")
        if arg.startswith("--") and key.replace(".", "_") == first:
            raise ConfigError(
                f"flowrl {name} takes it without {arg}: flowrl {name} {first.upper()}"
            )
        if arg.startswith("--") and key.removeprefix("no_") not in known:
            meant = settings_called(key) if name in (*TAKES_SETTINGS, *TAKES_SOME) else ""
            raise ConfigError(f"flowrl {name} has no {arg}{meant or nearest(key, known)}")


def _help(name: str, arguments: type, args: list[str]) -> None:
    """The command's own arguments and every setting, with the recipe's values as defaults."""
    rest, _ = split_overrides(args)
    recipe = next((a for a in rest if not a.startswith("-")), DEFAULT_RECIPE)

    @dataclass(frozen=True)
    class WithSettings(arguments):
        __doc__ = arguments.__doc__
        settings: Annotated[Config, tyro.conf.arg(name="")] = field(
            default_factory=lambda: load(recipe)
        )

    tyro.cli(WithSettings, prog=f"flowrl {name}", args=["--help"])


def _is_ours(error: RuntimeError) -> bool:
    return type(error).__module__.split(".")[0] == "flowrl"


def _fail(message: str, code: int) -> None:
    rank = os.environ.get("RANK")
    prefix = f"flowrl (rank {rank}): " if rank else "flowrl: "
    print(prefix + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)


def _overview() -> str:
    lines = ["usage: flowrl COMMAND ...", "", "commands:"]
    for name, (arguments, _) in COMMANDS.items():
        lines.append(f"  {name:<10} {(arguments.__doc__ or '').splitlines()[0]}")
    lines += [
        "",
        f"recipes: {', '.join(recipe_names())}",
        f"studies: {', '.join(study_names())}",
        "flowrl COMMAND --help shows its arguments; `flowrl train` runs the default recipe.",
    ]
    return "\n".join(lines)
