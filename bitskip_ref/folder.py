"""The model folder (FORMAT): reading with every check, writing whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitskip_ref.cache import check_kv_cache
from bitskip_ref.config import ConfigError, ModelConfig
from bitskip_ref.constants import KV_CACHES
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.documents import read_text
from bitskip_ref.excerpt import shown
from bitskip_ref.exits.confidence import ConfidenceExit
from bitskip_ref.exits.fixed import FixedExit
from bitskip_ref.exits.named import describe_rule, named_rule
from bitskip_ref.files import replace_file, replace_folder
from bitskip_ref.rule import ExitRule
from bitskip_ref.safetensors_file import give_back, read_tensors, write_tensors
from bitskip_ref.tensors import (
    WEIGHTS,
    FormatError,
    checked_tensors,
    expected_tensors,
    tensor_count,
)

FORMAT = 1
LARGEST_JSON = 1 << 20  # bytes of a config; they have some hundred
FEW = 8  # exits to choose from
SMALL = 1 << 20  # bytes of weights that are checked before a thread has started
ROOM = 256 << 20  # bytes that tables of positions may take with a model of any size
CONFIG = "config.json"
TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"
CHAT = "chat_template.jinja"
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""What a folder may recommend of a Sampler (SPEC 9.7), under these names."""
PARTS = (WEIGHTS, TOKENIZER, CHAT, GENERATION, CONFIG)  # the config last: it names the weights


@dataclass(frozen=True)
class ChatForm:
    """A Jinja template in transformers' manner, and the two tokens that it may name."""

    template: str
    bos_token: str = ""
    eos_token: str = ""


@dataclass(frozen=True)
class Folder:
    """A model as read. Arrays are read-only views of the mapped file."""

    path: Path
    config: ModelConfig
    tensors: dict[str, np.ndarray]
    tokenizer: Path | None
    eos_token_id: int | None = None  # ends a text, and in files of text a document
    bos_token_id: int | None = None
    exit_layer: int | None = None  # where it stops unless told otherwise; None: at full depth
    draft_vocab: int | None = None  # speculation drafts among so many first ids; None: all
    kv_cache: str | None = None  # what caches hold unless told otherwise (SPEC 6.5, 6.8)
    trained_context: int | None = None  # tokens of a window in training; None: unknown
    trained_exits: tuple[int, ...] | None = None  # exits with a loss of their own; None: unknown
    auto_exit: ExitRule | None = None  # what `--exit-layer auto` means; None: not calibrated
    more_eos_token_ids: tuple[int, ...] = ()  # that end a text, too
    chat: ChatForm | None = None  # how messages become a prompt; None: the model does not chat
    sampling: Mapping[str, float] = field(default_factory=dict)  # some of SAMPLING (SPEC 9.7)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """All ids that end a text (SPEC 9.4)."""
        first = () if self.eos_token_id is None else (self.eos_token_id,)
        return first + self.more_eos_token_ids

    @property
    def exits(self) -> list[int]:
        """Depths worth a choice, ascending: those trained for (the quarters, if these are unknown
        or many), the full depth, what was recommended and what was calibrated.
        """
        blocks, trained = self.config.num_hidden_layers, self.trained_exits
        found = {blocks, self.exit_layer or blocks}
        if trained is None or len(trained) > FEW:
            trained = ConfidenceExit().usual_looks(blocks)
        found.update(trained)
        if isinstance(self.auto_exit, FixedExit):
            found.add(self.auto_exit.deepest(self.config))
        return sorted(found)


# ---- reading ------------------------------------------------------------------------


