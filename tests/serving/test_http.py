"""A server of edits over HTTP, as ``lrqp serve`` starts it, with several clients at once."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import lrqp_torch as lrqp
from lrqp_torch.ioi import IOIDataset
from lrqp_torch.models import load
from lrqp_torch.serving.requests import Library

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: see make test-serving", allow_module_level=True)

from engines_for_tests import BLOCK, reference

CLOSE = 2e-4
CLIENTS = 6
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def organism() -> tuple[Any, Any]:
    return load("organism")


@pytest.fixture(scope="module")
def folder(organism: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = organism
    root = tmp_path_factory.mktemp("edits")
    data = IOIDataset.generate(tokenizer, n=400, seed=0)
    sites = ["L2.mid", "L3.pre"]
    states = lrqp.capture(model, data.inputs, sites, positions=data.positions["S2"], batch_size=100)
    for name, site in zip(("order", "later"), sites, strict=True):
        edit = lrqp.LRQP.fit(states[site], data.labels["abb"])
        edit.provenance = lrqp.Provenance.of(
            model, site, model="organism", classes=("BABA", "ABBA")
        )
        edit.save(root / name)
    return root


@pytest.fixture(scope="module")
def edits(folder: Path) -> Library:
    return Library.load(folder)


@pytest.fixture(scope="module")
def prompts(organism: tuple[Any, Any]) -> list[tuple[list[int], int]]:
    """Prompts as tokens, and where in each the repeated name is."""
    data = IOIDataset.generate(organism[1], n=24, seed=1, prefixes="bundled")
    kept = data.inputs["attention_mask"].bool()
    rows = zip(data.inputs["input_ids"], kept, strict=True)
    ids = [row[mask].tolist() for row, mask in rows]
    return list(zip(ids, data.positions["S2"].tolist(), strict=True))


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server on a free port, gone afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = tmp_path_factory.mktemp("server")
    (place / "template.jinja").write_text(TEMPLATE)
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    options = [
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "160",
        "--block-size", str(BLOCK), "--max-num-seqs", "8", "--max-num-batched-tokens", "64",
        "--num-gpu-blocks-override", "200", "--chat-template", str(place / "template.jinja"),
    ]  # fmt: skip
    with (place / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "lrqp_torch", "serve", "--model", "organism",
             "--edits", str(folder), "--port", str(port), "--", *options],
            env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            _await(server, f"{url}/health", place / "log")
            yield url
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


def _await(server: subprocess.Popen[Any], url: str, log: Path) -> None:
    until = time.monotonic() + 400
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server did not start: {log.read_text()[-4000:]}")


def post(address: str, path: str = "completions", **body: Any) -> tuple[int, Any]:
    """Status and answer of a request, as curl would send it."""
    settings = {"model": "organism", "temperature": 0.0, "max_tokens": 1} | body
    request = urllib.request.Request(
        f"{address}/v1/{path}",
        json.dumps(settings).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read().decode()
            return answer.status, text if settings.get("stream") else json.loads(text)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def asking(asked: Any) -> dict[str, Any]:
    text = asked if isinstance(asked, str) else json.dumps(asked)
    return {} if asked is None else {"vllm_xargs": {"lrqp": text}}


def chunks(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def check(choice: Any, ids: list[int], asked: Any, organism: Any, edits: Library) -> None:
    """A choice of one token is what transformers says, and its certificate what ``edit.at`` says.

    The tokens are those of ``return_tokens_as_token_ids``.
    """
    said, tokens, runs = reference(organism[0], ids, asked, edits)
    found = choice["logprobs"]["top_logprobs"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{tokens[0]}"]
    for name, value in found.items():
        assert abs(value - float(said[0, int(name.removeprefix("token_id:"))])) < CLOSE
    records = choice.get("lrqp", [])
    assert len(records) == len(runs)
    for record, run in zip(records, runs, strict=True):
        reached = torch.tensor(record["log_odds_after"], dtype=torch.float64)
        torch.testing.assert_close(reached, run.log_odds_after.flatten(), atol=1e-2, rtol=1e-3)
        assert all(map(float.__ge__, record["log_odds_after"], record["log_odds_asked"]))
        assert set(record["status"]) <= {"SOLVED", "SATISFIED"}


PLAIN = {"logprobs": 5, "return_tokens_as_token_ids": True}


def test_clients_at_once_are_answered_as_by_transformers_each_by_its_own_edits(
    address: str, organism: Any, edits: Library, prompts: Any
) -> None:
    asked: list[Any] = []
    for number, (_, s2) in enumerate(prompts):
        order = {"edit": "order", "positions": [s2], "target": number // 2 % 2}
        later = {"edit": "later", "positions": [s2], "target": number // 2 % 2}
        asked.append((None, order, None, later, None, [order, later])[number % 6])

    def ask(number: int) -> Any:
        return post(address, prompt=prompts[number][0], **PLAIN, **asking(asked[number]))

    for _ in range(2):  # the second time from the cache
        with ThreadPoolExecutor(CLIENTS) as clients:
            answers = list(clients.map(ask, range(len(prompts))))
        for (status, answer), (ids, _), one in zip(answers, prompts, asked, strict=True):
            assert status == 200, answer
            check(answer["choices"][0], ids, one, organism, edits)
            assert answer["kv_transfer_params"] is None


def test_every_form_of_a_completion_has_the_certificate_of_each_choice(
    address: str, prompts: Any
) -> None:
    (first, s2), (second, other) = prompts[:2]
    both = sorted({s2, other})
    asked = {"edit": "order", "positions": both, "target": 1}
    given: dict[str, Any] = {"prompt": [first, second], "max_tokens": 3} | asking(asked)
    # No seed: vLLM's sampler on the CPU dies of one where a prompt is read in chunks.
    status, answer = post(
        address, n=2, temperature=1.0, echo=True, logprobs=2, prompt_logprobs=1, **given
    )
    assert status == 200, answer
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["lrqp"][0]["positions"] for choice in answer["choices"]] == [both] * 4
    odds = [choice["lrqp"][0]["log_odds_before"] for choice in answer["choices"]]
    assert odds[0] == odds[1] != odds[2] == odds[3]
    _, plain = post(address, **given)
    status, text = post(address, stream=True, stream_options={"include_usage": True}, **given)
    assert status == 200, text
    parts = chunks(text)
    for choice in plain["choices"]:
        mine = [c for p in parts for c in p["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [part["lrqp"] for part in mine if "lrqp" in part] == [choice["lrqp"]]
        assert mine[-1]["finish_reason"] == "length" and "lrqp" in mine[-1]
    assert parts[-1]["usage"]["completion_tokens"] == 6
    status, echoed = post(address, **(given | {"max_tokens": 0}), echo=True)
    assert [c["lrqp"] for c in echoed["choices"]] == [c["lrqp"] for c in plain["choices"]]
    kept = 20  # positions count what the model reads
    cut = asking({"edit": "order", "positions": [-1, kept - 1], "target": 1})
    status, answer = post(address, prompt=first, truncate_prompt_tokens=kept, **cut)
    assert status == 400 and f"position {kept - 1} is given twice" in answer["error"]["message"]


def test_a_scope_edits_what_is_generated(
    address: str, organism: Any, edits: Library, prompts: Any
) -> None:
    ids, _ = prompts[2]
    asked = {"edit": "order", "scope": "generated", "target": 0}
    status, answer = post(
        address, prompt=ids, max_tokens=8, return_token_ids=True, ignore_eos=True, **asking(asked)
    )
    assert status == 200, answer
    (choice,) = answer["choices"]
    _, tokens, (run,) = reference(organism[0], ids, asked, edits, tokens=8)
    assert choice["token_ids"] == tokens
    assert choice["lrqp"][0]["positions"] == list(range(len(ids), len(ids) + 7))
    assert len(run.log_odds_after.flatten()) == 7


def test_chats_are_edited_too_by_openais_own_client(
    address: str, organism: Any, prompts: Any
) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    text = organism[1].decode(prompts[3][0])
    asked = asking({"edit": "order", "positions": -1, "target": "ABBA"})
    settings: dict[str, Any] = {"model": "organism", "temperature": 0.0, "extra_body": asked}
    completion = client.completions.create(prompt=text, max_tokens=2, **settings)
    (record,) = completion.choices[0].lrqp  # type: ignore[attr-defined]
    assert record["edit"] == "order" and record["log_odds_after"][0] >= record["log_odds_asked"][0]
    messages: Any = [{"role": "user", "content": text}]
    several = client.chat.completions.create(
        messages=messages, max_tokens=2, n=2, **(settings | {"temperature": 1.0})
    )
    assert [len(choice.lrqp) for choice in several.choices] == [1, 1]  # type: ignore[attr-defined]
    chat = client.chat.completions.create(messages=messages, max_tokens=2, **settings)
    stream = client.chat.completions.create(
        messages=messages, max_tokens=2, stream=True, **settings
    )
    parts = [chunk.choices[0] for chunk in stream if chunk.choices]
    assert [hasattr(part, "lrqp") for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].lrqp == chat.choices[0].lrqp  # type: ignore[attr-defined]
    assert "".join(p.delta.content or "" for p in parts) == chat.choices[0].message.content
    bare = client.chat.completions.create(
        messages=messages, max_tokens=2, **(settings | {"extra_body": {}})
    )
    assert not hasattr(bare.choices[0], "lrqp")


GOOD = {"edit": "order", "positions": [3], "target": 0}
WRONG: list[tuple[dict[str, Any], str]] = [
    (asking("{"), "not valid JSON"),
    (asking("[]"), "empty list"),
    (asking(GOOD | {"edit": "ordre"}), "no edit 'ordre'; this server has 'later', 'order'"),
    (asking(GOOD | {"target": 2}), "the probe has classes 0 to 1, 'BABA', 'ABBA'"),
    (asking(GOOD | {"positions": [3, 500]}), "position 500 is out of reach"),
    (asking(GOOD | {"scope": "all"}), "one of them alone"),
    (asking(GOOD | {"pos": 1}), "unknown 'pos'"),
    (asking([GOOD, GOOD | {"target": 1}]), r"both edit token 3 at L2.mid"),
    (asking("x" * 100_000), "…"),
    ({"vllm_xargs": {"lrqp": 3}}, "an edit is an object"),
    ({"vllm_xargs": {"lrqp": GOOD}}, "vllm_xargs"),
    ({"vllm_xargs": {"lrqp_settled": "[]"}}, "is no argument of a request"),
    ({"lrqp": GOOD}, "vllm_xargs"),
    ({"extra_args": {"lrqp": json.dumps(GOOD)}}, "vllm_xargs"),
    (asking(GOOD) | {"use_beam_search": True, "n": 2}, "beam search"),
]


@pytest.mark.parametrize(("body", "said"), WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_what_is_wrong_is_a_400_in_its_words(
    address: str, prompts: Any, organism: Any, body: dict[str, Any], said: str,
    stream: bool, path: str,
) -> None:  # fmt: skip
    text = organism[1].decode(prompts[0][0])
    prompt = {"prompt": text} if path == "completions" else {
        "messages": [{"role": "user", "content": text}]
    }  # fmt: skip
    if stream and not body.get("use_beam_search"):
        body = body | {"stream": True}
    status, answer = post(address, path, **prompt, **body)
    # In a stream the engine is asked after the status was sent.
    error = chunks(answer)[0]["error"] if status == 200 else answer["error"]
    assert error["code"] == 400 and said in error["message"], answer
    assert len(error["message"]) < 3000
    assert urllib.request.urlopen(f"{address}/health", timeout=30).status == 200


def test_a_promise_that_was_not_kept_is_an_error(address: str, prompts: Any, organism: Any) -> None:
    ids, _ = prompts[0]
    asked = asking({"edit": "order", "positions": [3, len(ids) + 9], "target": 0})
    given: dict[str, Any] = {"prompt": ids, "max_tokens": 12, "ignore_eos": True} | asked
    status, answer = post(address, **given)
    assert status == 200 and answer["choices"][0]["lrqp"][0]["positions"] == [3, len(ids) + 9]
    _, edited = post(address, **given, return_token_ids=True)
    early = edited["choices"][0]["token_ids"][2]
    word = organism[1].decode([early])
    for stream, stop in (
        (False, {"stop_token_ids": [early]}),
        (True, {"stop": word}),
        (False, {"stop": word}),
    ):
        status, answer = post(address, **given, **stop, stream=stream)
        error = chunks(answer)[-1]["error"] if stream else answer["error"]
        assert error["code"] == 422, answer
        assert f"'order' never fired at position {len(ids) + 9}" in error["message"]


def test_a_client_that_goes_away_leaves_the_server_right(
    address: str, organism: Any, edits: Library, prompts: Any
) -> None:
    ids, s2 = prompts[4]
    asked = {"edit": "order", "positions": [s2], "target": 1}
    body = {"model": "organism", "prompt": ids, "max_tokens": 90, "stream": True,
            "ignore_eos": True} | asking(asked)  # fmt: skip
    for _ in range(CLIENTS):
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.readline().startswith(b"data: {")
    for one in (asked, None, asked | {"target": 0}):
        status, answer = post(address, prompt=ids, **PLAIN, **asking(one))
        assert status == 200, answer
        check(answer["choices"][0], ids, one, organism, edits)
