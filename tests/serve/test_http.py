"""The server, in this process: what requests get, and what those that are wrong are told."""

from __future__ import annotations

import asyncio
import json
import math
import random
import socket
import threading
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import bitskip_cpu
from bitskip_cpu.many.scheduler import Scheduler
from bitskip_cpu.model import Model
from bitskip_ref.folder import ChatForm
from bitskip_ref.heldout import log_probabilities
from bitskip_serve import http_server
from bitskip_serve.answers import Answer
from bitskip_serve.app import Limits, Service
from tests.cli.conftest import CONFIG, write_model

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return bitskip_cpu.load(write_model(tmp_path_factory.mktemp("http") / "random"), threads=1)


def client_of(model: Model, **options: Any) -> TestClient:
    """A client of a service of its own."""
    queue = options.pop("queue", 64)
    scheduler = Scheduler(model, parallel=4, queue=queue, memory=1 << 26)
    service = Service(model, scheduler, name="random", **options)
    return TestClient(service.app(), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(model: Model) -> Iterator[TestClient]:
    with client_of(model, limits=Limits(body=1 << 16)) as found:
        yield found


def chunks(answer: Any) -> list[dict[str, Any]]:
    """The objects of a stream, which ends as it must."""
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines[:-1]]


def refused(answer: Any, status: int, param: str | None, *said: str) -> None:
    """An error as OpenAI's."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (status, param), error
    for words in said:
        assert words in error["message"], error


# ---- texts ------------------------------------------------------------------------------


def test_a_completion_is_what_generate_says(client: TestClient, model: Model) -> None:
    how: dict[str, Any] = {"max_tokens": 9, "temperature": 0.9, "seed": 5, "exit_layer": 2}
    alone = model.generate("the cat", **how)
    for route in ("/v1/completions", "/completions"):
        answer = client.post(route, json={"prompt": "the cat", **how}).json()
        assert answer["object"] == "text_completion" and answer["model"] == "random"
        [choice] = answer["choices"]
        assert choice["text"] == alone.text and choice["finish_reason"] == "length"
        usage = answer["usage"]
        assert usage["completion_tokens"] == len(alone.token_ids)
        assert usage["completion_tokens_details"] == {"mean_exit_layer": 2.0}
    body = {"prompt": "the cat", **how, "stream": True, "details": True}
    told = chunks(client.post("/v1/completions", json=body))
    assert "".join(c["choices"][0]["text"] for c in told) == alone.text
    details = [c["bitskip"] for c in told if "bitskip" in c]
    assert [d["token_id"] for d in details] == alone.token_ids
    assert all(d["exit_layer"] == 2 and len(d["top"]) == 5 and d["batch"] == 1 for d in details)
    assert all(0 < p <= 1 for d in details for _, p in d["top"])
    assert len({c["id"] for c in told}) == 1
    assert told[-1]["choices"][0]["finish_reason"] == "length"


def test_an_answer_is_written_beside_the_event_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many texts with alternatives it takes seconds, which streams would wait for."""
    whole, loops = Answer.whole, list[object]()

    def noted(self: Answer) -> dict[str, Any]:
        loops.append(asyncio._get_running_loop())
        return whole(self)

    monkeypatch.setattr(Answer, "whole", noted)
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).is_success
    assert loops == [None]


def test_several_prompts_and_texts(client: TestClient, model: Model) -> None:
    ids = [5, 6, 7]
    body = {"prompt": ["the cat", "sat"], "n": 2, "max_tokens": 6, "temperature": 1.0, "seed": 8}
    found = client.post("/v1/completions", json=body).json()["choices"]
    wanted = [
        model.generate(p, max_tokens=6, temperature=1.0, seed=seed).text
        for p in ("the cat", "sat") for seed in (8, 9)
    ]  # fmt: skip
    assert [c["text"] for c in found] == wanted and [c["index"] for c in found] == [0, 1, 2, 3]
    echoed = client.post("/v1/completions", json={"prompt": ids, "echo": True, "max_tokens": 0})
    assert echoed.json()["choices"][0]["text"] == model.tokenizer.decode(ids)
    two = client.post("/v1/completions", json={"prompt": [ids, [9]], "max_tokens": 1}).json()
    assert len(two["choices"]) == 2 and two["usage"]["prompt_tokens"] == 4


