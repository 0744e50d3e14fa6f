"""What stopping token by token can gain at most, and what gates gain: against fixed exits.

    python -m benchmarks.exits_bound [MODEL] --text held_out.txt [--tokens 8192]
        [--looks 6 --last 12 --thresholds 0.4,0.5,0.6] [--impose bitskip-v1]
        [-o results/exits-bound/stories-24.json]

Three kinds of rules, at equal loss with fixed exits (two neighbours, mixed), and with a coin thrown
between any two of them, which is the better comparison where exits between were not trained:
- an oracle that stops at the first of some blocks whose most likely token is full depth's;
- an oracle that stops at the first whose prediction is near full depth's (KL below a bound, chosen
  so that its loss is that of a fixed exit);
- gates (SPEC 8.4), run token by token.
Oracles are judged on full-depth passes: skipped blocks harm no later token. Costs are medians of
differences of short bursts in turns: a block, a look, a skipped block's keys and values, and all
the rest. `least` counts blocks and the rest alone; `skipped` adds keys and values; `looks` adds
gates, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import bitskip_cpu
from bitskip.tables import table
from bitskip_cpu.cli.loading import prepare
from bitskip_cpu.engine import Engine, random_model
from bitskip_cpu.heldout.scoring import step_through
from bitskip_cpu.heldout.text import Text, read_text
from bitskip_ref.config import preset
from bitskip_ref.exits import FixedExit, GateExit
from bitskip_ref.files import replace_file
from bitskip_ref.heldout import token_losses, windows

BURST = 8  # steps that are timed together
DEEP = 64  # positions before them


class Survey(NamedTuple):
    """Each predicted token after each number of blocks, [L + 1, T]; row 0 is empty."""

    losses: np.ndarray
    tops: np.ndarray
    divergences: np.ndarray  # KL(full depth || exit), nats


class Costs(NamedTuple):
    """Seconds of a step's parts."""

    rest: float  # embedding, head, Python
    block: float
    look: float  # a gate
    skipped: float  # keys and values of a block
    bytes_skipped: float  # of a block's, as a share


def survey(engine: Engine, text: Text) -> Survey:
    """One pass at full depth over windows of the context."""
    config, count = engine.config, len(text.tokens) - 1
    blocks = config.num_hidden_layers
    shape = blocks + 1, count
    found = Survey(np.zeros(shape), np.zeros(shape, np.int64), np.zeros(shape))
    context = config.max_position_embeddings
    for begin, _, end in windows(len(text.tokens), context, context):
        kept: dict[int, np.ndarray] = {}

        def visit(n: int, first: int, z: np.ndarray, kept: Any = kept, begin: int = begin) -> None:
            at = slice(begin + first, begin + first + len(z))
            after = text.tokens[at.start + 1 : at.stop + 1]
            found.losses[n, at], found.tops[n, at] = token_losses(z, after), z.argmax(1)
            d = z - z.max(1, keepdims=True)
            kept[n] = d - np.log(np.exp(d).sum(1, keepdims=True))
            if n == blocks:
                p = np.exp(kept[n])
                for exit_, logs in kept.items():
                    found.divergences[exit_, at] = (p * (kept[n] - logs)).sum(1)

        engine.extend_exits(text.tokens[begin:end].tolist(), engine.new_cache(),
                            range(1, blocks + 1), visit)  # fmt: skip
    return found


