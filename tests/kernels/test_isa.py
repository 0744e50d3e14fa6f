"""Which path is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bitskip_cpu import isa


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, features: str) -> None:
    monkeypatch.setenv("NUMBA_CPU_NAME", name)
    monkeypatch.setenv("NUMBA_CPU_FEATURES", features)
    monkeypatch.setattr(isa, "INTERPRETED", False)
    monkeypatch.setattr(isa, "ARM64", False)


@pytest.mark.parametrize(("name", "features", "path"), [
    ("haswell", "", "avx2"),
    ("x86-64", "", "plain"),
    ("generic", "", "plain"),
    ("an-unknown-cpu", "", "plain"),
    ("x86-64", "+avx2", "avx2"),
    ("znver5", "", "vnni512"),
    ("znver5", "-avx512vnni", "vnni256"),
    ("znver5", "-avx512vnni,-avxvnni", "avx2"),
    ("haswell", "+avx512f,+avx512bw,+avx512vl,+avx512vnni", "vnni512"),
    ("cortex-a76", "+dotprod,+neon", "plain"),
])  # fmt: skip
def test_best_path(monkeypatch: pytest.MonkeyPatch, name: str, features: str, path: str) -> None:
    pretend(monkeypatch, name, features)
    assert isa.choose_path().name == path
    assert isa.PATHS[-1] in isa.available_paths()  # plain


@pytest.mark.parametrize(("name", "features", "path"), [
    ("cortex-a76", "", "dotprod"),
    ("apple-m1", "", "dotprod"),
    ("cortex-a72", "+neon", "plain"),
    ("generic", "+neon,+dotprod", "dotprod"),
    ("neoverse-n1", "-dotprod", "plain"),
])  # fmt: skip
def test_best_path_on_arm(
    monkeypatch: pytest.MonkeyPatch, name: str, features: str, path: str
) -> None:
    pretend(monkeypatch, name, features)
    monkeypatch.setattr(isa, "ARM64", True)
    assert isa.choose_path().name == path


def test_interpreted_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "znver5", "")
    monkeypatch.setattr(isa, "INTERPRETED", True)
    assert isa.available_paths() == (isa.PATHS[-1],)


def test_a_wish_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "haswell", "")
    assert isa.choose_path("plain").name == "plain"
    with pytest.raises(isa.IsaError, match=r"BITSKIP_ISA=vnni512.*choose avx2, plain"):
        isa.choose_path("vnni512")
    with pytest.raises(isa.IsaError, match="BITSKIP_ISA=sse9: unknown"):
        isa.choose_path("sse9")


@pytest.mark.parametrize(("cpu", "kind"), [
    ("znver1", "zen"), ("znver3", "zen3"), ("znver4", "zen"), ("znver5", "zen5"),
    ("cascadelake", ""), ("", ""),
])  # fmt: skip
def test_weights_are_asked_for_as_the_cpu_wants(
    monkeypatch: pytest.MonkeyPatch, cpu: str, kind: str
) -> None:
    """By the CPU that runs the code, not by the path, nor by what the code is compiled for."""
    monkeypatch.setattr(isa.llvm, "get_host_cpu_name", lambda: cpu)
    pretend(monkeypatch, "haswell", "")
    assert isa.choose_path("avx2").fetch.name == kind
    for path in isa.PATHS:
        tuned = isa.tuned(path, cpu)
        assert (tuned.fetch.name, replace(tuned, fetch=path.fetch)) == (kind, path)
        assert isa.tuned(tuned, "haswell") == path


@pytest.mark.parametrize(("name", "features", "converts"), [
    ("haswell", "", True), ("x86-64", "", False), ("x86-64", "+f16c", True),
    ("haswell", "-f16c", False), ("znver5", "", True),
])  # fmt: skip
def test_float16_instructions(
    monkeypatch: pytest.MonkeyPatch, name: str, features: str, converts: bool
) -> None:
    pretend(monkeypatch, name, features)
    assert isa.converts_float16() == converts
    monkeypatch.setattr(isa, "ARM64", True)
    assert isa.converts_float16()