def read_folder(path: str | os.PathLike[str]) -> Folder:
    """Map a model folder. Raises FormatError (or its sub-case in the message) for any fault."""
    root = Path(path)
    if not root.is_dir():
        raise FormatError(f"no model folder at {root}")
    stored = read_json(root / CONFIG)
    if stored.pop("model_type", None) != "bitskip" or stored.pop("bitskip_format", None) != FORMAT:
        raise FormatError(f"{root / CONFIG}: not a bitskip model of format {FORMAT}")
    stored.pop("architectures", None)
    digest = stored.pop("weights_sha256", None)
    try:
        config = ModelConfig.from_dict(stored)
    except ConfigError as error:
        raise FormatError(f"{root / CONFIG}: {error}") from None
    weights = root / WEIGHTS
    if not weights.is_file():
        raise FormatError(f"{root} lacks {WEIGHTS}")
    tensors = read_tensors(weights, tensor_count(config))
    _check_positions(root, config, sum(t.nbytes for t in tensors.values()))
    # Values and checksum of a large file each take a core for a while: side by side.
    problems: list[BaseException] = []

    def check() -> None:
        try:
            for tensor in checked_tensors(config, tensors):
                give_back(tensor)
        except BaseException as error:
            problems.append(error)

    checking = threading.Thread(target=check)
    with open(weights, "rb") as file:
        if os.fstat(file.fileno()).st_size < SMALL:
            check()
            found = hashlib.sha256(file.read()).hexdigest()
        else:
            checking.start()
            found = hashlib.file_digest(file, "sha256").hexdigest()
            checking.join()
    if found != digest:
        raise FormatError(
            f"{weights} does not match the checksum in {CONFIG}: the file is damaged or was "
            "exchanged; copy or export it again"
        )
    if problems:
        raise problems[0]
    extra = read_json(root / GENERATION) if (root / GENERATION).exists() else {}
    numbers = {}
    ends = extra.get("eos_token_id")
    if isinstance(ends, list):
        extra["eos_token_id"], *more = ends or [None]
        for end in more:
            if type(end) is not int or not 0 <= end < config.vocab_size:
                raise FormatError(f"{root / GENERATION}: eos_token_id holds {shown(end)}")
    else:
        more = []
    for name, least, most in (
        ("eos_token_id", 0, config.vocab_size - 1),
        ("bos_token_id", 0, config.vocab_size - 1),
        ("exit_layer", 1, config.num_hidden_layers),
        ("draft_vocab", 1, config.vocab_size),
        ("trained_context", 1, config.max_position_embeddings),
    ):
        value = extra.get(name)
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise FormatError(
                f"{root / GENERATION}: {name} = {shown(value)} is not in {least}..{most}"
            )
        numbers[name] = value
    trained_exits = _trained_exits(root / GENERATION, extra, config)
    auto_exit = _auto_exit(root / GENERATION, extra, config)
    kv_cache = extra.get("kv_cache")
    try:
        _ = kv_cache is None or check_kv_cache(kv_cache, config)
    except (ValueError, TypeError):
        raise FormatError(
            f"{root / GENERATION}: kv_cache = {shown(kv_cache)} is none of this model's: "
            f"{', '.join(KV_CACHES)} (int8 up to 131,072 positions)"
        ) from None
    tokenizer = root / TOKENIZER
    return Folder(
        root, config, tensors, tokenizer if tokenizer.is_file() else None,
        **numbers, kv_cache=kv_cache, trained_exits=trained_exits, auto_exit=auto_exit,
        more_eos_token_ids=tuple(more), chat=_chat(root, extra),
        sampling=_sampling(root / GENERATION, extra),
    )  # fmt: skip


def _check_positions(root: Path, config: ModelConfig, size: int) -> None:
    """Refuse a context whose tables of positions (SPEC 6.1) dwarf the weights."""
    table = 4 * config.max_position_embeddings * config.head_dim
    if table > 2 * size + ROOM:
        raise FormatError(
            f"{root / CONFIG}: max_position_embeddings = {config.max_position_embeddings} takes "
            f"{table} bytes of tables for {size} bytes of weights; at most {2 * size + ROOM} are "
            "taken: lower it"
        )


