"""native.build: libraries built with all warnings, kept under what they depend on."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from native import build, kv_push, overlap

SOURCES = {
    "overlap": Path(overlap.__file__).with_name("overlap.cc"),
    "kv_push": Path(kv_push.__file__).with_name("kv_push.cc"),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A library of nothing."""
    source = tmp_path / "nothing.cc"
    source.write_text("int nothing;\n")
    return source


@pytest.mark.parametrize("name", SOURCES)
def test_it_builds_without_a_warning_and_but_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = ["-O0", "-Wall", "-Wextra", "-Werror"]
    library = build.build(SOURCES[name], flags)
    assert library.parent == tmp_path / "jpd" / "native"
    written = library.stat().st_mtime_ns
    assert build.build(SOURCES[name], flags) == library
    assert library.stat().st_mtime_ns == written
    assert not list(library.parent.glob("build-*"))


def test_the_name_depends_on_sources_flags_compiler_and_jaxlib(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake = tmp_path / "g++"
    script = 'for a; do [ "$before" = -o ] && touch "$a"; before=$a; done; true'
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    made = {build.build(source), build.build(source, ["-g"])}
    with monkeypatch.context() as patch:
        patch.setattr("jaxlib.__version__", "9.9")
        made.add(build.build(source))
    with monkeypatch.context() as patch:
        patch.setenv("CXX", f"{shlex.quote(str(fake))} -m64")
        made.add(build.build(source))
    with monkeypatch.context() as patch:
        (tmp_path / "headers").mkdir()
        (tmp_path / "headers" / "some.h").write_text("int other;")
        patch.setattr(build, "_HEADERS", tmp_path / "headers")
        made.add(build.build(source))
    source.write_text("int other;")
    made.add(build.build(source))
    assert len(made) == 6
    assert all(path.name.startswith("nothing-") for path in made)


def test_no_compiler(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        build.BuildError, match=r"C\+\+17 compiler .*nothing.cc .* install g\+\+ or set CXX"
    ):
        build.build(source)
    monkeypatch.setenv("CXX", "nowhere-g++")
    with pytest.raises(build.BuildError, match=r"CXX='nowhere-g\+\+' is not there"):
        build.build(source)


def test_a_compiler_that_fails(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source.write_text("#error no such luck\n")
    with pytest.raises(build.BuildError, match="no such luck"):
        build.build(source)
    assert not list((tmp_path / "jpd" / "native").iterdir())


def test_a_cache_that_cannot_be_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jpd").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match="cannot be kept in"):
        build.build(source)
