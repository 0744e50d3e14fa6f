"""A model in a real browser: the site of `export --to web`, from a plain file server.

Needs npm (or BITSKIP_NPM_PACKAGES, a folder with the archives), Playwright and a Chromium.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from operator import sub
from pathlib import Path
from statistics import fmean, median
from typing import Any
from urllib.parse import urlsplit

import pytest

import bitskip_cpu
from bitskip_cpu import models
from bitskip_cpu.model import Model
from bitskip_export.web_site import write_site
from bitskip_ref.folder import GENERATION
from tests.serve.test_page import CHROMIUM, VIEWS, Seen, browser

__all__ = ["browser"]  # a fixture

PACKAGES = os.environ.get("BITSKIP_NPM_PACKAGES")
EXITS = (12, 18, 24)
PROMPTS = (
    "Once upon a time", "Tom had a red", "The", "One day, a little girl named", "\"Hello,\" said",
    "Lily and her mom went to the", "It was raining and", "a", "The dog ran up the hill. Then it",
    "Ben found a box. In the box there was", "Mom said: \"No! You must not", "Sam did not like",
    "1, 2, 3,", "é", "  ", "They lived happily", "The sun was hot", "Can you help me?", "Why",
    "Once there was a big bear. He was very hungry and wanted to eat all the honey in the forest. "
    "But the bees were angry, and they",
)  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.skipif(not (PACKAGES or shutil.which("npm")), reason="no npm on this machine"),
]


@contextmanager
def hosted(model: Path, out: Path, exits: tuple[int, ...]) -> Iterator[str]:
    """The address of a model's site."""
    write_site(model, out, exits, Path(PACKAGES) if PACKAGES else None)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(out)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    out = tmp_path_factory.mktemp("site")
    with hosted(models.resolve("stories-24"), out, EXITS) as address:
        yield address


@pytest.fixture(scope="module")
def model() -> Model:
    return bitskip_cpu.load("stories-24", threads=1)


@pytest.fixture
def seen(browser: Any, address: str) -> Iterator[Seen]:
    found = Seen(browser, address, "light")
    found.page.set_default_timeout(300_000)
    yield found
    assert found.said == [] and found.hosts == {urlsplit(address).netloc}
    found.page.context.close()


WRITE = """async (requests) => {
  const source = await import("/source.js");
  const told = [];
  for (const request of requests) {
    const ids = [], times = [];
    let text = "";
    for await (const piece of source.write(request)) {
      text += piece.text;
      if (piece.details) ids.push(piece.details.token_id), times.push(performance.now());
    }
    told.push({ ids, text, times });
  }
  return told;
}"""


@pytest.mark.parametrize("exit_layer", EXITS)
def test_ids_are_those_of_generate(seen: Seen, model: Model, exit_layer: int) -> None:
    """Greedy and drawn, of 20 prompts; one of them to the end of the context."""
    for temperature, seed, tokens in ((0, 0, 24), (0.9, 11, 8)):
        how = {"temperature": temperature, "seed": seed, "exit_layer": exit_layer}
        asked = [{"prompt": p, "max_tokens": tokens, **how} for p in PROMPTS]
        if exit_layer == EXITS[0] and temperature:
            asked.append({"prompt": "The " * 490, "max_tokens": 1000, **how})
        told = seen.page.evaluate(WRITE, asked)
        for request, found in zip(asked, told, strict=True):
            alone = model.generate(**request)
            assert found["ids"] == alone.token_ids, request
            assert found["text"] == alone.text, request
        tell_speed(f"exit {exit_layer}", told)


def tell_speed(what: str, told: list[dict[str, Any]]) -> None:
    """For `pytest -s`."""
    gaps = [gap for t in told for gap in map(sub, t["times"][1:], t["times"])]
    print(f"{what}: {1e3 / fmean(gaps):.0f} tokens/s, median {1e3 / median(gaps):.0f}")


@pytest.mark.parametrize("kv_cache", ["float16", "int8"])
def test_caches_are_those_that_the_folder_recommends(
    browser: Any, tmp_path: Path, kv_cache: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models.resolve("stories-24"), folder)
    said = json.loads((folder / GENERATION).read_text())
    (folder / GENERATION).write_text(json.dumps({**said, "kv_cache": kv_cache}))
    model = bitskip_cpu.load(folder, threads=1)
    assert model.kv_cache == kv_cache
    with hosted(folder, tmp_path / "site", EXITS) as address:
        seen = Seen(browser, address, "light")
        seen.page.set_default_timeout(300_000)
        for n in EXITS:
            how = {"temperature": 0, "seed": 0, "exit_layer": n, "max_tokens": 24}
            told = seen.page.evaluate(WRITE, [{"prompt": p, **how} for p in PROMPTS])
            tell_speed(f"{kv_cache} caches, exit {n}", told)
            for prompt, found in zip(PROMPTS, told, strict=True):
                assert found["ids"] == model.generate(prompt, **how).token_ids, prompt
        seen.page.context.close()


def test_ids_of_texts(seen: Seen, model: Model) -> None:
    rng = random.Random(0)
    kinds = ((1, 128), (32, 127), (128, 0x3000), (0x3000, 0xD800), (0x10000, 0x1FB00), (32, 33))
    texts = ["<|endoftext|> x", "I'LL it's\r\n\t x", "e\u0301\u00a0\u2028\u3000\ufb01", *PROMPTS]
    texts += [
        "".join(chr(rng.randrange(*rng.choice(kinds))) for _ in range(rng.randrange(1, 40)))
        for _ in range(1000)
    ]
    program = 'async (t) => t.map((await import("/source.js")).encode)'
    assert seen.page.evaluate(program, texts) == [model.prompt_ids(t) for t in texts]


@pytest.mark.parametrize("view", VIEWS)
def test_a_race_in_the_browser(browser: Any, address: str, model: Model, view: str) -> None:
    seen = Seen(browser, address, view)
    page = seen.page
    page.set_default_timeout(300_000)
    page.context.set_offline(True)  # all is there
    assert page.locator("#live").is_hidden()
    page.check("#race")
    seen.write(prompt="Once upon a time", temperature="0.8")
    how: dict[str, Any] = {"max_tokens": 30, "temperature": 0.8}
    for article, depth in enumerate((18, 24)):
        alone = model.generate("Once upon a time", exit_layer=depth, **how)
        assert seen.text(article) == "Once upon a time" + alone.text
    page.locator(".t").nth(3).click()
    assert "of 24 blocks" in page.locator("#about").inner_text()
    assert page.locator("#about tr").count() == 5
    if folder := os.environ.get("BITSKIP_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/site-{view}.png", full_page=True)
    assert seen.said == [] and seen.hosts == {urlsplit(address).netloc}


def test_a_stop_and_what_is_wrong(seen: Seen) -> None:
    page = seen.page
    page.fill("#prompt", "Tom")
    page.click("#go")
    page.wait_for_selector(".t")
    page.keyboard.press("Escape")
    page.wait_for_selector("#go:not([disabled])")
    assert "stopped" in page.locator(".figures").first.inner_text()
    page.fill("#prompt", "a " * 3000)
    page.click("#go")
    page.wait_for_selector("#problem:not([hidden])")
    assert "exceed the context of 512" in page.locator("#problem").inner_text()
