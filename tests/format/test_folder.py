"""Model folders: what is written is read, and every fault is refused with its reason."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from bitskip_ref import folder as fd
from bitskip_ref.compare import difference
from bitskip_ref.config import PRESETS
from bitskip_ref.files import replace_file
from tests.helpers import OPTIONS, random_folder, random_tensors, twin


@pytest.mark.parametrize("name", [*PRESETS, *OPTIONS])
def test_round_trip(name: str, tmp_path: Path) -> None:
    tensors = random_tensors(twin(name))
    read = fd.read_folder(random_folder(tmp_path / "m", twin(name)))
    assert read.config == twin(name) and read.eos_token_id == 0 and read.tokenizer is None
    assert list(read.tensors) == list(fd.expected_tensors(read.config))
    for key, t in read.tensors.items():
        assert difference(key, tensors[key], t) is None
        assert not t.flags.writeable or t.base is None


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    path = random_folder(tmp_path, twin("bitskip-v1")) / fd.WEIGHTS
    for key, t in safetensors.numpy.load_file(path).items():
        assert difference(key, random_tensors(twin("bitskip-v1"))[key], t) is None


def test_packed_rows_are_aligned_and_contiguous(tmp_path: Path) -> None:
    read = fd.read_folder(random_folder(tmp_path, twin("bitskip-v1")))
    at = {key: t.ctypes.data for key, t in read.tensors.items()}
    for i in range(4):
        q, k, v = (f"layers.{i}.{n}_proj.weight" for n in "qkv")
        assert at[q] % 64 == 0
        assert at[k] == at[q] + read.tensors[q].nbytes
        assert at[v] == at[k] + read.tensors[k].nbytes


def test_nothing_is_written_for_wrong_tensors(tmp_path: Path) -> None:
    tensors = random_tensors(twin("tiny"))
    del tensors["final_norm.weight"]
    with pytest.raises(fd.FormatError, match=r"lacks tensor 'final_norm.weight'"):
        fd.write_folder(tmp_path / "m", twin("tiny"), tensors)
    assert not (tmp_path / "m").exists()


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="No space"), replace_file(path) as file:
        file.write(b"new")
        raise OSError("No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_written_file_keeps_mode_links_and_what_is_no_file(tmp_path: Path) -> None:
    """C1: nothing but a regular file is ever replaced."""

    def write(path: Path) -> None:
        with replace_file(path) as file:
            file.write(b"new")

    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o600)
    write(path)
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o600
    before = os.umask(0o027)
    try:
        write(tmp_path / "fresh")
    finally:
        os.umask(before)
    assert (tmp_path / "fresh").stat().st_mode & 0o777 == 0o640
    link = tmp_path / "link"
    link.symlink_to("file")
    path.write_text("old")
    write(link)
    assert link.is_symlink() and path.read_text() == "new"
    dangling = tmp_path / "dangling"
    dangling.symlink_to("later")
    write(dangling)
    assert dangling.is_symlink() and (tmp_path / "later").read_text() == "new"
    write(Path("/dev/null"))
    assert Path("/dev/null").is_char_device()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    read: list[bytes] = []
    reader.start()
    write(fifo)
    reader.join(10)
    assert read == [b"new"] and fifo.is_fifo()
    with pytest.raises(IsADirectoryError):
        write(tmp_path)
    assert not list(tmp_path.glob(".*"))


# ---- hostile folders ----------------------------------------------------------------


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def sign(root: Path) -> None:
    """Make the checksum right again, so that the check behind it is what must refuse."""
    digest = hashlib.sha256((root / fd.WEIGHTS).read_bytes()).hexdigest()
    edit_json(root / fd.CONFIG, lambda c: c.update(weights_sha256=digest))


def edit_header(root: Path, change: Callable[[dict], object]) -> None:
    raw = (root / fd.WEIGHTS).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (root / fd.WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    sign(root)


def edit_tensor(root: Path, name: str, change: Callable[[np.ndarray], object]) -> None:
    tensors = {k: np.array(t) for k, t in fd.read_tensors(root / fd.WEIGHTS).items()}
    change(tensors[name])
    shapes = {k: (t.dtype.type, t.shape) for k, t in tensors.items()}
    fd.write_tensors(root / fd.WEIGHTS, shapes, tensors.values())
    sign(root)


def flip_bit(root: Path, at: int) -> None:
    raw = bytearray((root / fd.WEIGHTS).read_bytes())
    raw[at] ^= 4
    (root / fd.WEIGHTS).write_bytes(raw)


def truncate(root: Path, size: int) -> None:
    raw = (root / fd.WEIGHTS).read_bytes()
    (root / fd.WEIGHTS).write_bytes(raw[:size])


def nest(root: Path) -> None:
    text = b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}"
    (root / fd.WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)
    sign(root)


def calibrated(root: Path, **changes: object) -> None:
    rule = {"exit_layer": "max", "threshold": 0.5, "looks": [1, 2], "last": 4, **changes}
    edit_json(root / fd.GENERATION, lambda c: c.update(auto_exit=rule))


Q = "layers.0.q_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda r: (r / fd.CONFIG).unlink(), "lacks config.json"),
    "no weights": (lambda r: (r / fd.WEIGHTS).unlink(), "lacks model.safetensors"),
    "config no json": (lambda r: (r / fd.CONFIG).write_text("{"), "cannot be read as JSON"),
    "config a list": (lambda r: (r / fd.CONFIG).write_text("[]"), "JSON object"),
    "other model": (
        lambda r: edit_json(r / fd.CONFIG, lambda c: c.update(model_type="llama")),
        "not a bitskip model",
    ),
    "other format": (
        lambda r: edit_json(r / fd.CONFIG, lambda c: c.update(bitskip_format=2)),
        "format 1",
    ),
    "unknown field": (
        lambda r: edit_json(r / fd.CONFIG, lambda c: c.update(colour="red")),
        "unknown field.*colour",
    ),
    "wrong shape": (
        lambda r: edit_json(r / fd.CONFIG, lambda c: c.update(intermediate_size=81)),
        "the config asks for",
    ),
    "wrong layers": (
        lambda r: edit_json(r / fd.CONFIG, lambda c: c.update(num_hidden_layers=5)),
        "lacks tensor",
    ),
    "absurd layers": (
        lambda r: edit_json(r / fd.CONFIG, lambda c: c.update(num_hidden_layers=1 << 40)),
        "at most",
    ),
    "bad eos": (
        lambda r: edit_json(r / fd.GENERATION, lambda c: c.update(eos_token_id=97)),
        "eos_token_id",
    ),
    "empty weights": (lambda r: truncate(r, 0), "truncated"),
    "short header": (lambda r: truncate(r, 100), "truncated"),
    "short data": (lambda r: truncate(r, -1), "cut off"),
    "long data": (
        lambda r: (r / fd.WEIGHTS).write_bytes((r / fd.WEIGHTS).read_bytes() + b"\0"),
        "after the last tensor",
    ),
    "header bit": (lambda r: flip_bit(r, 40), "."),
    "length bit": (lambda r: flip_bit(r, 5), "truncated"),
    "data bit": (lambda r: flip_bit(r, -1000), "checksum"),
    "unknown dtype": (lambda r: edit_header(r, lambda h: h[Q].update(dtype="F64")), "F64"),
    "negative shape": (lambda r: edit_header(r, lambda h: h[Q].update(shape=[-1, -64])), "lie"),
    "overlap": (
        lambda r: edit_header(r, lambda h: h[Q].update(data_offsets=[64, 128])),
        "does not lie where",
    ),
    "B7 a dtype that is a list": (
        lambda r: edit_header(r, lambda h: h[Q].update(dtype=[])),
        "dtype",
    ),
    "B7 an empty but huge shape": (
        lambda r: edit_header(r, lambda h: h[Q].update(shape=[0, 1 << 63], data_offsets=[0, 0])),
        "lie",
    ),
    "B7 offsets as floats": (
        lambda r: edit_header(r, lambda h: h[Q].update(data_offsets=[0.0, 3072.0])),
        "lie",
    ),
    "B7 a shape of booleans": (
        lambda r: edit_header(r, lambda h: h[Q].update(shape=[True, True])),
        "lie",
    ),
    "B7 deep header": (lambda r: nest(r), "header"),
    "B7 deep config": (lambda r: (r / fd.CONFIG).write_text("[" * 100_000), "read as JSON"),
    "B7 deep generation": (
        lambda r: (r / fd.GENERATION).write_text('{"a":' * 100_000),
        "read as JSON",
    ),
    "B7 deep field": (
        lambda r: (r / fd.CONFIG).write_text(
            (r / fd.CONFIG).read_text().replace('"rms"', "[" * 300 + "]" * 300)
        ),
        "norm = .*of type str",
    ),
    "B7 a number too large for a float": (
        lambda r: edit_json(r / fd.CONFIG, lambda c: c.update(norm_eps=10**400)),
        "norm_eps",
    ),
    "B7 an infinite number": (
        lambda r: edit_json(r / fd.CONFIG, lambda c: c.update(norm_eps=float("inf"))),
        "norm_eps",
    ),
    "B7 a number of too many digits": (
        lambda r: (r / fd.CONFIG).write_text('{"vocab_size": ' + "9" * 5000 + "}"),
        "read as JSON",
    ),
    "B7 exit 0": (
        lambda r: edit_json(r / fd.GENERATION, lambda c: c.update(exit_layer=0)),
        "exit_layer = 0 is not in 1..4",
    ),
    "B7 a cache of no kind": (
        lambda r: edit_json(r / fd.GENERATION, lambda c: c.update(kv_cache="int4")),
        "kv_cache = 'int4' is none",
    ),
    "B7 a cache of a number": (
        lambda r: edit_json(r / fd.GENERATION, lambda c: c.update(kv_cache=[8])),
        "none of this model",
    ),
    "B7 drafts among none": (
        lambda r: edit_json(r / fd.GENERATION, lambda c: c.update(draft_vocab=0)),
        "draft_vocab = 0 is not in 1..97",
    ),
    "B7 a context of bits": (
        lambda r: edit_json(r / fd.GENERATION, lambda c: c.update(eos_token_id=True)),
        "eos_token_id = True",
    ),
    "B7 do_sample a word": (
        lambda r: edit_json(r / fd.GENERATION, lambda c: c.update(do_sample="yes")),
        "do_sample = 'yes'",
    ),
    "B7 a temperature below 0": (
        lambda r: edit_json(r / fd.GENERATION, lambda c: c.update(temperature=-1)),
        "temperature",
    ),
    "B7 top_p of no number": (
        lambda r: edit_json(
            r / fd.GENERATION, lambda c: c.update(do_sample=True, top_p=float("nan"))
        ),
        "top-p",
    ),
    "B7 looks as floats": (lambda r: calibrated(r, looks=[1.0, 2.0]), "whole numbers"),
    "B7 looks as text": (lambda r: calibrated(r, looks="12"), "whole numbers"),
    "B7 last as a float": (lambda r: calibrated(r, last=3.0), "whole numbers"),
    "B7 a huge threshold": (lambda r: calibrated(r, threshold=10**400), "auto_exit"),
    "B7 auto_exit a list": (
        lambda r: edit_json(r / fd.GENERATION, lambda c: c.update(auto_exit=[])),
        "auto_exit",
    ),
    "B1 a million layers": (
        lambda r: edit_json(r / fd.CONFIG, lambda c: c.update(num_hidden_layers=10**6)),
        "at most 4096",
    ),
    "B1 many layers": (
        lambda r: edit_json(r / fd.CONFIG, lambda c: c.update(num_hidden_layers=4096)),
        "lacks tensor",
    ),
    "B1 a long context": (
        lambda r: edit_json(r / fd.CONFIG, lambda c: c.update(max_position_embeddings=1 << 24)),
        "max_position_embeddings = 16777216 takes",
    ),
    "B1 a shape of big numbers": (
        lambda r: edit_header(r, lambda h: h[Q].update(shape=[10**4000] * 500)),
        "the header",
    ),
    "B1 a shape of numbers": (
        lambda r: edit_header(r, lambda h: h[Q].update(shape=[10**30] * 300)),
        "does not lie where",
    ),
    "B1 a header of lists": (
        lambda r: edit_header(r, lambda h: h.update(x=[[]] * 200_000)),
        "the header",
    ),
    "B1 a config of lists": (
        lambda r: (r / fd.CONFIG).write_text("[" + "[]," * (1 << 20) + "[]]"),
        "at most 1048576 bytes",
    ),
    "B1 a name without end": (
        lambda r: edit_header(r, lambda h: h.update({"x" * 5000: h.pop("final_norm.weight")})),
        "tensor",
    ),
    "no offsets": (lambda r: edit_header(r, lambda h: h[Q].pop("data_offsets")), "header"),
    "renamed": (
        lambda r: edit_header(r, lambda h: h.update(extra=h.pop("final_norm.weight"))),
        "tensor 'final_norm.weight'",
    ),
    "illegal code": (
        lambda r: edit_tensor(r, Q, lambda t: t.__setitem__((1, 2), 0xC0)),
        "q_proj.weight: illegal 2-bit code 3",
    ),
    "illegal int8": (
        lambda r: edit_tensor(r, "lm_head.weight", lambda t: t.__setitem__((0, 0), -128)),
        "-128",
    ),
    "not finite": (
        lambda r: edit_tensor(r, "final_norm.weight", lambda t: t.__setitem__(0, np.nan)),
        "not finite",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused(fault: str, tmp_path: Path) -> None:
    root = random_folder(tmp_path, twin("bitskip-v1"))
    fd.read_folder(root)
    damage, words = FAULTS[fault]
    damage(root)
    tracemalloc.start()
    try:
        with pytest.raises(fd.FormatError, match=words) as found:
            fd.read_folder(root)
        assert tracemalloc.get_traced_memory()[1] < 150 << 20
    finally:
        tracemalloc.stop()
    assert len(str(found.value)) < 1000


def test_recommended_sampling(tmp_path: Path) -> None:
    """SPEC 9.7: without do_sample the penalty alone."""
    said = {"temperature": 0.6, "top_k": 7, "repetition_penalty": 1.1}
    config = twin("bitskip-v1")
    fd.write_folder(tmp_path / "m", config, random_tensors(config), sampling=said)
    assert fd.read_folder(tmp_path / "m").sampling == said
    edit_json(tmp_path / "m" / fd.GENERATION, lambda c: c.update(do_sample=False))
    assert fd.read_folder(tmp_path / "m").sampling == {"repetition_penalty": 1.1}
    edit_json(tmp_path / "m" / fd.GENERATION, lambda c: c.update(do_sample=True, temperature=None))
    assert fd.read_folder(tmp_path / "m").sampling == {**said, "temperature": 1.0}
    fd.write_folder(tmp_path / "n", config, random_tensors(config))
    assert "do_sample" not in json.loads((tmp_path / "n" / fd.GENERATION).read_text())


def test_a_setting_that_was_calibrated_is_read(tmp_path: Path) -> None:
    root = random_folder(tmp_path, twin("bitskip-v1"))
    calibrated(root)
    assert fd.read_folder(root).auto_exit is not None


@pytest.mark.parametrize("name", [fd.CONFIG, fd.GENERATION, fd.WEIGHTS])
def test_a_file_that_is_none_is_not_waited_for(name: str, tmp_path: Path) -> None:
    root = random_folder(tmp_path, twin("bitskip-v1"))
    (root / name).unlink()
    os.mkfifo(root / name)
    with pytest.raises(fd.FormatError):
        fd.read_folder(root)


def test_a_bfloat16_head_that_is_no_number_is_refused(tmp_path: Path) -> None:
    root = random_folder(tmp_path, twin("bfloat16-head"))
    assert fd.read_folder(root).tensors["lm_head.weight"].dtype == np.uint16
    edit_tensor(root, "lm_head.weight", lambda t: t.__setitem__((96, 47), 0x7F80))
    with pytest.raises(fd.FormatError, match=r"lm_head\.weight holds a value that is not finite"):
        fd.read_folder(root)
    config = twin("bfloat16-head")
    as_half = {k: t.view(np.float16) if t.dtype == np.uint16 else t
               for k, t in random_tensors(config).items()}  # fmt: skip
    with pytest.raises(fd.FormatError, match=r"is float16.*asks for bfloat16"):
        fd.write_folder(tmp_path / "n", config, as_half)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(fd.FormatError, match="no model folder"):
        fd.read_folder(tmp_path / "none")


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    root = random_folder(tmp_path, twin("tiny"))
    size = (root / fd.WEIGHTS).stat().st_size
    for at in np.random.default_rng(0).integers(0, size, 60).tolist():
        flip_bit(root, at)
        with pytest.raises(fd.FormatError):
            fd.read_folder(root)
        flip_bit(root, at)
    fd.read_folder(root)


def test_a_changed_model_keeps_what_its_folder_recommends(tmp_path: Path) -> None:
    config, name = twin("tiny"), "final_norm.weight"
    fd.write_folder(
        tmp_path / "a", config, random_tensors(config), kv_cache="int8", draft_vocab=50,
        exit_layer=2, trained_context=32, trained_exits=(2, 4), eos_token_id=(1, 2),
        sampling={"temperature": 0.5, "top_k": 9}, chat=fd.ChatForm("{{ messages }}", "a"),
    )  # fmt: skip
    before = fd.read_folder(tmp_path / "a")
    fd.write_changed(
        before, tmp_path / "b", config, {name: before.tensors[name] * 2}, before.trained_exits
    )
    after = fd.read_folder(tmp_path / "b")
    assert np.array_equal(after.tensors[name], before.tensors[name] * 2)
    apart = {"path", "tensors"}
    for field in dataclasses.fields(fd.Folder):
        if field.init and field.name not in apart:
            assert getattr(after, field.name) == getattr(before, field.name), field.name
    assert after.kv_cache == "int8" and after.sampling["top_k"] == 9
