"""Questions to a real server: `transformers serve` on loopback, with a tiny model that was taught one answer."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from test_generate import generate, with_inputs

from hnlm_ref import llm, profiles
from hnlm_ref.artifacts import load_json, load_jsonl
from hnlm_ref.prompts import NEGATIVE_KEY

ANSWER = json.dumps({NEGATIVE_KEY: "Lamp"})
CHAT = "{{ messages[-1]['content'][-20:] }}"  # so little context that a tiny model can learn to answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model that has learnt to say ANSWER after 20 bytes of anything, so that there is something to parse."""
    model, tokenizer = llm.tiny_model()
    tokenizer.chat_template = CHAT
    answer = torch.tensor(llm.encode(tokenizer, [ANSWER])[0] + [tokenizer.eos_token_id])
    optimiser, rng = torch.optim.Adam(model.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.cat([torch.randint(2, 258, (8, 20), generator=rng), answer.expand(8, -1)], dim=1)
        model(ids, labels=torch.where(torch.arange(ids.shape[1]) < 20, -100, ids)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    path = tmp_path_factory.mktemp("served") / "model"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def endpoint(folder):
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = (folder.parent / "log").open("w+")
    serve = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    process = subprocess.Popen([*serve, *words], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert process.poll() is None, (folder.parent / "log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()
        log.close()


def test_a_server_says_what_the_same_model_says_here(folder, endpoint, toy_run, tmp_path):
    run = with_inputs(toy_run, tmp_path)
    words = ("--mode", "text", "--pairs-per-user", 1, "--max-new-tokens", 40)
    generate(run, *words, "--endpoint", endpoint, "--endpoint-model", folder)
    rows = load_jsonl(run / "generate" / "texts.jsonl")
    assert load_json(run / "generate" / "manifest.json")["counts"]["statuses"] == {"ok": 60}
    assert {row["text"] for row in rows} == {"Lamp"} and {row["raw"] for row in rows} == {ANSWER}
    model, tokenizer = llm.load_llm(str(folder), "cpu")
    questions = ["Short", "\u00e9" * 40, "A longer one, of which the end is read"]
    cfg = profiles.AskConfig(endpoint=endpoint, endpoint_model=str(folder), max_new_tokens=40)
    here = dict(profiles.ask_local(model, tokenizer, cfg, questions))
    assert dict(profiles.ask_server(cfg, questions)) == here
