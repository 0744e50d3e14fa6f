"""lm-eval on our models: tasks made by hand, without a network, against the plain loop."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import bitskip_cpu
from bitskip.program import main
from bitskip_cpu.heldout.continuations import log_likelihoods
from bitskip_cpu.model import Model
from bitskip_ref.folder import ChatForm
from bitskip_ref.heldout import token_losses
from bitskip_ref.rule import ExitRule
from tests.cli.conftest import write_model

pytest.importorskip("lm_eval")
RULES = [(None, None), (2, None), ("max", 0.02), ("gate", 0.4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Random, four blocks, with gates."""
    root = tmp_path_factory.mktemp("eval")
    form = ChatForm("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                    "{% if add_generation_prompt %}A:{% endif %}")  # fmt: skip
    write_model(root / "m", chat=form)
    return bitskip_cpu.load(root / "m", 1)


def alone(model: Model, context: list[int], said: list[int], rule: ExitRule) -> tuple[float, bool]:
    """One pair by the plain loop: `extend`, then a step for each token."""
    cache, depth = model.new_cache(), rule.deepest(model.config)
    z = [model.extend(context, cache, exit_layer=depth, last_only=True)[0]]
    z += [model.step(token, cache, rule)[0] for token in said[:-1]]
    losses = token_losses(np.stack(z), np.array(said))
    return -math.fsum(losses), [int(row.argmax()) for row in z] == said


def pairs(model: Model, count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Contexts that often begin as others do; some are said greedily."""
    rng = random.Random(seed)
    heads = [[rng.randrange(1, 300) for _ in range(n)] for n in (1, 16, 20, 33)]
    found = []
    for _ in range(count):
        context = rng.choice(heads) + [rng.randrange(1, 300) for _ in range(rng.choice((0, 1, 9)))]
        said = [rng.randrange(1, 300) for _ in range(rng.choice((1, 2, 5, 12)))]
        if rng.random() < 0.3:
            said = [int(model.logits(context)[-1].argmax())]
        found.append((context, said))
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda r: str(r[0]))
def test_likelihoods_are_those_of_each_alone(rule: Any, model: Model) -> None:
    chosen = model.exit_rule(*rule)
    asked = pairs(model, 40, 3)
    found = log_likelihoods(model.engine, asked, chosen)
    assert found == [alone(model, *pair, chosen) for pair in asked]
    assert rule[0] is not None or any(greedy for _, greedy in found)
    # Little memory: fewer side by side, some contexts run again, the same figures.
    size = 5 * 16 * 4 * 2 * model.config.num_hidden_layers * model.config.attention_size * 4
    assert log_likelihoods(model.engine, asked, chosen, memory=size) == found


# ---- the adapter ----------------------------------------------------------------------


def asked(kind: str, *arguments: Any) -> Any:
    """A request as lm-eval makes it."""
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


def adapted(model: Model, **options: Any) -> Any:
    """The model as lm-eval has it."""
    from bitskip_eval.adapter import BitskipLM

    return BitskipLM(model, **options)


def test_continuations_are_cut_from_the_whole(model: Model) -> None:
    lm, rule = adapted(model, exit_layer=2), model.exit_rule(2)
    most = model.config.max_position_embeddings
    texts = [("the cat", " sat"), ("", "Once"), ("a space ", "the"), ("é", "xy" * most)]
    found = lm.loglikelihood([asked("loglikelihood", *pair) for pair in texts])
    for (context, said), answer in zip(texts, found, strict=True):
        whole, start = model.tokenizer.encode(context + said), 0
        if context:
            start = len(model.tokenizer.encode(context.rstrip()))
        else:
            whole, start = [0, *whole], 1
        cut = max(0, len(whole) - most - 1)
        whole, start = whole[cut:], max(1, start - cut)
        assert answer == alone(model, whole[:start], whole[start:], rule)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: str(r[0]))
def test_rolling_predicts_every_token_once(rule: Any, model: Model) -> None:
    lm = adapted(model, exit_layer=rule[0], exit_threshold=rule[1], max_length=16)
    text = "Once upon a time there was a little cat. " * 3
    ids = [0, *model.tokenizer.encode(text)]
    chosen, sums = model.exit_rule(*rule), []
    for at in range(0, len(ids) - 1, 16):
        sums.append(alone(model, ids[at : at + 1], ids[at + 1 : at + 17], chosen)[0])
    found = lm.loglikelihood_rolling([asked("loglikelihood_rolling", text)] * 2)
    assert found == [pytest.approx(math.fsum(sums), rel=1e-12)] * 2


def test_texts_are_those_of_generate(model: Model) -> None:
    lm = adapted(model, exit_layer=3, batch_size=4)
    cat = asked("generate_until", "the cat", {"until": ["\n", ""], "max_gen_toks": 9})
    drawn = {"until": "t", "do_sample": True, "temperature": 2.0, "top_k": 50, "seed": 7}
    requests = [
        cat, asked("generate_until", "Once upon", {**drawn, "max_gen_toks": 30}), cat,
        asked("generate_until", "the cat sat " * 400, {"until": [], "max_gen_toks": 20}),
        asked("generate_until", "", {"until": [], "max_new_tokens": 3}),
    ]  # fmt: skip
    found = lm.generate_until(requests)
    same = {"exit_layer": 3}
    assert found[0] == found[2] == model.generate("the cat", max_tokens=9, stop=["\n"], **same).text
    drawn = {"temperature": 2.0, "top_k": 50, "seed": 7, "max_tokens": 30, "stop": ["t"]}
    assert found[1] == model.generate("Once upon", **drawn, **same).text
    last = model.tokenizer.encode("the cat sat " * 400)[20 - lm.max_length :]
    tokens = [int(model.extend(last, cache := model.new_cache(), exit_layer=3)[-1].argmax())]
    while len(tokens) < 20:
        tokens.append(int(model.step(tokens[-1], cache, model.exit_rule(3))[0].argmax()))
    assert found[3] == model.tokenizer.decode(tokens[: (*tokens, 0).index(0)])
    with pytest.raises(ValueError, match="unknown generation option 'topk'"):
        lm.generate_until([asked("generate_until", "the", {"until": [], "topk": 3})])


def test_templates_write_special_tokens(model: Model) -> None:
    lm = adapted(model)
    spelled = "<|endoftext|>"
    assert len(lm.tok_encode(spelled)) > 1
    said = [{"role": "user", "content": "hi"}]
    assert lm.apply_chat_template(said) == "user: hi\nA:"
    assert lm.apply_chat_template(said, add_generation_prompt=False) == "user: hi\n"
    assert lm.tok_encode(spelled) == [0]


# ---- the verb -------------------------------------------------------------------------

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{root}/cats.jsonl"}}, cache_dir: "{root}/cache"}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{target}"
{more}
"""
CHOICE = 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]'
UNTIL = """generation_kwargs: {until: ["."], max_gen_toks: 5}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""
DOCS = [
    {"question": "the cat", "choices": [" sat", " was", "x"], "label": 0},
    {"question": "Once upon", "choices": [" a", " the"], "label": 1},
    {"question": "there was", "choices": [" a", " z", " cat"], "label": 2},
]  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tasks on a file."""
    root = tmp_path_factory.mktemp("tasks")
    (root / "cats.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, kind, target, more in (
        ("cats-choose", "multiple_choice", "{{label}}", CHOICE),
        ("cats-say", "generate_until", " a", UNTIL),
        ("cats-roll", "loglikelihood_rolling", "{{question}}",
         "metric_list: [{metric: bits_per_byte}]"),
    ):  # fmt: skip
        (root / f"{name}.yaml").write_text(
            TASK.format(name=name, kind=kind, target=target, more=more, root=root)
        )
    return root


def verb(model: Model, tasks: Path, *words: str) -> Result:
    """`bitskip eval` in this process."""
    result = CliRunner().invoke(
        main, ["eval", str(model.folder.path), "--include-path", str(tasks), "-t", "1", *words]
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_task_made_by_hand(model: Model, tasks: Path) -> None:
    names = "cats-choose,cats-say,cats-roll"
    result = verb(model, tasks, "--tasks", names, "--exit-layer", "2,max", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["exits"]
    assert [at["exit_layer"] for at in found] == [2, "max"]
    encode, rule = model.tokenizer.encode, model.exit_rule(2)
    right, nats = 0, []
    for doc in DOCS:
        question, whole = encode(doc["question"]), [0, *encode(doc["question"])]
        scores = [
            alone(model, question, encode(doc["question"] + " " + choice)[len(question) :], rule)[0]
            for choice in doc["choices"]
        ]  # fmt: skip
        right += int(np.argmax(scores)) == doc["label"]
        nats.append(alone(model, whole[:1], whole[1:], rule)[0])
    results = found[0]["results"]
    assert results["cats-choose"]["acc,none"] == pytest.approx(right / len(DOCS))
    size = sum(len(doc["question"]) for doc in DOCS)
    bits = -sum(nats) / math.log(2) / size
    assert results["cats-roll"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-12)
    assert "exact_match,none" in results["cats-say"]
    table = verb(model, tasks, "--tasks", "cats-choose").stdout.splitlines()
    assert table[0].startswith("| task") and "cats-choose" in table[2] and "acc" in table[2]


def test_an_unknown_task_is_one_line(
    model: Model, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitskip_eval import run

    few = functools.partial(run.TaskManager, include_defaults=False)
    monkeypatch.setattr(
        run, "TaskManager", lambda include_path, **_: few(include_path=include_path)
    )
    result = verb(model, tasks, "--tasks", "cats-chose")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: unknown task 'cats-chose'")
    assert "cats-choose" in result.stderr


def test_without_lm_eval_it_says_what_to_install(
    model: Model, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # type: ignore[arg-type]
    result = verb(model, tasks, "--tasks", "cats-choose")
    assert result.stderr == 'error: lm_eval is not installed: pip install "bitskip[eval]"\n'


@pytest.mark.slow  # lm-eval reads thousands of tasks first
def test_lm_eval_itself_knows_the_model(model: Model, tasks: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bitskip_eval", "run", "--model", "bitskip", "--model_args",
         f"path={model.folder.path},exit_layer=2,threads=1", "--tasks", "cats-choose",
         "--include_path", str(tasks)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|cats-choose|" in done.stdout


@pytest.mark.slow  # as above
def test_local_completions_of_lm_eval(model: Model, tasks: Path, tmp_path: Path) -> None:
    """lm-eval's own client of a server, as docs/SERVING.md has it: the engine's choices."""
    pytest.importorskip("aiohttp")
    pytest.importorskip("uvicorn")
    from tests.serve.test_process import end, start

    assert model.folder.tokenizer is not None
    shutil.copy(model.folder.tokenizer, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    process, address = start(model.folder.path, "--threads", 1, "--kv-cache", "float32")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions",
             "--model_args", f"base_url={address}/v1/completions,model=m@2,tokenizer={tmp_path}",
             "--tasks", "cats-choose,cats-say", "--include_path", str(tasks),
             "--output_path", str(tmp_path / "found.json")],
            capture_output=True, text=True, timeout=300,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        end(process)
    finally:
        process.kill()
    [path] = tmp_path.glob("found*.json")
    results = json.loads(path.read_text())["results"]
    direct = json.loads(verb(model, tasks, "--tasks", "cats-choose,cats-say", "--exit-layer", "2",
                             "--json").stdout)["exits"][0]["results"]  # fmt: skip
    for task, name in (("cats-choose", "acc,none"), ("cats-say", "exact_match,none")):
        assert results[task][name] == direct[task][name]
