"""Two servers behind nginx, as docs/SERVING.md has it, and two of Ray's actors."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import bitskip_cpu
from bitskip_cpu.many.ray_actor import Generate
from bitskip_cpu.model import Model
from tests.serve.test_process import ROOT, end, figure, start

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> Model:
    return bitskip_cpu.load("stories-24", threads=1, usual_cache="int8")  # as `serve` does


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[tuple[str, list[tuple[subprocess.Popen[str], str]]]]:
    """nginx's address, and (process, address) of the two servers behind it."""
    servers = [start("stories-24", "--threads", 1, "--alias", "stories") for _ in range(2)]
    written = (ROOT / "docs/SERVING.md").read_text("utf-8")
    found = re.search(r"```nginx\n(.*?)```", written, re.DOTALL)
    assert found, "no configuration of nginx in docs/SERVING.md"
    config, port = found[1], free_port()
    for here, (_, there) in zip(("8081", "8082"), servers, strict=True):
        config = config.replace(f"127.0.0.1:{here}", there.removeprefix("http://"))
    config = config.replace("127.0.0.1:8080", f"127.0.0.1:{port}")
    places = " ".join(
        f"{kind}_temp_path {tmp_path}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/errors;\n"
        f"events {{}}\nhttp {{ access_log off; {places}\n{config} }}\n"
    )
    assert NGINX is not None
    nginx = subprocess.Popen([NGINX, "-c", tmp_path / "nginx.conf", "-p", tmp_path])
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 30
        while not answers(address):
            assert time.monotonic() < until and nginx.poll() is None
            time.sleep(0.05)
        yield address, servers
    finally:
        nginx.terminate()
        nginx.wait(30)
        for process, _ in servers:
            process.kill()


def answers(address: str) -> bool:
    """Whether a server is there."""
    try:
        return httpx.get(f"{address}/health", trust_env=False).is_success
    except httpx.TransportError:
        return False


def asking(address: str) -> httpx.Client:
    return httpx.Client(base_url=address, timeout=300, trust_env=False)


REQUESTS: list[dict[str, Any]] = [
    {"prompt": prompt, "max_tokens": 30, "exit_layer": depth, "temperature": t, "seed": 3}
    for prompt in ("Once upon a time", "Tom had a red", "The dog")
    for depth in (12, 18, "max") for t in (0, 0.9)
]  # fmt: skip


@pytest.mark.skipif(NGINX is None, reason="no nginx on this machine")
def test_replicas_say_the_same(replicas: Any, model: Model) -> None:
    """Through nginx, from each alone, and after one was killed: the text of generate."""
    address, servers = replicas
    wanted = [model.generate(**request).text for request in REQUESTS]

    def text(client: httpx.Client, request: dict[str, Any]) -> str:
        answer = client.post("/v1/completions", json=request)
        assert answer.status_code == 200, answer.text
        said: str = answer.json()["choices"][0]["text"]
        return said

    with asking(address) as client, ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda r: text(client, r), REQUESTS)) == wanted
        for _, alone in servers:
            with asking(alone) as direct:
                assert figure(direct, "generated_tokens_total") > 0, "one was never asked"
                assert [text(direct, r) for r in REQUESTS[:4]] == wanted[:4]

        # Streams on both; one replica dies in their middle.
        long = {"prompt": "Once upon a time", "max_tokens": 450, "stream": True,
                "logit_bias": {str(i): -100 for i in model.folder.end_ids}}  # fmt: skip
        whole = model.generate(
            **{k: v for k, v in long.items() if k not in ("stream", "logit_bias")},
            logit_bias=tuple((i, -100.0) for i in model.folder.end_ids),
        ).text
        streams = [pool.submit(stream, address, long) for _ in range(4)]
        with asking(servers[0][1]) as first, asking(servers[1][1]) as second:
            until = time.monotonic() + 60
            while not all(c.get("/health").json()["running"] for c in (first, second)):
                assert time.monotonic() < until, "both should have streams"
        servers[0][0].kill()
        servers[0][0].wait(30)
        assert [text(client, r) for r in REQUESTS] == wanted  # none is lost or other
        ends = [s.result() for s in streams]
        assert {whole} == {said for said, done in ends if done}, "the other's streams went on"
        assert all(whole.startswith(said) for said, _ in ends)
        assert not all(done for _, done in ends), "the killed one's streams broke off"
    end(servers[1][0])


def stream(address: str, request: dict[str, Any]) -> tuple[str, bool]:
    """(text, whether it came to its end)."""
    said = ""
    try:
        with (
            asking(address) as client,
            client.stream("POST", "/v1/completions", json=request) as answer,
        ):
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    return said, True
                if line.startswith("data: "):
                    said += json.loads(line[6:])["choices"][0]["text"]
    except httpx.TransportError:
        pass
    return said, False


class Noting(Generate):
    """Says who ran a row, too."""

    def __call__(self, batch: Any) -> dict[str, Any]:
        made = super().__call__(batch)
        return {**made, "pid": [os.getpid()] * len(made["text"])}


def test_two_actors_of_ray(tmp_path: Path) -> None:
    """From a file to files, as docs/SERVING.md has it."""
    model = bitskip_cpu.load("stories-24", threads=1)
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    prompts = [f"{words} {i}" for i in range(8) for words in ("Once upon a time", "Tom", "The dog")]
    source, out = tmp_path / "prompts.jsonl", tmp_path / "answers"
    source.write_text(
        "".join(json.dumps({"prompt": p, "n": i}) + "\n" for i, p in enumerate(prompts))
    )
    options = {"max_tokens": 12, "exit_layer": 18, "temperature": 0.8, "seed": 5}
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    # Cores: two for the actors, one to read and write. Ray's workers are nice (15): too nice where
    # other work goes on.
    ray.init(
        num_cpus=3,
        include_dashboard=False,
        runtime_env=environment,
        log_to_driver=False,
        _system_config={"worker_niceness": 0},
    )
    try:
        given = {"model": "stories-24", "threads": 1, "parallel": 4, **options}
        made = ray.data.read_json(str(source), override_num_blocks=8).map_batches(
            Noting, fn_constructor_kwargs=given, batch_size=3, num_cpus=1, concurrency=2
        )
        made.write_json(str(out))
    finally:
        ray.shutdown()
    rows = [json.loads(s) for p in out.glob("*.json") for s in p.read_text().splitlines()]
    assert [row["prompt"] for row in sorted(rows, key=lambda row: row["n"])] == prompts
    for row in rows:
        alone = model.generate(row["prompt"], **options)
        assert (row["text"], row["stop_reason"]) == (alone.text, alone.stop_reason)
        assert (row["token_ids"], row["exit_layers"]) == (alone.token_ids, alone.exit_layers)
    assert len({row["pid"] for row in rows}) == 2