def test_log_probabilities_of_an_echoed_prompt(client: TestClient, model: Model) -> None:
    """As lm-eval's local-completions asks for them."""
    ids = [5, 6, 7, 8, 9]
    body = {"prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    [choice] = client.post("/v1/completions", json=body).json()["choices"]
    found = choice["logprobs"]
    p = log_probabilities(model.logits(ids))
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    values = [float(p[i, t]) for i, t in enumerate(ids[1:])]
    assert found["token_logprobs"][1:5] == values  # equal, not close
    best = [max(top.values()) for top in found["top_logprobs"][1:5]]
    assert best == [float(row.max()) for row in p[:4]]
    assert len(found["tokens"]) == 6 and "".join(found["tokens"]) == choice["text"]
    assert found["text_offset"] == [sum(map(len, found["tokens"][:i])) for i in range(6)]


def test_log_probabilities_where_drafts_are_looked_up(client: TestClient) -> None:
    body = {"prompt": "the cat sat", "max_tokens": 5, "logprobs": 2}
    plain, looked_up = (
        client.post("/v1/completions", json={**body, **how}).json()["choices"]
        for how in ({}, {"speculate": "lookup"})
    )
    assert looked_up == plain and len(plain[0]["logprobs"]["tokens"]) == 5


def test_an_echo_that_ends_at_once_has_the_end_as_its_last(model: Model) -> None:
    """lm-eval takes token_logprobs[n:-1]: without it the prompt's last token would be lost."""
    ids, end = [5, 6, 7], model.folder.end_ids[0]
    body = {"prompt": ids, "max_tokens": 1, "logprobs": 1, "echo": True,
            "logit_bias": {str(end): 100}}  # fmt: skip
    with client_of(model) as client:
        [choice] = client.post("/v1/completions", json=body).json()["choices"]
    assert choice["finish_reason"] == "stop" and choice["text"] == model.tokenizer.decode(ids)
    p = log_probabilities(model.logits(ids))
    wanted = [float(p[0, 6]), float(p[1, 7]), float(p[2, end])]
    assert choice["logprobs"]["token_logprobs"] == [None, *wanted]


def test_a_chat_without_a_template_is_plain_text(client: TestClient, model: Model) -> None:
    messages = [
        {"role": "system", "content": "the cat"},
        {"role": "user", "content": [{"type": "text", "text": "sat"}]},
    ]
    body = {"messages": messages, "max_completion_tokens": 4}
    answer = client.post("/v1/chat/completions", json=body).json()
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant" and answer["object"] == "chat.completion"
    assert choice["message"]["content"] == model.generate("the cat\nsat", max_tokens=4).text


def test_a_chat_by_the_template_computes_its_own_tokens(tmp_path: Path) -> None:
    shape = CONFIG.replace(max_position_embeddings=1024)
    folder = write_model(tmp_path / "talker", shape, chat=ChatForm(TEMPLATE))
    model = bitskip_cpu.load(folder, threads=1)
    messages: list[dict[str, str]] = []
    before, ran = list[int](), 0
    with client_of(model) as client:
        for turn in range(20):
            messages.append({"role": "user", "content": f"{turn}?"})
            body = {"messages": messages, "max_tokens": 2, "stream": True,
                    "stream_options": {"include_usage": True}, "logprobs": True,
                    "top_logprobs": 2}  # fmt: skip
            told = chunks(client.post("/v1/chat/completions", json=body))
            assert told[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            assert told[-1]["choices"] == []
            said = [c["choices"][0] for c in told[1:-2]]
            for choice in said:
                if choice["logprobs"] is None:  # what was held back at the end
                    continue
                [token] = choice["logprobs"]["content"]
                assert token["logprob"] <= 0 and len(token["top_logprobs"]) == 2
            usage = told[-1]["usage"]
            held = usage["prompt_tokens_details"]["cached_tokens"]
            fresh = usage["prompt_tokens"] - held
            ran += fresh
            text = "".join(c["delta"]["content"] for c in said)
            prompt = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"
            alone = model.generate(prompt, max_tokens=2, special=True)
            assert text == alone.text
            ids = model.tokenizer.encode(prompt, special=True)
            same = sum(takewhile(bool, (a == b for a, b in zip(before, ids[:-1], strict=False))))
            assert fresh < len(ids) - same + 16, (turn, fresh)  # a page may be run again
            before = [*ids, *alone.token_ids[:-1]]
            messages.append({"role": "assistant", "content": text})
        figures = client.get("/metrics").text
    assert f"bitskip_prompt_tokens_total {ran}\n" in figures


# ---- facts ------------------------------------------------------------------------------


def test_facts(client: TestClient, model: Model) -> None:
    blocks = model.config.num_hidden_layers
    props = client.get("/props").json()
    assert props["blocks"] == blocks == len(props["colours"]) and props["model"] == "random"
    assert props["exits"][-1] == blocks
    health = {"status": "ok", "running": 0, "waiting": 0}
    assert client.get("/health").json() == client.get("/v1/health").json() == health
    names = [m["id"] for m in client.get("/v1/models").json()["data"]]
    assert {"random", f"random@{blocks}", "random@gate"} <= set(names)
    assert client.get("/v1/models/random@1").json()["id"] == "random@1"
    refused(client.get("/v1/models/other"), 404, "model", "there is random")
    one = client.post("/v1/completions", json={"prompt": "a", "model": "random@1", "max_tokens": 3,
                                               "details": True}).json()  # fmt: skip
    assert [d["exit_layer"] for d in one["choices"][0]["bitskip"]] == [1, 1, 1]
    ids = client.post("/tokenize", json={"content": "the cat"}).json()["tokens"]
    assert ids == model.tokenizer.encode("the cat")
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"content": "the cat"}
    text = client.get("/metrics").text
    assert 'bitskip_exit_layer_tokens_total{exit_layer="1"}' in text
    for line in text.splitlines():
        assert line.startswith("# ") or math.isfinite(float(line.rsplit(" ", 1)[1])), line


def test_health_of_a_server_that_has_failed(model: Model) -> None:
    scheduler = Scheduler(model)
    with TestClient(Service(model, scheduler, name="random").app()) as client:
        scheduler.failed = True
        refused(client.get("/health"), 503, None, "start it anew")


def test_the_page(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'self';")
    assert page.content == client.get("/index.html").content
    for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript")):
        assert client.get(f"/{name}").headers["content-type"].startswith(kind)
    for path in ("/page/index.html", "/../app.py", "/%2e%2e/app.py", "/app.py", "/page.js/"):
        refused(client.get(path, follow_redirects=False), 404, None)


# ---- refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "prompt", "missing"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "string"),
        ({"prompt": [3, "a"]}, "prompt", "ids"),
        ({"prompt": [320]}, "prompt", "ids of 0..319"),
        ({"prompt": [True]}, "prompt", "ids"),
        ({"prompt": "a" * 4000}, "prompt", "the context holds"),
        ({"max_token": 3}, "max_token", "did you mean max_tokens?"),
        ({"max_tokens": -1}, "max_tokens", "-1"),
        ({"temperature": "hot"}, "temperature", "hot"),
        ({"exit_layer": 99}, "exit_layer", "99"),
        ({"exit_layer": "deep"}, "exit_layer", "deep"),
        ({"exit_layer": "auto"}, "exit_layer", "calibrated"),
        ({"exit_threshold": 0.5, "exit_layer": 2}, "exit_layer", "threshold"),
        ({"n": 0}, "n", "1..128"),
        ({"stream": 1}, "stream", "true or false"),
        ({"stop": ["", "a"]}, "stop", "empty"),
        ({"stop": ["a"] * 65}, "stop", "at most 64"),
        ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias", "at most 1024"),
        ({"seed": -1}, "seed", "-1"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "id"),
        ({"logit_bias": {"3": 200}}, "logit_bias", "100"),
        ({"tools": [{"type": "function"}]}, "tools", "does not have it"),
        ({"model": "gpt"}, "model", "there is random"),
        ({"logprobs": 99}, "logprobs", "0..20"),
        ({"speculate": 2, "logprobs": 1}, "logprobs", "speculated"),
        ({"speculate": 2, "draft_exit": 1, "temperature": -1}, "temperature", "-1"),
        ({"speculate": 2, "draft_exit": 99}, "speculate", "draft exit 99"),
        ({"draft_exit": 1}, "draft_exit", "needs speculate"),
        ({"stream_options": {}, "timeout": 0}, "timeout", "seconds"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo", "not streamed"),
    ],
)
def test_a_wrong_field_is_named(
    client: TestClient, body: dict[str, Any], param: str, said: str
) -> None:
    given = body if param == "prompt" else {"prompt": "a", **body}
    status = 404 if param == "model" else 400
    refused(client.post("/v1/completions", json=given), status, param, said)


def test_bodies_that_are_none(client: TestClient) -> None:
    for content in (b"", b"{", b"[1]", b'"a"', b"\xff\xfe", b'{"prompt": NaN}', b"[" * 60000,
                    b'{"prompt": "\\ud800"}', b'{"n": ' + b"9" * 6000 + b"}"):  # fmt: skip
        refused(client.post("/v1/completions", content=content), 400, None, "body")
    large = client.post("/v1/completions", content=b"x" * (10 << 20))
    refused(large, 413, None, "65536 bytes")
    parts = client.post("/v1/completions", content=(b"x" * 1000 for _ in range(100)))
    refused(parts, 413, None, "65536 bytes")
    refused(client.get("/v1/completions"), 405, None)


def test_keys_and_origins(model: Model) -> None:
    with client_of(model, keys=("right", "other"), origins=("https://ours",)) as client:
        assert client.get("/health").status_code == client.get("/").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"},
                        {"x-api-key": ""}, {"Authorization": b"Bearer righ\xe9"}):  # fmt: skip
            answer = client.get("/props", headers=headers)  # type: ignore[arg-type]
            refused(answer, 401, None, "API key")
        for headers in ({"Authorization": "Bearer right"}, {"x-api-key": "other"}):
            assert client.get("/props", headers=headers).status_code == 200
        refused(client.get("/health", headers={"Origin": "https://evil"}), 403, None)
        answer = client.options("/props", headers={"Origin": "https://ours"})
        assert answer.headers["access-control-allow-origin"] == "https://ours"
        assert client.get("/health", headers={"Origin": "http://testserver"}).status_code == 200


