"""Many texts without a server: in order, and from a file to a file, going on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from bitskip_cpu.generation_options import GenerationOptions
from bitskip_cpu.many.scheduler import Scheduler
from bitskip_cpu.many.sequence import End, Said, Sequence
from bitskip_ref.documents import read_text
from bitskip_ref.words import unknown

Asked = tuple[list[int], GenerationOptions]
"""Ids of a prompt, and how its text is generated."""

OPTIONS = frozenset(f.name for f in fields(GenerationOptions))


def in_order(scheduler: Scheduler, asked: Iterable[Asked]) -> Iterator[End]:
    """The end of each text, in the order asked. Texts are taken as they are needed.

    A text ends with an error if it went wrong on the way; raises ValueError for one that is refused
    before. The scheduler must be nobody else's.
    """
    under_way: deque[tuple[Sequence, list[End]]] = deque()
    source = iter(asked)
    more = True
    while more or under_way:
        # A short text behind a long one ends early: more are under way than run.
        while more and len(under_way) < 4 * scheduler.parallel:
            try:
                ids, options = next(source)
            except StopIteration:
                more = False
                break
            ends: list[End] = []

            def tell(event: Said | End, ends: list[End] = ends) -> None:
                if isinstance(event, End):
                    ends.append(event)

            text = Sequence(scheduler.model, ids, options, tell)
            scheduler.submit([text])
            under_way.append((text, ends))
        while under_way and under_way[0][1]:
            yield under_way.popleft()[1][0]
        if under_way and not under_way[0][1]:
            scheduler.step()


# ---- files ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of a file of prompts."""

    prompt: str
    options: GenerationOptions
    given: dict[str, Any]  # the line's object, its `id` among it


def read_prompts(path: Path, options: GenerationOptions) -> list[Line]:
    """The prompts of a JSONL file: strings, or objects with `prompt`, options, and maybe an `id`.

    Blank lines are left out. Raises ValueError with the line's number, before anything is run.
    """
    found = []
    for number, text in enumerate(read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        given = {"prompt": value} if isinstance(value, str) else value
        if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
            raise ValueError(
                f'{path}, line {number}: must be a string, or an object with "prompt", a string'
            )
        changes = {k: v for k, v in given.items() if k not in ("prompt", "id")}
        try:
            for name in changes:
                if name not in OPTIONS:
                    raise ValueError(unknown("option", name, sorted(OPTIONS)))
            found.append(Line(given["prompt"], options.replace(**changes), given))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return found


def fingerprint(weights: str | None, kv_cache: str, line: Line) -> str:
    """What an answer depends on: the weights' hash, the kind of cache, the prompt, the options."""
    facts = [weights, kv_cache, line.given, repr(line.options)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def answer_file(model: Any, lines: list[Line], path: Path, parallel: int) -> Iterator[int]:
    """Write the answers, a JSON line for each prompt and in their order; yields how many there are.

    The file grows line by line. What it holds already of these prompts stays, and the rest is
    added: the whole is the same, byte for byte, however often it was broken off. Raises ValueError
    for a file that holds other things.
    """
    config = json.loads(read_text(model.folder.path / "config.json"))
    lines = [replace(line, options=line.options.recommended(model.folder)) for line in lines]
    prints = [fingerprint(config.get("weights_sha256"), model.kv_cache, line) for line in lines]
    kept = _kept(path, prints)
    with path.open("r+b" if path.exists() else "xb") as file:
        file.truncate(sum(map(len, kept)))
        file.seek(0, 2)
        yield len(kept)
        latest = len(kept) - 1  # prompt that was asked for

        def asked() -> Iterator[Asked]:
            nonlocal latest
            for line in lines[len(kept) :]:
                latest += 1
                yield model.prompt_ids(line.prompt, line.options.special), line.options

        ends = in_order(Scheduler(model, parallel=parallel), asked())
        for i in range(len(kept), len(lines)):
            try:
                end = next(ends)
            except ValueError as error:
                raise ValueError(f"prompt {latest}: {error}") from None
            if end.error is not None:
                raise ValueError(f"prompt {i}: {end.error}")
            file.write(_line(i, lines[i], prints[i], end))
            file.flush()
            yield i + 1


def _line(i: int, line: Line, print_: str, end: End) -> bytes:
    g = end.generation
    answer = {
        "index": i, **({"id": line.given["id"]} if "id" in line.given else {}),
        "text": g.text, "token_ids": g.token_ids, "exit_layers": g.exit_layers,
        "prompt_tokens": g.prompt_tokens, "stop_reason": g.stop_reason, "fingerprint": print_,
    }  # fmt: skip
    return json.dumps(answer).encode() + b"\n"


def _kept(path: Path, prints: list[str]) -> list[bytes]:
    """The whole lines of an answer file that is to be gone on with."""
    if not path.exists():
        return []
    whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    for i, line in enumerate(whole):
        try:
            right = i < len(prints) and json.loads(line)["fingerprint"] == prints[i]
        except (ValueError, LookupError, TypeError):
            right = False
        if not right:
            raise ValueError(
                f"{path}, line {i + 1}, is not the answer to prompt {i} with this model and these "
                "options: remove the file, or give another name"
            )
    return whole