def measure(engine: Engine, rounds: int) -> Costs:
    """Medians of differences of single steps in turns; the model has gates."""
    config = engine.config
    half, full = config.num_hidden_layers // 2, config.num_hidden_layers
    looks = (half // 2, half)
    rules: dict[str, Any] = {
        "half": FixedExit(half), "full": FixedExit(full),
        "never": GateExit(1.0, layers=looks), "at once": GateExit(0.0, layers=(half,)),
        "one": GateExit(1.0, layers=(half,)),
    }  # fmt: skip
    caches = {}
    for name, rule in rules.items():
        caches[name] = engine.new_cache()
        engine.extend([1] * DEEP, caches[name], exit_layer=rule.deepest(config), last_only=True)
    taken: dict[str, list[float]] = {name: [] for name in rules}
    for _ in range(rounds):
        for name, rule in rules.items():
            caches[name].length = DEEP
            for token in range(BURST):
                start = time.perf_counter()
                engine.step(token, caches[name], rule)
                taken[name].append(time.perf_counter() - start)

    def more(name: str, than: str) -> float:
        return float(np.median(np.subtract(taken[name], taken[than])))

    block = more("full", "half") / (full - half)
    first = more("one", "full")  # with what a rule costs at all
    skipped = (more("at once", "half") - first) / (full - half)
    shapes = config.linear_shapes()
    size = {name: rows * width for name, (rows, width) in shapes.items()}
    share = (size["k_proj"] + size["v_proj"]) / sum(size.values())
    look = more("never", "full") / len(looks)
    whole = float(np.median(taken["full"]))
    return Costs(whole - full * block, block, look, max(0.0, skipped), share)


class Mixture(NamedTuple):
    """Two fixed exits in such shares that their mean loss is one wanted."""

    low: int
    high: int
    share: float  # of the higher

    @property
    def depth(self) -> float:
        """Mean blocks."""
        return self.low + self.share * (self.high - self.low)

    def of(self, seconds: dict[int, float]) -> float:
        """What a token takes, given what it takes at each exit."""
        return seconds[self.low] * (1 - self.share) + seconds[self.high] * self.share


def mixture(
    loss: float, fixed: dict[int, float], pairs: Iterable[tuple[int, int]]
) -> Mixture | None:
    """The shallowest mixture with that loss of one of the pairs (lower exit, higher one)."""
    found = [
        Mixture(low, high, (fixed[low] - loss) / ((fixed[low] - fixed[high]) or 1.0))
        for low, high in pairs
        if fixed[low] >= loss >= fixed[high]
    ]
    return min(found, key=lambda m: m.depth, default=None)


def stopped_at(stops: np.ndarray, places: Sequence[int], last: int) -> np.ndarray:
    """Blocks of each token: the first place whose row of bool [L + 1, T] says so, else `last`."""
    depths = np.full(stops.shape[1], last)
    for n in reversed(places):
        depths[stops[n]] = n
    return depths


def facts(
    name: str, depths: np.ndarray, loss: float, places: Sequence[int], last: int,
    fixed: dict[int, float], costs: dict[str, Costs],
) -> dict[str, Any]:  # fmt: skip
    """A rule's row: its time over that of the fixed exit of the same loss, for each shape."""
    depth, looks = float(depths.mean()), float(sum((depths >= n).mean() for n in places))
    made: dict[str, Any] = {"rule": name, "depth": depth, "loss": loss}
    exits = sorted(fixed)
    made["fixed"] = same = mixture(loss, fixed, itertools.pairwise(exits))
    made["coin"] = mixture(loss, fixed, itertools.combinations(exits, 2))
    if same is not None:
        for shape, c in costs.items():
            parts = c.block * depth + c.rest, c.skipped * (last - depth), c.look * looks
            whole = c.rest + c.block * same.depth
            made[shape] = [float(t / whole) for t in np.cumsum(parts)]
    return made


def near(
    found: Survey, places: Sequence[int], last: int, loss: float
) -> tuple[np.ndarray, float]:  # fmt: skip
    """Depths under the bound of KL at which the loss is nearest to one wanted, and their loss."""
    every, best = np.arange(found.losses.shape[1]), (np.zeros(0, int), float("inf"))
    for bound in np.geomspace(1e-3, 3, 60):
        depths = stopped_at(found.divergences < bound, places, last)
        got = float(found.losses[depths, every].mean())
        if abs(got - loss) < abs(best[1] - loss):
            best = depths, got
    return best


def oracles(found: Survey, costs: dict[str, Costs]) -> Iterator[dict[str, Any]]:
    """Rows of both oracles, over all blocks and over those a quarter apart."""
    full = len(found.losses) - 1
    fixed = {n: float(found.losses[n].mean()) for n in range(1, full + 1)}
    every, quarter = np.arange(found.losses.shape[1]), full // 4
    agree = found.tops == found.tops[full]
    for last in (full, 3 * quarter):
        for first, step in ((1, 1), (quarter, 1), (quarter, quarter)):
            places = range(first, last, step)
            where = f"{first}, {first + step}, ..., else {last}"
            depths = stopped_at(agree, places, last)
            loss = float(found.losses[depths, every].mean())
            yield facts(f"same token at {where}", depths, loss, places, last, fixed, costs)
            for n in (2 * quarter, 10 * quarter // 4, 3 * quarter - 1):
                depths, loss = near(found, places, last, fixed[n])
                name = f"near at {where}, loss of exit {n}"
                yield facts(name, depths, loss, places, last, fixed, costs)


def gates(
    engine: Engine, text: Text, rules: Sequence[GateExit], costs: dict[str, Costs]
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Rows of gates, run token by token beside fixed exits, and the depths of their tokens."""
    blocks = engine.config.num_hidden_layers
    exits = [FixedExit(n) for n in range(blocks // 4, blocks + 1)]
    found = step_through(engine, text, [*exits, *rules])
    fixed = {s.rule.deepest(engine.config): s.losses.loss for s in found[: len(exits)]}
    seconds = {s.rule.deepest(engine.config): _seconds(s) for s in found[: len(exits)]}
    for s, rule in zip(found[len(exits) :], rules, strict=True):
        last, places = rule.deepest(engine.config), rule.looks(engine.config)
        name = f"gate > {rule.threshold} at {', '.join(map(str, places))}, else {last}"
        row = facts(name, s.depths, s.losses.loss, places, last, fixed, costs)
        if row["fixed"] is not None:
            row["run"] = [_seconds(s) / row[name].of(seconds) for name in ("fixed", "coin")]
        yield row, s.depths


def _seconds(s: Any) -> float:
    return 1 / s.tokens_per_s


class Imposed:
    """Asks gates, and stops where it is told, whatever they say."""

    def __init__(self, depths: Sequence[int], looks: tuple[int, ...], last: int) -> None:
        self._depths, self._looks, self._last = itertools.cycle(depths), looks, last
        self._left: list[int] = []

    def deepest(self, config: Any) -> int:
        """As told."""
        return self._last

    def looks(self, config: Any) -> tuple[int, ...]:
        """As told; asked once for each token."""
        depth = next(self._depths)
        self._left = [n == depth for n in self._looks]
        return self._looks

    def check(self, config: Any) -> None:
        """Any model will do."""

    def stops(self, probe: Any) -> bool:
        """As told."""
        probe.gate()
        return self._left.pop(0)


def imposed(
    engine: Engine, row: dict[str, Any], depths: np.ndarray, looks: tuple[int, ...], last: int,
    rounds: int,
) -> list[float]:  # fmt: skip
    """Time a token over that of the fixed exit, and of the coin: least times of 32 steps."""
    some = np.sort(depths)[np.linspace(0, len(depths) - 1, 32).astype(int)]
    some = np.random.default_rng(0).permutation(some).tolist()
    exits = sorted({n for m in (row["fixed"], row["coin"]) for n in (m.low, m.high)})
    least = dict.fromkeys([0, *exits], float("inf"))  # 0: the gates
    for _ in range(rounds):
        for n in least:
            rule: Any = FixedExit(n) if n else Imposed(some, looks, last)
            cache = engine.new_cache()
            start = time.perf_counter()
            for token in range(32):
                engine.step(token, cache, rule)
            least[n] = min(least[n], time.perf_counter() - start)
    return [least[0] / row[name].of(least) for name in ("fixed", "coin")]


def render(found: dict[str, Any]) -> str:
    """Markdown: the costs, then a row for each rule."""
    parts, shapes = [], list(found["costs"])
    for shape, c in found["costs"].items():
        c = Costs(**c)
        parts.append(
            f"{shape}: a block {c.block * 1e6:.2f} us; in blocks: all the rest "
            f"{c.rest / c.block:.2f}, a gate's look {c.look / c.block:.3f}, a skipped block's keys "
            f"and values {c.skipped / c.block:.3f} (of the weights {c.bytes_skipped:.3f})"
        )
    header = ["rule", "depth", "loss", "fixed exit of that loss", "coin"]
    for shape in shapes:
        header += [f"{shape}: least", "skipped", "looks"]
    rows = []
    for r in found["rows"]:
        same = ["" if r[k] is None else f"{Mixture(*r[k]).depth:.2f}" for k in ("fixed", "coin")]
        cells = [r["rule"], f"{r['depth']:.2f}", f"{r['loss']:.4f}", *same]
        for shape in shapes:
            cells += [f"{t:.3f}" for t in r.get(shape, [])] or [""] * 3
        for k in ("run", "imposed"):
            cells += [f"{t:.3f}" for t in r.get(k, [])] or [""] * 2
        rows.append(cells)
    header += ["run", "coin", "imposed", "coin"]
    return "\n".join([*parts, "", table(header, rows)])


def main() -> None:
    """The script."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model", nargs="?", help="folder or shipped name; default: shipped")
    options.add_argument("--text", type=Path, required=True)
    options.add_argument("--tokens", type=int, default=8192)
    options.add_argument("--looks", default="6")
    options.add_argument("--last", type=int, default=12)
    options.add_argument("--thresholds", default="0.4,0.5,0.6")
    options.add_argument("--impose", metavar="PRESET")
    options.add_argument("--rounds", type=int, default=40)
    options.add_argument("-o", "--out", type=Path)
    given = options.parse_args()
    prepare()
    model = bitskip_cpu.load(given.model, 1)
    text = read_text(given.text, model, given.tokens)
    costs = {model.folder.path.name: measure(model.engine, 10 * given.rounds)}
    large = None
    if given.impose:
        large = random_model(preset(given.impose).replace(gates=True), threads=1)
        costs[f"{given.impose} shape"] = measure(large, max(2, given.rounds // 8))
    rows = [*oracles(survey(model.engine, text), costs)]
    looks = tuple(map(int, given.looks.split(",")))
    rules = [GateExit(float(t), layers=looks, last=given.last) for t in given.thresholds.split(",")]
    for row, depths in gates(model.engine, text, rules, costs):
        if large is not None and row["fixed"] is not None:
            rounds = max(2, given.rounds // 8)
            row["imposed"] = imposed(large, row, depths, looks, given.last, rounds)
        rows.append(row)
    found = {
        "model": model.folder.path.name, "text": given.text.name, "tokens": len(text.tokens) - 1,
        "costs": {shape: c._asdict() for shape, c in costs.items()}, "rows": rows,
    }  # fmt: skip
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(given.out) as file:
            file.write((json.dumps(found, indent=1) + "\n").encode())
        with replace_file(given.out.with_name("table.md")) as file:  # what docs/EXITS.md shows
            file.write((render(found) + "\n").encode())
    print(render(found))


if __name__ == "__main__":
    main()