def test_who_brings_no_request_is_let_go(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "PATIENCE", 0.2)
    service = Service(model, Scheduler(model), name="random", limits=Limits(patience=0.2))
    ready = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        place = listening.getsockname()
        running = http_server.server(service, 1, ready.set)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        assert ready.wait(60)
        try:
            post = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
            for start, told in (
                (b"", b""), (b"GET /hea", b""), (post, b""),
                (post + b"Content-Length: 9\r\n\r\n{", b"HTTP/1.1 408"),
            ):  # fmt: skip
                with socket.create_connection(place, timeout=60) as slow:
                    slow.sendall(start)
                    assert slow.recv(12) == told
            with socket.create_connection(place, timeout=60) as slow:  # after a good one, too
                slow.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
                assert slow.recv(4096).startswith(b"HTTP/1.1 200")
                slow.sendall(b"GET /health HT")
                while slow.recv(4096):
                    pass
        finally:
            running.should_exit = True
            thread.join(60)
    assert not thread.is_alive()


def test_a_full_queue_is_said(model: Model) -> None:
    with client_of(model, queue=1) as client:
        answer = client.post("/v1/completions", json={"prompt": "a", "n": 9, "max_tokens": 1})
        refused(answer, 503, None, "try again")
        assert answer.headers["retry-after"] == "1"


