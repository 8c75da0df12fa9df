"""One file with all that the GPU benchmark needs on a machine without a network.

That machine has a Python with a CUDA build of torch, triton and sacrebleu, and nothing else of
what the project needs.
"""

import contextlib
import ensurepip
import logging
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

from normexp.errors import UserError
from normexp.paths import REPOSITORY

logger = logging.getLogger(__name__)

# Of pyproject.toml: what is there already, and what the benchmark never imports.
PRESENT = ("torch", "numpy", "sacrebleu")
NOT_NEEDED = ("wandb", "submitit", "hydra-submitit-launcher", "matplotlib")
# What comes along as a dependency of something else, and with sacrebleu is there already.
_PRESENT_TOO = ("numpy", "lxml", "colorama", "tabulate", "portalocker")
# Their metadata demand more than is used: torchaudio, another torch.
ALONE = ("fairseq-fixed==0.12.3.1", "liger-kernel")
_FROM_SOURCE = "antlr4-python3-runtime==4.9.3"  # of omegaconf; there is no wheel of it
_GLIBC = ("_2_34", "_2_28", "_2_27", "_2_24", "_2_17", "2014", "_2_12", "2010", "_2_5", "1")
NAME = "normexp-gpu"


def pack(output: Path, python: str) -> None:
    """Write a .tar.xz with the committed sources, wheels for a Python version, and run.sh.

    python: as 3.12, of the machine that the file is for, which is Linux on x86-64. Raises
    UserError where git or pip fail.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / NAME
        wheels = folder / "wheels"
        wheels.mkdir(parents=True)
        # Not an archive of the files: the record is to name the commit.
        _run("git", "clone", "--quiet", "--depth", "1", f"file://{REPOSITORY}", folder / "normexp")
        requirements = needed_packages((REPOSITORY / "pyproject.toml").read_text("utf-8"))
        (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", "utf-8")
        shutil.copy(REPOSITORY / "scripts" / "run_packed.sh", folder / "run.sh")
        fetch_wheels(requirements, python, wheels)
        for wheel in wheels.glob("*.whl"):
            store_uncompressed(wheel)
        logger.info("compressing, which takes a minute or two")
        output.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(output, "w:xz") as archive:
            archive.add(folder, NAME, filter=_of_nobody)


def needed_packages(pyproject: str) -> list[str]:
    """The requirements in the text of pyproject.toml that have to be brought along."""
    dependencies = tomllib.loads(pyproject)["project"]["dependencies"]
    left_out = (*PRESENT, *NOT_NEEDED)
    return [one for one in dependencies if re.split(r"[^\w.-]", one)[0].lower() not in left_out]


def fetch_wheels(requirements: list[str], python: str, folder: Path) -> None:
    """Put wheels of the requirements, of what these need, and of ALONE into a folder; and pip's.

    A package of ALONE that has no wheel for this Python is compiled where this Python is the same,
    and else left out, with a line in the log: the benchmark skips what needs it.
    """
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    into = ("--wheel-dir", folder, "--find-links", folder)
    _run(*pip, "wheel", "--no-deps", *into, _FROM_SOURCE)
    platforms = [word for libc in _GLIBC for word in ("--platform", f"manylinux{libc}_x86_64")]
    download = (
        *(*pip, "download", "--dest", folder, "--find-links", folder),
        *("--only-binary=:all:", "--implementation", "cp", "--python-version", python),
        *platforms,
    )
    _run(*download, *requirements)
    for package in ALONE:
        try:
            _run(*download, "--no-deps", package)
        except UserError:
            if python != f"{sys.version_info.major}.{sys.version_info.minor}":
                logger.warning("%s has no wheel for Python %s and is left out", package, python)
                continue
            _run(*pip, "wheel", "--no-deps", "--no-build-isolation", *into, package)
    for wheel in folder.glob("*.whl"):
        if wheel.name.split("-")[0].lower() in _PRESENT_TOO:
            wheel.unlink()
    # The machine's own Python may lack it.
    (bundled,) = (Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")
    shutil.copy(bundled, folder)


def store_uncompressed(wheel: Path) -> None:
    """Write a wheel anew without compression, in place: the archive around it compresses better."""
    partial = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as given, zipfile.ZipFile(partial, "w") as stored:
        for one in given.infolist():
            content = given.read(one)
            one.compress_type = zipfile.ZIP_STORED
            stored.writestr(one, content)
    partial.replace(wheel)


def _of_nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Owned by whoever unpacks it, or git distrusts the sources."""
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _run(*command: str | Path) -> None:
    with contextlib.suppress(OSError):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode == 0:
            return
        raise UserError(f"{command[0]} failed: {(done.stderr.strip() or 'silently')[-2000:]}")
    raise UserError(f"{command[0]} is not installed")
