"""Self-speculative decoding against plain decoding, greedy, in turns on the same prompts.

    python benchmarks/speculate.py --text held_out.txt [--speculate 1,auto,lookup] [--draft-exit 6]
        [--draft-vocab N] [-r 3] [-t 1] [--impose bitskip-v1]

Prompts are the first tokens of the text's first documents. Speeds count what follows the prompt.
With --impose the rounds that were measured (how many drafts, how many right) are then imposed on
random weights of a preset's shape: the engine does all the work, its logits are overruled. The
draft exit and vocabulary are scaled to that shape. `lookup` drafts from the text (SPEC 11.5).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import bitskip_cpu
from bitskip.tables import table
from bitskip_cpu.cli.loading import prepare
from bitskip_cpu.engine import Engine, random_model
from bitskip_ref.config import preset
from bitskip_ref.decoding.contenders import Contenders
from bitskip_ref.decoding.draft import MOST, Draft
from bitskip_ref.decoding.generate import Token, stream
from bitskip_ref.decoding.lookup import Lookup
from bitskip_ref.decoding.lookup import stream as looked_up
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.decoding.speculate import Speculation
from bitskip_ref.decoding.speculate import stream as speculate
from bitskip_ref.documents import read_documents
from bitskip_ref.exits import FixedExit

ROUNDS = 64  # that are imposed
Round = tuple[int, int, bool]
"""Drafts that were run, those accepted, and whether another one was made but unsure."""


class Recorded(Speculation):
    """Remembers its rounds."""

    rounds_made: list[Round]
    allowed = 0

    def count(self) -> int:
        """As ever."""
        self.allowed = super().count()
        return self.allowed

    def note(self, drafted: int, accepted: int) -> None:
        """A round is over."""
        super().note(drafted, accepted)
        self.rounds_made.append((drafted, accepted, drafted < self.allowed))


class Timed:
    """An engine that knows when the prompt was done."""

    def __init__(self, engine: Any) -> None:
        self.config, self.new_cache, self.step = engine.config, engine.new_cache, engine.step
        self.speculate, self._extend = engine.speculate, engine.extend
        self.step_on, self.choose = engine.step_on, engine.choose
        self.started = 0.0

    def extend(self, *arguments: Any, **options: Any) -> np.ndarray:
        """For prompts, of which the last logits are asked, and for drafts that were looked up."""
        z = self._extend(*arguments, **options)
        if options.get("last_only"):
            self.started = time.perf_counter()
        return z


class Imposed(Timed):
    """The same, with rounds that go as recorded, whatever the weights say."""

    def __init__(self, engine: Engine, rounds: Sequence[Round]) -> None:
        """Of all rounds ROUNDS are taken, evenly by kind, in an order of no meaning."""
        super().__init__(engine)
        chosen = [sorted(rounds)[int((i + 0.5) * len(rounds) / ROUNDS)] for i in range(ROUNDS)]
        random.Random(0).shuffle(chosen)
        self.tokens = sum(accepted + 1 for _, accepted, _ in chosen)
        self._speculate, self._round, self._passes = engine.speculate, engine.round, chosen
        self._rounds = itertools.cycle(chosen)
        self.speculate = self._imposed

    def _imposed(
        self, token_id: int, cache: Any, count: int, draft: Draft, *, exit_layer: int,
        contenders: Contenders | None,
    ) -> tuple[list[int], np.ndarray]:  # fmt: skip
        """A round of the engine; the first differing logits are where the record says."""
        drafted, accepted, unsure = next(self._rounds)
        draft = dataclasses.replace(draft, least_lead=0.0)
        if unsure:  # one more is drafted, and not run
            under_way, tokens = self._round(cache, draft, exit_layer), [token_id]
            for _ in range(drafted + 1):
                tokens.append(int(under_way.draft(tokens[-1]).argmax()))
            ids, z = tokens[1:-1], under_way.verify()
        else:
            ids, z = self._speculate(
                token_id, cache, drafted, draft, exit_layer=exit_layer, contenders=contenders
            )
        for row, token in enumerate(ids):
            z[row, token] = 3e38 if row < accepted else -3e38
        return ids, z

    def looked_up(self, prompt: Sequence[int]) -> Iterator[Token]:
        """The recorded passes of looked-up drafts, steps among them, run and overruled."""
        cache, depth, rule = self.new_cache(), self.config.num_hidden_layers, FixedExit()
        self.extend(prompt, cache, last_only=True)
        yield Token(1, depth)
        for drafted, accepted, _ in self._passes:
            start = cache.length
            if drafted:
                self._extend([1] * (drafted + 1), cache, contenders=Contenders())
            else:
                self.step(1, cache, rule, contenders=Contenders())
            cache.length = start + accepted + 1
            yield from [Token(1, depth)] * (accepted + 1)


class Kept(Lookup):
    """Remembers its passes: (drafts, those right, False); a step has none."""

    rounds_made: list[Round]

    def propose(self, most: int) -> list[int]:
        """As ever."""
        drafts = super().propose(most)
        if not drafts:
            self.rounds_made.append((0, 0, False))
        return drafts

    def note(self, drafted: int, accepted: int) -> None:
        """A round is over."""
        super().note(drafted, accepted)
        self.rounds_made.append((drafted, accepted, False))


@dataclasses.dataclass
class Case:
    """One way of generating, and what was measured."""

    name: str
    lookup: bool = False
    draft_exit: int | None = None
    count: int | None = 0  # 0: plain
    draft_vocab: int | None = None
    rounds: list[Round] = dataclasses.field(default_factory=list)
    tokens: int = 0  # of one repetition, those that rounds or steps made
    texts: list[list[int]] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)  # of each repetition

    def run(self, engine: Timed, prompt: list[int], most: int, eos: int | None) -> None:
        """Generate once, within the latest repetition."""
        if isinstance(engine, Imposed):  # to the end of its last round
            most = engine.tokens
        if self.lookup and isinstance(engine, Imposed):
            tokens = engine.looked_up(prompt)
        elif self.lookup:
            kept = Kept(engine.config, FixedExit())
            kept.rounds_made = []
            tokens = looked_up(engine, prompt, kept, Sampler(), most, eos)
        elif self.count == 0:
            tokens = stream(engine, prompt, FixedExit(), Sampler(), most, eos)
        else:
            how = Recorded(
                engine.config, FixedExit(), self.draft_exit, self.count, self.draft_vocab
            )
            how.rounds_made = []
            tokens = speculate(engine, prompt, how, Sampler(), most + MOST, eos)
        made = [token.id for token in itertools.islice(tokens, most)]
        self.seconds[-1] += time.perf_counter() - engine.started
        if len(self.seconds) == 1:
            self.texts.append(made)
            # The prompt's own pass gives plain decoding its first token.
            self.tokens += len(made) - (self.lookup or self.count == 0)
            if self.lookup:
                self.rounds += [] if isinstance(engine, Imposed) else kept.rounds_made
            else:
                self.rounds += [] if self.count == 0 else how.rounds_made


def measure(
    cases: list[Case], engine_of: Callable[[Case], Timed], prompts: Sequence[list[int]],
    most: int, eos: int | None, repetitions: int,
) -> None:  # fmt: skip
    """Run every case on every prompt, in turns; the first round of all is not timed."""
    engines = [engine_of(case) for case in cases]
    for case, engine in zip(cases, engines, strict=True):
        dataclasses.replace(case, seconds=[0.0], texts=[], rounds=[]).run(
            engine, prompts[0], most, eos
        )
    for _ in range(repetitions):
        for case in cases:
            case.seconds.append(0.0)
        for prompt in prompts:
            for case, engine in zip(cases, engines, strict=True):
                case.run(engine, prompt, most, eos)


def report(cases: list[Case], same: bool = True) -> str:
    """A table of medians; ratios are those of each repetition to the plain case in it."""
    plain, rows = cases[0], []
    for case in cases:
        speeds = [case.tokens / s for s in case.seconds]
        ratios = [
            a / b for a, b in zip(speeds, (plain.tokens / s for s in plain.seconds), strict=True)
        ]
        drafted, accepted = sum(r[0] for r in case.rounds), sum(r[1] for r in case.rounds)
        rows.append((
            case.name,
            f"{statistics.median(speeds):.1f}",
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.3f} to {max(ratios):.3f}",
            f"{accepted / drafted:.3f}" if drafted else "",
            f"{case.tokens / len(case.rounds):.2f}" if case.rounds else "",
            f"{sum(a == b for a, b in zip(case.texts, plain.texts, strict=True))}" if same else "",
        ))  # fmt: skip
    header = ("case", "tokens/s", "ratio", "lowest to highest", "accepted", "tokens a round",
              "same texts")  # fmt: skip
    return table(header, rows)


def prompts_of(path: Path, model: Any, count: int, length: int) -> list[list[int]]:
    """Ids of the starts of the first documents that are long enough."""
    first = [] if model.folder.bos_token_id is None else [model.folder.bos_token_id]
    encoded = (model.tokenizer.encode(text) for text in read_documents(path))
    return [
        [*first, *ids[:length]]
        for ids in itertools.islice((ids for ids in encoded if len(ids) > 2 * length), count)
    ]


def main() -> None:
    """Print one table, and one more with --impose."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder or shipped name; default: shipped")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("-n", "--max-tokens", type=int, default=200)
    parser.add_argument("--speculate", default="1,2,3,auto", help="list of K")
    parser.add_argument("--draft-exit", default="6", help="list of exits")
    parser.add_argument("--draft-vocab", default="0", help="list of numbers of ids; 0: all")
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--impose", metavar="PRESET", help="impose the rounds on random weights")
    options = parser.parse_args()
    prepare()
    model = bitskip_cpu.load(options.model, options.threads)
    prompts = prompts_of(options.text, model, options.prompts, options.prompt_tokens)
    cases = [Case("plain")]
    ways = options.speculate.split(",")
    if "lookup" in ways:
        cases.append(Case("lookup", lookup=True))
        ways.remove("lookup")
    for e, k, v in itertools.product(
        options.draft_exit.split(","), ways, options.draft_vocab.split(",")
    ):
        name = f"K {k}, exit {e}" + (f", {v} ids" if int(v) else "")
        cases.append(Case(name, False, int(e), None if k == "auto" else int(k), int(v) or None))
    measure(cases, lambda _: Timed(model.engine), prompts, options.max_tokens,
            model.folder.eos_token_id, options.repetitions)  # fmt: skip
    print(f"{model.folder.path}, {len(prompts)} prompts, {options.threads} thread(s)\n")
    print(report(cases))
    if options.impose:
        config = preset(options.impose)
        engine = random_model(config, threads=options.threads)
        depth, vocab = (
            config.num_hidden_layers / model.config.num_hidden_layers,
            config.vocab_size / model.config.vocab_size,
        )
        imposed = [
            dataclasses.replace(
                case, rounds=[], seconds=[], texts=[], tokens=0,
                draft_exit=case.draft_exit and round(case.draft_exit * depth),
                draft_vocab=case.draft_vocab and round(case.draft_vocab * vocab),
            )
            for case in cases
        ]  # fmt: skip
        records = {case.name: case.rounds for case in cases}
        prompt = [[1] * options.prompt_tokens]
        measure(
            imposed,
            lambda case: (
                Imposed(engine, records[case.name]) if records[case.name] else Timed(engine)
            ),
            prompt, 2 * ROUNDS, None, options.repetitions,
        )  # fmt: skip
        print(f"\n{options.impose}, random weights, the same rounds imposed\n")
        print(report(imposed, same=False))


if __name__ == "__main__":
    main()
