"""The layers of the design, checked on the import statements of every module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SIBLINGS = ("data", "tasks", "rollout", "objectives", "models")
BASE = {
    "schema", "config", "loop_config", "parallel_config", "rollout_config", "model_shape",
    "settings", "step_config", "records", "scores", "parallel", "metrics", "weights",
}  # fmt: skip
HEAVY = {  # package -> the only modules that may import it
    "vllm": {"flowrl/rollout/vllm_engine.py"},
    "megatron": {"flowrl/models/megatron_"},
    "transformer_engine": {"flowrl/models/megatron_"},
    "transformers": {
        "flowrl/models/base_model.py",
        "flowrl/models/hf_backend.py",
        "flowrl/models/hf_export.py",
        "flowrl/models/hf_files.py",
        "flowrl/models/packed_attention.py",
        "flowrl/rollout/hf_sampler.py",
    },
    "liger_kernel": {"flowrl/models/liger_layers.py"},
    "matplotlib": {"flowrl/report"},
}


def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports at run time."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def sibling_violations(package: str, imported: set[str]) -> set[str]:
    """Imports that a module of a sibling package may not make: other siblings' implementations and
    whatever stands above. A sibling's protocol package (`flowrl.x` itself) may be named only by the
    objective's base class, which backends call."""
    bad = set()
    for name in imported:
        parts = name.split(".")
        if parts[0] != "flowrl" or len(parts) < 2:
            continue
        if parts[1] == package or parts[1] in BASE:
            continue
        if package == "models" and name.startswith("flowrl.objectives.base"):
            continue
        bad.add(name)
    return bad


@pytest.mark.parametrize("package", SIBLINGS)
def test_siblings_import_only_what_is_below_them(package):
    for path in modules(f"flowrl/{package}"):
        assert not sibling_violations(package, imports(path)), path


def test_the_check_sees_a_sibling_import():
    assert sibling_violations("rollout", {"flowrl.tasks.countdown", "flowrl.records"}) == {
        "flowrl.tasks.countdown"
    }


def test_kernels_never_import_flowrl():
    for path in modules("kernels/flowrl_kernels"):
        assert not {n for n in imports(path) if n.split(".")[0] == "flowrl"}, path


def test_heavy_packages_have_one_importer():
    for path in modules("flowrl"):
        relative = str(path.relative_to(ROOT))
        for package in {n.split(".")[0] for n in imports(path)} & HEAVY.keys():
            assert any(relative.startswith(allowed) for allowed in HEAVY[package]), relative


def test_no_import_cycles():
    graph: dict[str, set[str]] = {}
    for path in modules("flowrl"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = imports(path)
    edges = {n: {m for m in found if m in graph and m != n} for n, found in graph.items()}
    done: set[str] = set()

    def visit(node: str, trail: tuple[str, ...]) -> None:
        assert node not in trail, " -> ".join((*trail, node))
        if node not in done:
            for after in edges[node]:
                visit(after, (*trail, node))
            done.add(node)

    for node in graph:
        visit(node, ())


@pytest.mark.parametrize(
    "module", ["flowrl.config", "flowrl.settings", "flowrl.cli", "flowrl.overrides"]
)
def test_config_and_cli_import_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_stay_readable():
    """Sizes of CONTRIBUTING.md: 400 lines, kernels 500."""
    for folder in ("flowrl", "kernels", "bench", "tests"):
        for path in modules(folder):
            limit = 500 if "kernels" in path.name else 400
            assert len(path.read_text().splitlines()) <= limit, path
