"""Compiled kernels: built, kept and found again, done without, and never trusted by accident.

Sources here are a few lines without PyTorch's headers, which compile in no time.
"""

import logging
import os
import runpy
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

import normexp
from normexp.norms import build_norm
from normexp.norms.kernels import choice as kernels
from normexp.norms.kernels import native

COMPILER = shutil.which("g++") or shutil.which("c++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")

SOURCE = """
#include <cstdio>
#include <cstdlib>
__attribute__((constructor)) static void loaded() {
  if (FILE* file = std::fopen(std::getenv("LOADED"), "a")) {
    std::fputs("NAME ", file);
    std::fclose(file);
  }
}
"""


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache, and nothing remembered of what this process has loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOADED", str(tmp_path / "loaded"))
    monkeypatch.delenv("CXX", raising=False)
    before = kernels.chosen_kernels()
    kernels.use_kernels("auto")
    _forget()
    yield
    kernels.use_kernels(before)
    _forget()


def _forget() -> None:
    """As in a new process."""
    native._load_once.cache_clear()
    native._notice_once.cache_clear()


def source(tmp_path: Path, name: str = "one", text: str = SOURCE) -> Path:
    path = tmp_path / "sources" / f"{name}.cpp"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.replace("NAME", name))
    return path


def loaded(tmp_path: Path) -> list[str]:
    """Names of the libraries whose code has run, each as often as it was loaded anew."""
    path = tmp_path / "loaded"
    return path.read_text().split() if path.exists() else []


def libraries() -> list[Path]:
    return sorted(native.cache_folder().glob("*.so"))


@needs_compiler
def test_compiled_once_and_found_again(tmp_path, caplog) -> None:
    path = source(tmp_path)
    assert native.load(path) and loaded(tmp_path) == ["one"]
    (library,) = libraries()
    made = library.stat().st_mtime_ns
    assert [r.message for r in caplog.records] == [
        "compiling one.cpp for this processor, once; half a minute"
    ]
    _forget()
    assert native.load(path)
    assert libraries() == [library] and library.stat().st_mtime_ns == made
    assert len(caplog.records) == 1
    assert native.cache_folder().stat().st_mode & 0o077 == 0


@needs_compiler
def test_without_a_compiler_the_library_of_another_machine_does(tmp_path, monkeypatch) -> None:
    path = source(tmp_path)
    assert native.load(path)
    _forget()
    monkeypatch.setenv("PATH", "")
    assert native.load(path)


@needs_compiler
def test_another_environment_finds_the_library(tmp_path, monkeypatch) -> None:
    """With the same PyTorch in another folder, and the source in another checkout."""
    path = source(tmp_path)
    library = native._compiled(path)
    made = library.stat().st_mtime_ns
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(path.parent, elsewhere / "sources")
    for paths in ("include_paths", "library_paths"):
        monkeypatch.setattr(f"torch.utils.cpp_extension.{paths}", lambda *_: [str(elsewhere)])
    monkeypatch.setenv("PATH", "")  # nothing can be compiled
    assert native._compiled(elsewhere / "sources" / path.name) == library
    assert libraries() == [library] and library.stat().st_mtime_ns == made


@needs_compiler
@pytest.mark.parametrize("what", ["source", "header", "torch", "commit", "options", "processor"])
def test_what_it_depends_on_changes(tmp_path, monkeypatch, what: str) -> None:
    """A stale library is not found; a new one is made beside it."""
    path = source(tmp_path, f"of_{what}")
    assert native.load(path)
    _forget()
    if what == "source":
        path.write_text(path.read_text() + "\n// changed\n")
    elif what == "header":
        (path.parent / "rows.h").write_text("// new\n")
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9.9")
    elif what == "commit":
        monkeypatch.setattr(torch.version, "git_version", "0" * 40)
    elif what == "options":
        monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-DCHANGED"))
    else:
        monkeypatch.setattr(native, "_processor", lambda: "flags: fpu")
    assert native.load(path)
    assert len(libraries()) == 2


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "empty", "other", "no digest"])
def test_a_damaged_library_is_made_anew(tmp_path, damage: str) -> None:
    path = source(tmp_path, f"damaged_{damage.replace(' ', '_')}")
    library = native._compiled(path)
    content = library.read_bytes()
    if damage == "no digest":
        library.with_suffix(".sha256").unlink()
    else:
        spoiled = {"cut": content[:2000], "empty": b"", "other": content + b"\0"}[damage]
        library.write_bytes(spoiled)
    assert native.load(path)
    assert library.read_bytes() == content
    assert loaded(tmp_path) == [path.stem]


