"""What is packed for a machine without a network installs and runs there."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from normexp.benchmarks import packing
from normexp.errors import UserError


def make_wheel(folder: Path, name: str) -> Path:
    """A wheel of one module that has a value."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{name}.py", "value = 7\n" + "# nothing\n" * 1000)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n")
    return path


def test_only_what_the_machine_lacks_is_brought() -> None:
    pyproject = """
[project]
dependencies = ["torch>=2.6", "numpy>=1", "wandb>=0.3", "hydra-core>=1.3,<1.4", "sacremoses==0.2.0"]
"""
    assert packing.needed_packages(pyproject) == ["hydra-core>=1.3,<1.4", "sacremoses==0.2.0"]
    own = packing.needed_packages((packing.REPOSITORY / "pyproject.toml").read_text("utf-8"))
    names = {requirement.split(">")[0].split("=")[0] for requirement in own}
    assert {"hydra-core", "omegaconf", "pydantic", "scipy"} < names and "torch" not in names


def test_a_stored_wheel_has_the_same_content(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "some_package")
    size = wheel.stat().st_size
    with zipfile.ZipFile(wheel) as before:
        content = {one: before.read(one) for one in before.namelist()}
    packing.store_uncompressed(wheel)
    assert wheel.stat().st_size > 3 * size and list(tmp_path.iterdir()) == [wheel]
    with zipfile.ZipFile(wheel) as after:
        assert {one: after.read(one) for one in after.namelist()} == content
        assert after.testzip() is None


def test_packed_installed_without_a_network_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an environment of its own, with the packages of a machine whose Python is one itself."""

    def fetch(requirements: list[str], python: str, folder: Path) -> None:
        assert python == "3.12" and "scipy>=1.11" in requirements
        make_wheel(folder, "fairseq_fixed")  # which is installed without what it needs
        original(requirements, python, folder)

    def no_network(*command: object) -> None:
        assert "git" in command or "pip" in command
        if "git" in command:
            run(*command)

    original, run = packing.fetch_wheels, packing._run
    monkeypatch.setattr(packing, "fetch_wheels", fetch)
    monkeypatch.setattr(packing, "_run", no_network)
    archive = tmp_path / "packed.tar.xz"
    packing.pack(archive, "3.12")
    with tarfile.open(archive) as packed:
        assert {member.uid for member in packed.getmembers()} == {0}
        packed.extractall(tmp_path, filter="data")
    folder = tmp_path / packing.NAME
    assert len(list((folder / "wheels").glob("pip-*.whl"))) == 1
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=folder / "normexp", capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "normexp/norms/power.py" in tracked and (folder / "normexp" / "pyproject.toml").is_file()

    closed = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    closed |= {"PYTHON": sys.executable, "PIP_CONFIG_FILE": os.devnull}
    for _ in range(2):  # the second time with what the first one has installed
        done = subprocess.run(
            ["bash", folder / "run.sh", "--help"], env=closed, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "--rehearsal" in done.stdout
    inside = "import fairseq_fixed, torch, normexp; print(fairseq_fixed.value, normexp.__file__)"
    python = folder / "venv" / "bin" / "python"
    done = subprocess.run(
        [python, "-c", inside], cwd=folder / "normexp", capture_output=True, text=True
    )
    assert done.stdout.startswith(f"7 {folder / 'normexp'}"), done.stderr


def test_what_a_tool_says_reaches_the_user() -> None:
    with pytest.raises(UserError, match=r"git failed: .*not-a-command"):
        packing._run("git", "not-a-command")
    with pytest.raises(UserError, match="no-such-tool is not installed"):
        packing._run("no-such-tool")