def test_a_mistake_of_ours_is_an_error_and_the_next_is_served(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fuzzer below can fail."""
    monkeypatch.setattr("bitskip_serve.app.Answer", None)
    refused(client.post("/v1/completions", json={"prompt": "a"}), 500, None, "TypeError")
    monkeypatch.undo()
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).is_success


# ---- anything ---------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3.5, 1e308, -0.0, 10**30, 1 << 64, "", "a", "18", "gate",
    "auto", "max", "\x00", "\ud7ff\U0010ffff", "x" * 3000, [], [0], [1, "a"], [[5, 6]], ["a", "b"],
    [None], [[]], {}, {"a": 1}, {"5": 1}, {"5": None}, {"include_usage": 1}, [{}],
    [{"role": "user"}], [{"role": "user", "content": "a"}], [[[[[[]]]]]],
    [{"role": "user", "content": [{"type": "text"}]}], {"type": "text"}, [1.0], ["", ""], [0, 1, 2],
)  # fmt: skip
ROUTES = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


def anything(client: TestClient, count: int, seed: int) -> None:
    """Bodies with wrong types in every field, and damaged ones: never a 500."""
    from bitskip_serve.reading import CHAT, COMPLETION

    rng = random.Random(seed)
    fields = sorted(COMPLETION | CHAT | {"content", "tokens"})
    for number in range(count):
        body = {"prompt": "a", "max_tokens": 2}
        route = rng.choice(ROUTES)
        if route == ROUTES[1]:
            body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}  # type: ignore[dict-item]
        for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
            body[rng.choice(fields)] = rng.choice(VALUES)
        if body.get("max_tokens", 200) not in range(3):
            body["timeout"] = 0.2
        content = bytearray(json.dumps(body).encode())
        if rng.random() < 0.2:
            for _ in range(rng.randint(1, 4)):
                content[rng.randrange(len(content))] = rng.randrange(256)
        answer = client.post(route, content=bytes(content))
        assert answer.status_code in (200, 400, 404, 413), (number, bytes(content), answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"], answer.text


def test_anything_is_answered(client: TestClient) -> None:
    anything(client, 300, 1)
    assert client.get("/health").json()["running"] == 0


@pytest.mark.slow
def test_ten_thousand_of_anything(client: TestClient) -> None:
    anything(client, 10_000, 2)
    assert client.get("/health").json()["running"] == 0