@needs_compiler
@pytest.mark.parametrize("whose", ["folder for all", "file for the group", "another owner's"])
def test_what_others_may_write_is_not_loaded(tmp_path, caplog, monkeypatch, whose: str) -> None:
    path = source(tmp_path, whose.split()[0])
    library = native._compiled(path)
    caplog.clear()
    if whose == "folder for all":
        library.parent.chmod(0o777)
    elif whose == "file for the group":
        library.chmod(0o660)
    else:
        uid = os.getuid()
        monkeypatch.setattr(native.os, "getuid", lambda: uid + 1)
    assert not native.load(path)
    assert loaded(tmp_path) == []
    (notice,) = caplog.records
    assert "others may write" in notice.message or "another user" in notice.message
    assert "\n" not in notice.message


BROKEN = {
    "no compiler": ({"PATH": ""}, "no C++ compiler"),
    "compiler fails": ({"CXX": "false"}, "false failed"),
    "missing compiler": ({"CXX": "/nowhere/g++"}, "no C++ compiler"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_one_line_of_notice_and_plain_kernels(tmp_path, monkeypatch, caplog, how: str) -> None:
    """For all layers and sources together, however often they are asked for."""
    variables, reason = BROKEN[how]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    norms = [build_norm(name, 4) for name in ("power", "power", "power_v", "batch")]
    for norm in norms:
        norm(torch.randn(3, 2, 4)).sum().backward()
        assert norm.kernels == "plain" and "kernels=plain" in repr(norm)
    notices = [r.message for r in caplog.records if r.message.startswith("plain kernels")]
    assert len(notices) == 1 and reason in notices[0] and "\n" not in notices[0]
    assert caplog.records[-1].levelno == logging.WARNING
    assert libraries() == []


@needs_compiler
def test_an_error_of_the_source_is_told(tmp_path, caplog) -> None:
    assert not native.load(source(tmp_path, "wrong", "int main( {"))
    assert "error" in caplog.records[-1].message
    assert list(native.cache_folder().iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "cache").write_text("a file")
    assert not native.load(source(tmp_path))
    assert "plain kernels" in caplog.records[-1].message


def test_choices(tmp_path, monkeypatch, caplog) -> None:
    """plain: nothing is compiled, nothing said. native: an error instead of a notice."""
    monkeypatch.setenv("PATH", "")
    norm, x = build_norm("power", 4), torch.randn(3, 2, 4)
    kernels.use_kernels("plain")
    norm(x)
    assert norm.kernels == "plain" and not caplog.records
    kernels.use_kernels("native")
    with pytest.raises(RuntimeError, match=r"native kernels are chosen, but .*no C\+\+ compiler"):
        norm(x)
    assert norm.step == 1
    with pytest.raises(ValueError, match="unknown kernels 'fast'; known: auto, plain, native"):
        kernels.use_kernels("fast")


@pytest.mark.parametrize("value", ["plain", "native", None])
def test_the_environment_chooses(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    if value:
        monkeypatch.setenv(kernels.VARIABLE, value)
    anew = runpy.run_path(kernels.__file__)  # as the first import in a process does
    assert anew["chosen_kernels"]() == (value or "auto")


def test_every_source_is_shipped() -> None:
    """Sources, headers, templates, the toy corpora's words, decisions on keys are package data;
    python -m normexp.norms.kernels compiles all of the sources.
    """
    package = Path(normexp.__file__).parent
    settings = tomllib.loads((package.parent / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["normexp"]
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    headers = {path for source in native.sources() for path in source.parent.glob("*.h")}
    templates = (package / "report" / "templates").iterdir()
    words = (package / "corpora" / "toy").glob("*.yaml")
    decisions = (package / "config").glob("*.yaml")
    assert shipped == {*native.sources(), *headers, *templates, *words, *decisions}
    assert {path.stem for path in native.sources()} >= {"power", "power_released", "batch"}