def _chat(root: Path, extra: dict[str, Any]) -> ChatForm | None:
    path = root / CHAT
    if not path.exists():
        return None
    words = {name: extra.get(name) or "" for name in ("bos_token", "eos_token")}
    for name, word in words.items():
        if not isinstance(word, str):
            raise FormatError(f"{root / GENERATION}: {name} = {shown(word)} is no text")
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"not a file of at most {LARGEST_JSON} bytes")
        return ChatForm(read_text(path), **words)
    except (ValueError, OSError) as error:
        raise FormatError(f"{path}: cannot be read ({error})") from None


def _trained_exits(
    path: Path, extra: dict[str, Any], config: ModelConfig
) -> tuple[int, ...] | None:
    found, last = extra.get("trained_exits"), config.num_hidden_layers
    if found is None:
        return None
    if not (
        isinstance(found, list) and all(type(n) is int and 1 <= n <= last for n in found)
        and found == sorted(set(found))
    ):  # fmt: skip
        raise FormatError(
            f"{path}: trained_exits = {shown(found)} is no list of exits 1..{last} in their order"
        )
    return tuple(found)


def recommended_sampling(generation: Mapping[str, Any]) -> dict[str, float]:
    """Which of SAMPLING a generation_config recommends (SPEC 9.7).

    Raises ValueError for a wrong type or a value that no Sampler takes.
    """
    drawn = generation.get("do_sample")
    if not (drawn is None or isinstance(drawn, bool)):
        raise ValueError(f"do_sample = {shown(drawn)}: must be true or false")
    found = {n: generation[n] for n in SAMPLING if generation.get(n) is not None}
    Sampler(**found)
    if drawn:
        return {"temperature": 1.0, **found}
    return {n: v for n, v in found.items() if n == "repetition_penalty"}


def _sampling(path: Path, extra: dict[str, Any]) -> dict[str, float]:
    try:
        return recommended_sampling(extra)
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from None


