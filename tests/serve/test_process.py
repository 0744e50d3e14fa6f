"""The server as a process of its own: clients that go, signals, curl, the openai client."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import bitskip_cpu
from bitskip_cpu.model import Model
from tests.cli.conftest import write_model

ROOT = Path(__file__).parents[2]
SERVING = (ROOT / "docs/SERVING.md").read_text("utf-8")
LONG = {"prompt": "Once upon a time", "max_tokens": 400, "temperature": 1.0, "stream": True}


def start(*words: Any) -> tuple[subprocess.Popen[str], str]:
    """A server on a free port, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bitskip", "serve", *map(str, words), "--port", "0"],
        stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"(http://127\.0\.0\.1:\d+)/", line):
            return process, found[1]
    raise AssertionError("".join(lines))


def end(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> str:
    """Stop it; what it said."""
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return errors


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return bitskip_cpu.load(write_model(tmp_path_factory.mktemp("process") / "random"), threads=1)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    process, found = start("stories-24", "--threads", 1, "--api-key", "key")
    try:
        yield found
        assert end(process) == "stopped\n"
    finally:
        process.kill()


def asking(address: str) -> httpx.Client:
    """A client with the key."""
    headers = {"Authorization": "Bearer key"}
    return httpx.Client(base_url=address, headers=headers, timeout=60, trust_env=False)


def figure(client: httpx.Client, name: str) -> float:
    """A number of /metrics."""
    found = re.search(rf"^bitskip_{name} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def test_many_clients_get_what_each_would_alone(address: str) -> None:
    model = bitskip_cpu.load(_stories(), threads=1, usual_cache="int8")
    asked = [
        {"prompt": p, "max_tokens": 10 + i, "seed": i, "temperature": i % 2 * 0.8,
         "exit_layer": (12, 18, 24, "max", "gate")[i % 5]}
        for i, p in enumerate(["Once upon a time", "Tom and Lily"] * 5)
    ]  # fmt: skip
    with asking(address) as client, ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda body: client.post("/v1/completions", json=body), asked))
    for body, answer in zip(asked, found, strict=True):
        prompt, *_ = body.values()
        how = {k: v for k, v in body.items() if k != "prompt"}
        assert answer.json()["choices"][0]["text"] == model.generate(str(prompt), **how).text


def _stories() -> Path:
    from bitskip_cpu import models

    return models.path("stories-24")


def test_the_openai_client(address: str) -> None:
    from openai import AuthenticationError, BadRequestError, OpenAI

    model = bitskip_cpu.load(_stories(), threads=1, usual_cache="int8")
    with httpx.Client(trust_env=False) as inner:
        client = OpenAI(base_url=f"{address}/v1", api_key="key", max_retries=0, http_client=inner)
        assert client.models.list().data[0].id == "stories-24"
        said = client.completions.create(
            model="stories-24@12", prompt="Once upon a time", max_tokens=8, logprobs=2
        )
        alone = model.generate("Once upon a time", max_tokens=8, exit_layer=12)
        assert said.choices[0].text == alone.text and said.usage is not None
        assert said.usage.completion_tokens == 8
        stream = client.chat.completions.create(
            model="stories-24", messages=[{"role": "user", "content": "Once upon a time"}],
            max_tokens=8, stream=True, stream_options={"include_usage": True}, seed=1,
            extra_body={"exit_layer": 18},
        )  # fmt: skip
        told = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in told if c.choices)
        assert text == model.generate("Once upon a time", max_tokens=8, exit_layer=18).text
        assert told[-1].usage is not None and told[-1].usage.total_tokens == 12
        with pytest.raises(BadRequestError, match="temperature"):
            client.completions.create(model="stories-24", prompt="a", temperature=-3)
        wrong = OpenAI(base_url=address, api_key="no", max_retries=0, http_client=inner)
        with pytest.raises(AuthenticationError):
            wrong.models.list()


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_curl(address: str) -> None:
    """The command of docs/SERVING.md, with a key."""
    [written] = re.findall(r"^curl localhost:8080(/\S+) -d '(.*)'$", SERVING, re.MULTILINE)
    path, body = written
    done = subprocess.run(
        ["curl", "-s", "-H", "Authorization: Bearer key", f"{address}{path}", "-d", body],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    model = bitskip_cpu.load(_stories(), threads=1, usual_cache="int8")
    how = json.loads(body)
    alone = model.generate(how.pop("prompt"), **how)
    assert json.loads(done.stdout)["choices"][0]["text"] == alone.text


def test_no_step_for_a_client_that_has_gone(address: str) -> None:
    with asking(address) as client:
        for body in (LONG, {**LONG, "stream": False}):
            before = figure(client, "generated_tokens_total")
            host, port = address.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as raw:
                content = json.dumps({**body, "n": 8, "seed": 3}).encode()
                raw.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer key\r\n"
                    b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
                )
                while client.get("/health").json()["running"] == 0:
                    pass
            until = time.monotonic() + 30
            while client.get("/health").json() != {"status": "ok", "running": 0, "waiting": 0}:
                assert time.monotonic() < until
            after = figure(client, "generated_tokens_total") - before
            assert after < 8 * 400
        ended = client.get("/metrics").text
        assert re.search(r'texts_ended_total\{reason="interrupted"\} \d+', ended)


def test_what_is_no_http(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    for content in (b"\x16\x03\x01\x00\xff" * 20, b"GET  HTTP/1.1\r\n\r\n",
                    b"GET / HTTP/1.1\r\nX: " + b"a" * (1 << 17)):  # fmt: skip
        with socket.create_connection((host, int(port)), timeout=30) as raw:
            raw.sendall(content)
            assert raw.recv(100).startswith(b"HTTP/1.1 400"), content[:20]
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Le")  # and the rest never comes
        with asking(address) as client:
            assert client.get("/health").is_success


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_texts_with_a_reason(model: Model, number: int) -> None:
    process, address = start(model.folder.path, "--grace", 0, "--queue", 200)
    try:
        body = {"prompt": [[5, 6]] * 40, "n": 3, "max_tokens": 120, "stream": True}
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body))
        answer = connection.getresponse()
        answer.read(10)
        errors = end(process, number)
        text = answer.read().decode()
        assert errors.endswith("stopped\n") and "Traceback" not in errors
        assert text.endswith("data: [DONE]\n\n") and '"stop_reason": "interrupted"' in text
    finally:
        process.kill()


def test_a_port_in_use_is_one_line(address: str) -> None:
    port = address.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "bitskip", "serve", "--port", port],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ},
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: cannot listen on 127.0.0.1, port {port}: ")


@pytest.mark.parametrize("module", ["starlette", "uvicorn"])
def test_a_missing_extra_says_what_to_install(module: str) -> None:
    program = (
        f"import sys; sys.modules[{module!r}] = None; from bitskip.program import main; "
        "main(['serve'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    wanted = f'error: {module} is not installed: pip install "bitskip[serve]"\n'
    assert (done.returncode, done.stderr) == (1, wanted)
