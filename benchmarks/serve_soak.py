"""A server under many clients for a while, some of which go in the middle: bytes, times, memory.

    python benchmarks/serve_soak.py --clients 64 --seconds 600

Every answer is compared with what the same request says alone. Prints one JSON object; the exit
code is 1 where a byte was wrong, or a request lost or stuck.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from typing import Any

import httpx
import psutil

import bitskip_cpu

PROMPTS = ("Once upon a time", "Tom had a red ball.", "Lily saw a bird in the", "One day")
STUCK = 120.0  # seconds without a piece


def requests(count: int, seed: int) -> list[dict[str, Any]]:
    """Bodies of different kinds."""
    rng = random.Random(seed)
    return [
        {
            "prompt": rng.choice(PROMPTS), "max_tokens": rng.randint(4, 60), "stream": True,
            "temperature": rng.choice((0, 0.8)), "seed": rng.randrange(1 << 32),
            "exit_layer": rng.choice((12, 18, 24, "max")),
        }
        for _ in range(count)
    ]  # fmt: skip


def alone(body: dict[str, Any]) -> dict[str, Any]:
    """Its options, for `Model.generate`."""
    return {k: v for k, v in body.items() if k not in ("prompt", "stream")}


class Soak:
    """Clients, and what they saw."""

    def __init__(self, address: str, asked: list[tuple[dict[str, Any], str]], until: float) -> None:
        self.client = httpx.AsyncClient(
            base_url=address, timeout=STUCK, trust_env=False,
            limits=httpx.Limits(max_connections=None),
        )  # fmt: skip
        self.asked, self.until = asked, until
        self.right = self.wrong = self.lost = self.gone = self.refused = 0
        self.between: list[float] = []

    async def one(self, rng: random.Random) -> None:
        """A request after the other."""
        while time.monotonic() < self.until:
            body, text = rng.choice(self.asked)
            leave = rng.randint(1, 10) if rng.random() < 0.05 else None
            try:
                await self.ask(body, text, leave)
            except (httpx.HTTPError, json.JSONDecodeError) as error:
                print(type(error).__name__, error, file=sys.stderr)
                self.lost += 1

    async def ask(self, body: dict[str, Any], text: str, leave: int | None) -> None:
        """One request; it is left after `leave` pieces."""
        found, ended, last, pieces = "", False, None, 0
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code == 503:
                self.refused += 1
                await asyncio.sleep(0.2)
                return
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    ended = True
                    break
                now = time.perf_counter()
                if last is not None:
                    self.between.append(now - last)
                last = now
                found += json.loads(line[6:])["choices"][0]["text"]
                pieces += 1
                if pieces == leave:
                    self.gone += 1
                    return
        if not ended:
            self.lost += 1
        elif found == text:
            self.right += 1
        else:
            self.wrong += 1


async def soak(address: str, pid: int, options: argparse.Namespace, asked: Any) -> dict[str, Any]:
    """Run the clients; look at the server's memory on the way."""
    run = Soak(address, asked, time.monotonic() + options.seconds)
    memory: list[int] = []

    async def watch() -> None:
        while True:
            memory.append(psutil.Process(pid).memory_info().rss)
            await asyncio.sleep(options.seconds / 100)

    watching = asyncio.create_task(watch())
    rngs = (random.Random(i) for i in range(options.clients))
    await asyncio.gather(*(run.one(rng) for rng in rngs))
    watching.cancel()
    health = (await run.client.get("/health")).json()
    await run.client.aclose()
    between = sorted(run.between)
    warm = memory[len(memory) // 5 :]
    return {
        "clients": options.clients, "seconds": options.seconds, "right": run.right,
        "wrong": run.wrong, "lost": run.lost, "left_early": run.gone, "refused": run.refused,
        "tokens_per_s": len(between) / options.seconds,
        "between_median_ms": 1e3 * statistics.median(between),
        "between_p95_ms": 1e3 * between[int(0.95 * len(between))],
        "rss_after_warm_up_mb": warm[0] / 1e6, "rss_end_mb": warm[-1] / 1e6,
        "still_running": health["running"] + health["waiting"],
    }  # fmt: skip


def main() -> int:
    """Start a server, and the clients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="stories-24")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--parallel", type=int, default=16)
    options = parser.parse_args()
    model = bitskip_cpu.load(options.model, usual_cache="int8")  # as `serve` does
    asked = [(body, model.generate(body["prompt"], **alone(body)).text) for body in requests(60, 1)]
    words = [options.model, "--port", 0, "--parallel", options.parallel, "--queue", options.clients]
    server = subprocess.Popen(
        [sys.executable, "-m", "bitskip", "serve", *map(str, words)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stderr is not None
        address = ""
        for line in server.stderr:
            if found := re.search(r"(http://127\.0\.0\.1:\d+)/", line):
                address = found[1]
                break
        told = asyncio.run(soak(address, server.pid, options, asked))
    finally:
        server.terminate()
        server.communicate(timeout=60)
    print(json.dumps(told, indent=2))
    return int(bool(told["wrong"] or told["lost"] or told["still_running"] or not told["right"]))


if __name__ == "__main__":
    sys.exit(main())