def _auto_exit(path: Path, extra: dict[str, Any], config: ModelConfig) -> ExitRule | None:
    stored = extra.get("auto_exit")
    if stored is None:
        return None
    try:
        whole = [stored["last"], *(stored["looks"] or [])]
        if not all(n is None or type(n) is int for n in whole):
            raise ValueError(f"blocks are whole numbers, not {shown(whole)}")
        return named_rule(
            stored["exit_layer"], stored["threshold"], stored["looks"], stored["last"], config
        )
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise FormatError(
            f"{path}: auto_exit is not a setting of this model ({shown(error)}): calibrate "
            "again, or remove it"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a regular file of at most LARGEST_JSON bytes. Raises FormatError."""
    if not path.exists():
        raise FormatError(f"{path.parent} lacks {path.name}: not a model folder")
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"not a file of at most {LARGEST_JSON} bytes")
        value = json.loads(read_text(path))
    except (ValueError, OSError, RecursionError) as error:
        raise FormatError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: must hold a JSON object")
    return value


# ---- writing ------------------------------------------------------------------------


def write_folder(
    path: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    tokenizer_json: str | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    bos_token_id: int | None = None,
    exit_layer: int | None = None,
    draft_vocab: int | None = None,
    kv_cache: str | None = None,
    trained_context: int | None = None,
    trained_exits: Sequence[int] | None = None,
    chat: ChatForm | None = None,
    sampling: Mapping[str, float] | None = None,
) -> None:
    """Write a model folder, whole or not at all.

    What an older folder holds beside a model's files stays, and if it is that of a like model
    (`like_folder`), its calibrated `auto` exit. tensors: asked for one by one, in file order, so
    that a mapping may make them then. Raises FormatError if they are not those of the config;
    nothing has changed then.
    """
    shapes = expected_tensors(config)
    _check_positions(
        Path(path), config, sum(np.dtype(k).itemsize * math.prod(s) for k, s in shapes.values())
    )
    checked = checked_tensors(config, tensors)
    if isinstance(eos_token_id, Sequence):  # one is written as one, none as null
        eos_token_id = eos_token_id if eos_token_id[1:] else next(iter(eos_token_id), None)
    generation: dict[str, Any] = {
        "eos_token_id": eos_token_id,
        "bos_token_id": bos_token_id,
        "exit_layer": exit_layer,
        "draft_vocab": draft_vocab,
    }
    if kv_cache is not None:
        generation["kv_cache"] = kv_cache
    if trained_context is not None:
        generation["trained_context"] = trained_context
    if trained_exits is not None:
        generation["trained_exits"] = list(trained_exits)
    if chat is not None:
        generation |= {"bos_token": chat.bos_token, "eos_token": chat.eos_token}
    generation |= stored_sampling(sampling or {})
    older = like_folder(Path(path), config, tokenizer_json)
    if older is not None and older.auto_exit is not None:
        generation["auto_exit"] = read_json(older.path / GENERATION)["auto_exit"]
    said = json.dumps(generation, indent=2) + "\n"
    for name, text in ((CHAT, chat.template if chat else ""), (GENERATION, said)):
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise FormatError(f"{path}: {name} would not be valid Unicode") from None
        if size > LARGEST_JSON:
            raise FormatError(f"{path}: {name} would have {size} bytes, more than {LARGEST_JSON}")
    with replace_folder(Path(path), PARTS) as root:
        digest = write_tensors(root / WEIGHTS, shapes, checked)
        if tokenizer_json is not None:
            _write_text(root / TOKENIZER, tokenizer_json)
        if chat is not None:
            _write_text(root / CHAT, chat.template)
        _write_text(root / GENERATION, said)
        stored = {
            "model_type": "bitskip",
            "architectures": ["BitskipForCausalLM"],
            "bitskip_format": FORMAT,
            **config.to_dict(),
            "weights_sha256": digest,
        }
        _write_text(root / CONFIG, json.dumps(stored, indent=2) + "\n")


def write_changed(
    folder: Folder,
    path: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    trained_exits: Sequence[int] | None,
) -> None:
    """Write a folder's model with some tensors new: the others, and what it recommends, stay.

    A calibrated exit is not kept: it was another model's. Raises as `write_folder` does.
    """
    write_folder(
        path,
        config,
        {**folder.tensors, **tensors},
        tokenizer_json=read_text(folder.tokenizer) if folder.tokenizer else None,
        eos_token_id=folder.end_ids,
        bos_token_id=folder.bos_token_id,
        exit_layer=folder.exit_layer,
        draft_vocab=folder.draft_vocab,
        kv_cache=folder.kv_cache,
        trained_context=folder.trained_context,
        trained_exits=trained_exits,
        chat=folder.chat,
        sampling=folder.sampling,
    )


def stored_sampling(sampling: Mapping[str, float]) -> dict[str, Any]:
    """The keys of generation_config.json that `recommended_sampling` reads so; none for nothing."""
    return {"do_sample": "temperature" in sampling, **sampling} if sampling else {}


def like_folder(path: Path, config: ModelConfig, tokenizer_json: str | None) -> Folder | None:
    """The model folder at `path` if its shape and tokenizer are these; weights and head may differ.

    None for anything else there, and for nothing.
    """
    try:
        if not (path / CONFIG).is_file():
            return None
        folder = read_folder(path)
        words = folder.tokenizer and read_text(folder.tokenizer)
    except (ValueError, OSError):
        return None
    like = folder.config.replace(head_format=config.head_format) == config
    return folder if like and words == tokenizer_json else None


def write_auto_exit(folder: Folder, rule: ExitRule, found: Mapping[str, Any]) -> None:
    """Make `rule` what `--exit-layer auto` means for a model folder; nothing else changes.

    found: JSON values that say how it was found; they are kept with the setting.
    """
    path = folder.path / GENERATION
    generation = read_json(path) if path.exists() else {}
    generation["auto_exit"] = {**describe_rule(rule, folder.config), **found}
    _write_text(path, json.dumps(generation, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    with replace_file(path) as file:
        file.write(text.encode("utf-8"))
