"""A wheel, installed in an empty environment outside the checkout, runs by itself."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*pip, "-w", str(out), str(ROOT)], check=True, capture_output=True)
    return next(out.glob("flowrl_trainer-*.whl"))


def test_wheel_holds_both_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"flowrl", "flowrl_kernels"}
    assert "flowrl/recipes/countdown_cpu.toml" in names
    assert any(n.endswith("dist-info/licenses/LICENSE") for n in names)


def test_installed_wheel_runs_a_dry_run(wheel, tmp_path):
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    site = next(environment.glob("lib/python*/site-packages"))
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    # The dependencies alone: a .pth entry does not run the editable install's own .pth files.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = environment / "bin" / "python"
    where = "import flowrl, flowrl_kernels; print(flowrl.__file__, flowrl_kernels.__file__)"
    shown = subprocess.run(
        [python, "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert shown.count(str(site)) == 2
    done = subprocess.run(
        [python, "-m", "flowrl", "train", "--dry-run"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "32 x 8 = 256" in done.stdout
