"""A few faults of each kind for each verb, and mistakes planted for them to find."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import KINDS, Broken, Faults, disturb
from tests.faults.verbs import VERBS

pytestmark = pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="limits and the fork server are as on Linux"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("faults")
    for folder in (root, *root.parents):  # another user will have to get in
        if folder.stat().st_mode & 0o777 == 0o700:
            folder.chmod(0o711)
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_is_lost(verb: str, root: Path) -> None:
    kinds = dict.fromkeys(KINDS, 1) if verb == "export" else {"kill": 1, "full": 1}
    if verb in ("train", "calibrate"):  # these take their time
        kinds = {"kill": 1}
    report = disturb(verb, root, kinds)
    assert report.broken == []


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_nothing_is_lost_in_many_cases(verb: str, root: Path) -> None:
    report = disturb(verb, root, dict.fromkeys(KINDS, 10), seed=1)
    assert report.broken == []
    assert report.disturbed > 10


def test_a_torn_file_is_seen(root: Path) -> None:
    faults = Faults("export", root, 0)

    def torn(draw: object) -> bool:
        weights = faults.place / "out" / "model.safetensors"
        weights.parent.mkdir(exist_ok=True)
        weights.write_bytes(b"half")
        return True

    faults._kill = torn  # type: ignore[method-assign]
    with pytest.raises(Broken, match="torn"):
        faults.case(0, "kill")


def test_an_unclear_end_and_leftovers_are_seen(root: Path) -> None:
    faults = Faults("export", root, 0)
    faults._home = lambda draw: bool(faults._one_line(faults.end(faults.start()), 1, "error: "))
    with pytest.raises(Broken, match="no clean end"):
        faults.case(0, "home")
    faults._home = lambda draw: (faults.place / ".x.01234567.tmp").touch() is None
    with pytest.raises(Broken, match="left behind"):
        faults.case(0, "home")
