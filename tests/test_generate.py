"""Stage 3: same vectors however they are computed, nothing lost, nothing made up."""

import json
import shutil
import signal
import threading
import time
from dataclasses import asdict
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import readme_code
from test_sft import hashes, run_stage
from test_sft import start as start_stage

from hnlm_ref import llm, profiles, prompts
from hnlm_ref.artifacts import Run, digest, load_json, load_jsonl, load_npy, save_json
from hnlm_ref.cli import load_stage
from hnlm_ref.console import UserError
from hnlm_ref.knobs import load_preset
from hnlm_ref.negatives import choose_pairs

generate, start = partial(run_stage, "generate"), partial(start_stage, "generate")


def with_inputs(toy_run, folder):
    for stage in ("prep", "sft"):
        shutil.copytree(toy_run / stage, folder / stage, ignore=shutil.ignore_patterns("test.*"))  # not opened: C13
    return folder


@pytest.fixture(scope="module")
def made(toy_run, tmp_path_factory):
    run = with_inputs(toy_run, tmp_path_factory.mktemp("generate"))
    generate(run, "--rows-per-shard", 7)
    return run


def test_every_training_pair_has_a_vector_of_its_own_and_matches_that_the_user_has_not_taken(made):
    folder = made / "generate"
    pairs, h, matches = (load_npy(folder / f"{name}.npy") for name in ("pairs", "embeddings", "matches"))
    train = np.stack([np.repeat(np.arange(60), np.diff(load_npy(made / "prep" / "train.indptr.npy"))),
                      load_npy(made / "prep" / "train.indices.npy")], axis=1)  # fmt: skip
    assert pairs.tolist() == train.tolist() and pairs.dtype == np.int32
    assert h.dtype == np.float16 and np.isfinite(h).all() and len(np.unique(h, axis=0)) == len(h)
    taken = set(map(tuple, train.tolist()))
    assert not any((u, j) in taken for (u, _), row in zip(pairs.tolist(), matches.tolist(), strict=True) for j in row)
    assert not list(folder.glob("shard*"))


def test_only_the_first_of_several_processes_has_the_vectors(tmp_path):
    stage = load_stage("generate")
    in_shards, rows = stage.main_function.__globals__["in_shards"], [([1], [[2], [3]]), ([1, 2], [[3]])]
    encode = lambda some: np.concatenate([np.full((len(parts), 4), len(prefix)) for prefix, parts in some])  # noqa: E731
    for leads in (False, True):
        one = SimpleNamespace(num_processes=1, process_index=0, is_main_process=leads, wait_for_everyone=lambda: None)
        run, pairs = Run(tmp_path, out=tmp_path), np.zeros((3, 2), int)
        h, _ = in_shards(rows, pairs, stage.config(batch_size=1, rows_per_shard=1), run, one, encode)
        assert h.tolist() == ([4 * [1], 4 * [1], 4 * [2]] if leads else [])
        assert len(list(tmp_path.glob("shard*"))) == (2 if leads else 0)


def test_a_vector_with_a_number_that_is_not_finite_is_told_by_its_pair(tmp_path):
    stage, pairs = load_stage("generate"), np.array([[4, 5], [8, 6], [8, 9]])
    in_shards, rows = stage.main_function.__globals__["in_shards"], [([1], [[2]]), ([1], [[2], [3]])]
    one = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True)
    encode = lambda some: np.array([[0, np.inf if part == [3] else 0] for _, parts in some for part in parts])  # noqa: E731
    with pytest.raises(UserError, match="user 8 and item 9 is not finite"):
        in_shards(rows, pairs, stage.config(rows_per_shard=1), Run(tmp_path, out=tmp_path), one, encode)


def test_matches_are_the_nearest_by_cosine_to_the_head_of_the_stored_vector(made):
    folder, sft = made / "generate", made / "sft"
    own = llm.load_file(sft / "projections.safetensors")
    h = load_npy(folder / "embeddings.npy").astype(np.float64)
    h = (h - own["head.center"].numpy()) / own["head.spread"].numpy()
    z = h @ own["head.linear.weight"].numpy().T + own["head.linear.bias"].numpy()
    items = load_npy(sft / "targets.npy").astype(np.float64)
    cosine = (z / np.linalg.norm(z, axis=1, keepdims=True)) @ (items / np.linalg.norm(items, axis=1, keepdims=True)).T
    matches, scores = load_npy(folder / "matches.npy"), load_npy(folder / "match_scores.npy")
    pairs = load_npy(folder / "pairs.npy")
    n_taken = sum(item in pairs[pairs[:, 0] == u, 1] for u, item in zip(pairs[:, 0], cosine.argmax(1), strict=True))
    counts = load_json(folder / "manifest.json")["counts"]
    assert counts["pairs whose nearest item was taken"] == n_taken > 0 == counts["users who took every item"]  # B15
    assert 0 in matches[:, 0] and counts["pairs without match"] == 0
    for u in np.unique(pairs[:, 0]):
        mine = pairs[:, 0] == u
        cosine[np.ix_(mine, pairs[mine, 1])] = -np.inf
    np.testing.assert_allclose(np.take_along_axis(cosine, matches.astype(np.int64), 1), scores, atol=1e-5)
    np.testing.assert_allclose(-np.sort(-cosine, axis=1)[:, : matches.shape[1]], scores, atol=1e-5)


def test_sampled_negatives_are_told_beside_the_generated_ones(made):
    """Shares of the catalogue that a uniform draw beats have the mean 1/2, the highest of four draws' 4/5."""
    table = load_json(made / "generate" / "quality.json")
    assert list(table) == ["uniform", "dns (M = 4)", "nearest item", "nearest 20 items"]
    uniform, dns, *_ = (figures["warm_up_percentile"] for figures in table.values())
    assert (uniform, dns) == (pytest.approx(1 / 2, abs=0.03), pytest.approx(4 / 5, abs=0.03))
    matches = load_npy(made / "generate" / "matches.npy")
    used = [len(np.unique(some)) / 80 for some in (matches[:, 0], matches)]
    assert [figures["coverage"] for figures in list(table.values())[2:]] == pytest.approx(used, abs=1e-5)


def test_zero_shot_vectors_are_means_of_the_untuned_model_s_states_and_match_the_nearest_texts(toy_run, tmp_path):
    """The slow way: a forward pass for each pair, nothing packed; the mean leaves the user's part out."""
    run = with_inputs(toy_run, tmp_path)
    generate(run, "--no-tuned", "--pairs-per-user", 2, "--seed", 1)
    pairs, h, matches, scores = (
        load_npy(run / "generate" / f"{name}.npy") for name in ("pairs", "embeddings", "matches", "match_scores")
    )
    prep, (model, tokenizer) = Run(run).prep(), llm.tiny_model()
    assert np.array_equal(pairs, choose_pairs(prep.train, 2, seed=1))
    for (u, i), vector in zip(pairs.tolist(), h, strict=True):
        user, item, end = (
            tokenizer(text, add_special_tokens=False).input_ids
            for text in (
                prompts.QUERY_USER.replace("{profile}", prep.users[u]["profile"]),
                prompts.QUERY_ITEM.replace("{item}", prompts.item_words(prep.items[i])),
                prompts.QUERY_END,
            )
        )
        user = [tokenizer.bos_token_id, *user][:160]  # the preset's limits, the item's with two soft tokens and EOS
        item = [*item[: 64 - len(end) - 3], *end, tokenizer.eos_token_id]
        with torch.no_grad():
            states = model.model(torch.tensor([user + item])).last_hidden_state[0]
        np.testing.assert_allclose(vector, states[len(user) :].mean(0), atol=1e-3, rtol=1e-3)  # float16 on disk
    z, items = h.astype(np.float64), load_npy(run / "sft" / "item_text.npy").astype(np.float64)
    z -= z.mean(0)
    cosine = (z / np.linalg.norm(z, axis=1, keepdims=True)) @ (items / np.linalg.norm(items, axis=1, keepdims=True)).T
    for row, u in zip(cosine, pairs[:, 0], strict=True):
        row[prep.train.row(u)] = -np.inf
    np.testing.assert_allclose(np.take_along_axis(cosine, matches.astype(np.int64), 1), scores, atol=1e-5)
    np.testing.assert_allclose(-np.sort(-cosine, axis=1)[:, : matches.shape[1]], scores, atol=1e-5)


def test_the_readme_s_transfer_differs_from_its_base_in_the_language_model_alone(tmp_path):
    path = tmp_path / "transfer.toml"
    path.write_text(readme_code('extends = "toys"', "toml"), encoding="utf-8")
    tables, base = load_preset(str(path)), load_preset("toys")

    def knobs(stage, tables, **words):
        return asdict(load_stage(stage).configure(tables, ("", words)))

    assert knobs("sft", tables) == knobs("sft", base) | {"init_from": "runs/cds/sft", "n_epochs": 0}
    hnlm, here = (knobs("train", tables, method=method) for method in ("hnlm", "here"))
    assert here == hnlm | {"method": "here", "generate_dir": "runs/toys/generate"}
    assert hnlm == knobs("train", base, method="hnlm")
    assert all(knobs(stage, tables) == knobs(stage, base) for stage in ("prep", "generate"))


def test_matches_lie_within_the_band_and_never_among_skipped_warm_up_ranks(toy_run, tmp_path):
    run = with_inputs(toy_run, tmp_path)
    generate(run, "--skip-ranks", 10, "--min-similarity", 0.35, "--max-similarity", 0.45, "--match", "title")  # no text
    matches, pairs, scores = (
        load_npy(run / "generate" / f"{name}.npy") for name in ("matches", "pairs", "match_scores")
    )
    without = (matches < 0).all(axis=1)
    within = (np.float32(0.35) <= scores) & (scores <= np.float32(0.45))
    assert np.array_equal(within, matches >= 0) and 0 < without.mean() < 0.5
    assert load_json(run / "generate" / "manifest.json")["counts"]["pairs without match"] == without.sum()
    cf_user, cf_item = (load_npy(run / "sft" / f"cf_{who}.npy") for who in ("user", "item"))
    for u in range(60):
        mine = pairs[:, 0] == u
        taken = pairs[mine, 1].tolist()  # all training pairs are asked about
        best = [j for j in np.argsort(-cf_item @ cf_user[u], kind="stable").tolist() if j not in taken][:10]
        assert not set(matches[mine].flatten().tolist()) & {*taken, *best}


def test_skipping_all_ranks_is_refused_before_the_model_is_loaded(toy_run, tmp_path, monkeypatch):
    monkeypatch.setattr(llm, "load_llm", None)
    run = with_inputs(toy_run, tmp_path)
    most = 80 - min(map(len, map(Run(run).prep().train.row, range(60))))  # items that a user has not taken
    with pytest.raises(UserError, match=f"skip_ranks {most} leaves nobody an item to match of 80"):
        generate(run, "--skip-ranks", most)
    with pytest.raises(UserError, match=r"min_similarity 0\.5 is above max_similarity 0\.4"):
        generate(run, "--min-similarity", 0.5, "--max-similarity", 0.4)
    with pytest.raises(UserError, match="'here' is no address"):
        generate(run, "--endpoint", "here")
    with pytest.raises(TypeError):  # it leaves somebody one, and the model is loaded
        generate(run, "--skip-ranks", most - 1)


def test_the_model_is_loaded_as_the_knobs_of_tuning_say(toy_run, tmp_path, monkeypatch):
    def load(*how):
        raise UserError(str(how))

    monkeypatch.setattr(llm, "load_llm", load)
    run = with_inputs(toy_run, tmp_path)
    with pytest.raises(UserError, match=r"\('m', 'cpu', 'bfloat16', 'eager', True\)"):
        run_stage("sft", run, "--model", "m", "--dtype", "bfloat16", "--attention", "eager", "--load-in-4bit")
    manifest = load_json(run / "sft" / "manifest.json")
    manifest["knobs"] |= {"attention": "eager", "load_in_4bit": True}
    save_json(run / "sft" / "manifest.json", manifest)
    with pytest.raises(UserError, match=r"\('tiny', 'cpu', 'float32', 'eager', True\)"):
        generate(run)


def test_negatives_of_a_model_tuned_on_text_vectors_are_matched(toy_run, tmp_path):
    shutil.copytree(toy_run / "prep", tmp_path / "prep")
    run_stage("sft", tmp_path, "--target", "text", "--n-epochs", 0, "--dtype", "bfloat16")
    assert load_json(tmp_path / "sft" / "manifest.json")["counts"]["dtype"] == "bfloat16"
    generate(tmp_path, "--pairs-per-user", 1)
    matches = load_npy(tmp_path / "generate" / "matches.npy")
    assert matches.shape == (60, 20) and (matches >= 0).all()


def test_a_killed_generation_reuses_its_shards_and_ends_in_the_same_bytes(made, toy_run, tmp_path):
    run = with_inputs(toy_run, tmp_path)
    process = start(run, "--rows-per-shard", 7)  # case D17
    partial_folder = run / ".generate.partial"
    while len(list(partial_folder.glob("shard*.npy"))) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = sorted(path.name for path in partial_folder.glob("shard*.npy"))
    assert 2 <= len(kept) < 9 and not (run / "generate").exists()
    marked = shutil.copytree(run, tmp_path / "marked")
    generate(run, "--rows-per-shard", 7)
    assert hashes(run / "generate") == hashes(made / "generate")
    first = marked / ".generate.partial" / kept[0]
    np.save(first, ones := np.ones_like(load_npy(first)))  # what is there is not made again
    generate(marked, "--rows-per-shard", 7)
    assert (load_npy(marked / "generate" / "embeddings.npy")[: len(ones)] == ones).all()


@pytest.mark.parametrize(
    "words", [("--pairs-per-row", 1), ("--batch-size", 1), ("--batch-size", 64, "--rows-per-shard", 9)]
)
def test_vectors_do_not_depend_on_sharing_batches_or_shards(made, toy_run, tmp_path, words):
    run = with_inputs(toy_run, tmp_path)
    generate(run, *words)
    one, other = (load_npy(r / "generate" / "embeddings.npy").astype(np.float32) for r in (made, run))
    np.testing.assert_allclose(one, other, atol=1e-3, rtol=1e-3)  # float16 on disk
    tokens, again = (load_json(r / "generate" / "manifest.json")["counts"]["tokens"] for r in (made, run))
    assert again > 2 * tokens if "--pairs-per-row" in words else again == tokens


def test_a_missing_adapter_ends_without_output(toy_run, tmp_path):
    run = with_inputs(toy_run, tmp_path)
    shutil.rmtree(run / "sft" / "adapter")
    with pytest.raises(UserError, match="no PEFT adapter of this model"):
        generate(run)  # case D08
    assert not (run / "generate").exists()


def test_a_vector_that_is_not_finite_stops_the_run_and_names_the_pair(toy_run, tmp_path):
    run = with_inputs(toy_run, tmp_path)
    file = run / "sft" / "cf_item.npy"
    table = load_npy(file)
    table[7] = np.nan
    np.save(file, table)
    with pytest.raises(UserError, match=r"user \d+ and item \d+ is not finite"):
        generate(run)  # case D12
    assert not (run / "generate").exists()


# ---- questions and answers ----------------------------------------------------------------------------------------


def said(title: str, key: str = prompts.NEGATIVE_KEY) -> str:
    return json.dumps({key: title})


KEPT = json.dumps([0, said("kept")]) + "\n"  # the first answer


def ask(path, questions, endpoint=None, titles=None, **knobs):
    """`profiles.ask` of a server, or of the tiny model."""
    cfg, about = profiles.AskConfig(endpoint=endpoint, **knobs), [{"user": n} for n in range(len(questions))]
    return profiles.ask(cfg, "tiny", llm.tiny_model, questions, about, path, prompts.NEGATIVE_KEY, titles)


def part_of(path, questions, endpoint):
    """The file of a server's answers so far."""
    return path.with_name(f"{path.name}.{digest([endpoint, 'default', 160, questions])}.part")


def test_a_failed_answer_stays_empty_and_is_asked_again_after_a_restart(tmp_path, monkeypatch):
    asked = []

    def answer(cfg, questions, done):
        for number, text in ((n, text) for n, text in enumerate(questions) if n not in done):
            asked.append(number)
            yield number, OSError("busy") if text == "u2" and asked.count(number) == 1 else said(text)

    monkeypatch.setattr(profiles, "ask_server", answer)
    path, server, three = tmp_path / "texts.jsonl", "http://here", ["u1", "u2", "u3"]
    replies = ask(path, ["u1", "u2"], server)
    assert [(r.status, r.text) for r in replies] == [("ok", "u1"), ("failed", None)]  # case D20
    assert replies[1].raw == "OSError: busy"
    # a killed run: an answer, and a half-written line
    part_of(path, three, server).write_text(KEPT + '[2, "{', encoding="utf-8")
    asked[:] = [1]
    replies = ask(path, three, server)
    assert asked[1:] == [1, 2]
    assert [(r.status, r.text) for r in replies] == [("ok", "kept"), ("ok", "u2"), ("ok", "u3")]
    assert [(row["user"], row["text"]) for row in load_jsonl(path)] == [(0, "kept"), (1, "u2"), (2, "u3")]
    # stopped later in the stage: nothing is asked again, unless somebody else is to be asked
    asked.clear()
    assert ask(path, three, server) == replies and asked == [] and len(load_jsonl(path)) == 3
    assert ask(path, three, server, endpoint_model="another") != replies and asked == [0, 1, 2]


def test_a_local_model_goes_on_with_the_batches_it_was_stopped_in(monkeypatch, tmp_path):
    """In bfloat16 an answer may depend on what shares its batch."""
    together = lambda _llm, _tokenizer, batch, _limit: [said(f"{len(ids)} of {len(batch)}") for ids in batch]  # noqa: E731
    monkeypatch.setattr(llm, "generate_texts", together)
    questions, local = ["x" * (n % 5) for n in range(10)], profiles.ask_local

    def stopped(*args):
        yield from islice(local(*args), 6)
        raise KeyboardInterrupt

    whole, again = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    ask(whole, questions, ask_batch_size=4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(profiles, "ask_local", stopped)
        ask(again, questions, ask_batch_size=4)
    assert all("of 5" in reply.text for reply in ask(again, questions, ask_batch_size=5))  # no answer of another batch
    ask(again, questions, ask_batch_size=4)
    assert whole.read_bytes() == again.read_bytes()


class Server(BaseHTTPRequestHandler):
    """Answers the n-th try of a question with what `plan` says: a status and the text back, or the body."""

    plan: dict = {}  # noqa: RUF012
    seen: list = []  # noqa: RUF012
    key = prompts.NEGATIVE_KEY
    retry_after = ""
    late = 0.0  # seconds before it answers

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        Server.seen.append((text, body["max_tokens"], self.path))
        Server.body = body
        steps = Server.plan.get(text, [])
        status = steps[min([t for t, *_ in Server.seen].count(text), len(steps)) - 1] if steps else 200
        body = json.dumps({"choices": [{"message": {"content": said(text, Server.key)}}]})
        length = 0
        if isinstance(status, str):
            body, status, length = status, 200, 99
        Server.key_sent, Server.kind = self.headers["Authorization"], self.headers["Content-Type"]
        self.send_response(status)
        self.send_header("Content-Length", str(max(len(body), length)))
        self.send_header("Location", "/elsewhere")
        if Server.retry_after:
            self.send_header("Retry-After", Server.retry_after)
        self.end_headers()
        time.sleep(Server.late)
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


def test_the_model_has_the_dtype_it_was_tuned_in(made, toy_run, tmp_path):
    """Tuned where "auto" is bfloat16, used on another machine."""
    run = with_inputs(toy_run, tmp_path)
    manifest = load_json(run / "sft" / "manifest.json")
    assert (manifest["knobs"]["dtype"], manifest["counts"]["dtype"]) == ("auto", "float32")
    manifest["counts"]["dtype"] = "bfloat16"
    save_json(run / "sft" / "manifest.json", manifest)
    generate(run)
    here, there = (load_npy(folder / "generate" / "embeddings.npy").astype(np.float64) for folder in (run, made))
    near = (here * there).sum(1) / np.linalg.norm(here, axis=1) / np.linalg.norm(there, axis=1)
    assert (here != there).mean() > 0.5 and near.min() > 0.99  # float32 rounded once would be off in the last bit alone


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(profiles, "BACK_OFF", 0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    Server.plan, Server.seen = {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}/v1"
        http.shutdown()


def test_a_server_is_asked_again_after_a_busy_answer_and_given_up_in_the_end(server, tmp_path):
    Server.plan = {"b": [503, 429, 408, 200], "c": [500]}
    replies = ask(tmp_path / "t.jsonl", ["a", "b", "c"], f"{server}/", ["A", "x", "x"], n_retries=3, max_new_tokens=9)
    assert [(r.status, r.text) for r in replies] == [("is_positive", None), ("ok", "b"), ("failed", None)]
    assert sorted(text for text, *_ in Server.seen) == ["a", *["b"] * 4, *["c"] * 4]
    assert {(limit, path) for _, limit, path in Server.seen} == {(9, "/v1/chat/completions")}
    assert Server.body.pop("messages")[0]["role"] == "user"
    assert Server.body == {"model": "default", "max_tokens": 9, "temperature": 0, "seed": 0}
    assert Server.key_sent is None and Server.kind == "application/json"  # there is no key


def test_each_wait_for_a_server_is_twice_the_last_and_ends_when_the_job_does(server, monkeypatch):
    waits = []

    class Stop:
        def wait(self, seconds):
            waits.append(seconds)
            return len(waits) == 3  # the job ends

        def set(self):
            pass

    monkeypatch.setattr(profiles, "threading", SimpleNamespace(Event=Stop))
    monkeypatch.setattr(profiles, "BACK_OFF", 0.5)
    Server.plan = {"a": [500]}
    list(profiles.ask_server(profiles.AskConfig(endpoint=server), ["a"]))
    assert waits == [0.5, 1, 2] and len(Server.seen) == 3
    for told, expected in (("7", [7, 7, 7]), ("Fri, 31 Dec 1999 23:59:59 GMT", [0.5, 1, 2])):  # how long it is busy
        monkeypatch.setattr(Server, "retry_after", told)
        waits.clear()
        list(profiles.ask_server(profiles.AskConfig(endpoint=server), ["a"]))
        assert waits == expected
    monkeypatch.setattr(Server, "retry_after", "inf")
    Server.plan, Server.seen = {"a": [500, "{"]}, []  # then half an answer, which says nothing of a wait
    waits.clear()
    list(profiles.ask_server(profiles.AskConfig(endpoint=server), ["a"]))
    assert waits == [3600, 1, 2]


def test_a_refused_request_and_a_server_that_is_down_are_one_sentence(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk\n")
    part = part_of(tmp_path / "t.jsonl", ["kept", "a"], server)
    part.write_text(KEPT, encoding="utf-8")  # the key is missing, or used up, for the rest alone
    for status in (401, 403, 302):  # 302: the key would go elsewhere
        Server.plan, Server.seen = {"a": [status]}, []
        with pytest.raises(UserError, match=f"^http.* refused the request: {status} "):
            ask(tmp_path / "t.jsonl", ["kept", "a"], server)
        assert Server.key_sent == "Bearer sk" and len(Server.seen) == 1
    assert part.read_text(encoding="utf-8") == KEPT
    with pytest.raises(UserError, match=r"were answered \(URLError: .*refused.*\); is the server up"):
        ask(tmp_path / "t.jsonl", ["a"], "http://127.0.0.1:9/v1", n_retries=1)
    assert not (tmp_path / "t.jsonl").exists()
    with pytest.raises(UserError, match=r"'127\.0\.0\.1:9/v1' is no address"):
        ask(tmp_path / "t.jsonl", ["a"], "127.0.0.1:9/v1")


def test_a_question_refused_for_its_own_sake_fails_alone_and_is_not_tried_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "as_completed", list)  # in their order
    Server.plan = {"long": [400], "large": [413], "odd": [422]}
    questions, path = ["a", "long", "large", "odd", *["long"] * 6, "b"], tmp_path / "t.jsonl"
    for before, n_asked, last in (("", 11, "b"), (KEPT.replace("0", "10", 1), 10, "kept")):
        part_of(path, questions, server).write_text(before, encoding="utf-8")
        Server.seen = []
        replies = ask(path, questions, server, concurrency=1)
        assert [r.text for r in replies] == ["a", *[None] * 9, last] and len(Server.seen) == n_asked
        assert {r.status for r in replies[1:10]} == {"failed"} and "request: 413 " in replies[2].raw
        assert '{"choices": ' in replies[2].raw  # what the server says
    questions = ["a", *["long"] * 9]
    part_of(path, questions, server).write_text(KEPT, encoding="utf-8")  # nothing but refusals for the rest
    replies = ask(path, questions, server, concurrency=1)
    assert [r.text for r in replies] == ["kept", *[None] * 9]
    Server.seen = []
    with pytest.raises(UserError, match=r"0 of 9 questions were answered \(UserError: http.* refused the request: 400"):
        ask(path, ["long"] * 9, server, concurrency=1)
    assert 2 <= len(Server.seen) < 9  # 2 * concurrency, and what was on its way


def test_a_server_that_dies_ends_the_job_which_goes_on_from_there(server, tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "as_completed", list)  # in their order
    questions, path = [f"q{n}" for n in range(9)], tmp_path / "t.jsonl"
    Server.plan = {question: [500] for question in questions[3:]}
    again = partial(ask, path, questions, server, concurrency=1, n_retries=0)
    with pytest.raises(UserError, match=r"3 of 9 questions were answered \(HTTPError: .*500.*start again"):
        again()
    assert not path.exists()
    Server.plan, Server.seen = {}, []
    assert [reply.text for reply in again()] == questions and len(Server.seen) == 6


def test_answers_outlive_a_change_of_other_knobs(server, toy_run, tmp_path):
    run = with_inputs(toy_run, tmp_path)
    words = ("--mode", "text", "--endpoint", server, "--pairs-per-user", 1)
    with pytest.raises(UserError, match="no negative matches any item"):
        generate(run, *words, "--min-similarity", 0.999999)
    assert len(Server.seen) == 60
    generate(run, *words, "--concurrency", 3, "--max-similarity", 0.99)
    assert len(Server.seen) == 60 and not list((run / "generate").glob("*.part"))


def test_a_broken_answer_is_a_failed_try_and_half_a_character_is_replaced(server, tmp_path):
    bodies = ['{"choices": null}'.ljust(99), "[]".ljust(99)]
    empty = '{"choices": []}'.ljust(99)
    silent, listed = (f'{{"choices": [{{"message": {{"content": {text}}}}}]}}'.ljust(99) for text in ("null", '["x"]'))
    Server.plan = {"a": [*bodies, "cut", 200], "b": [empty, "cut"], "silent": [silent], "listed": [listed]}
    replies = ask(tmp_path / "t.jsonl", ["a", "b", "silent", "listed", "\ud83d"], server, n_retries=3)
    found = [("ok", "a"), ("failed", None), ("bad", None), ("bad", None), ("ok", "\ufffd")]
    assert [(r.status, r.text) for r in replies] == found
    assert [r.raw for r in replies[2:4]] == ["", "['x']"]
    assert sorted(text for text, *_ in Server.seen).count("a") == 4


def test_a_server_that_never_answers_is_given_up_soon(server, tmp_path, monkeypatch):
    Server.plan = {"a": [500]}
    part = part_of(tmp_path / "t.jsonl", ["a"] * 99, server)
    part.write_text(KEPT, encoding="utf-8")
    with pytest.raises(UserError, match=r"0 of 98 questions were answered \(HTTPError: .*500.*\); is the server up\?"):
        ask(tmp_path / "t.jsonl", ["a"] * 99, server, concurrency=2, n_retries=0)
    assert len(Server.seen) < 98  # 2 * concurrency, and what was on its way
    assert part.read_text(encoding="utf-8") == KEPT
    monkeypatch.setattr(Server, "late", 0.5)
    with pytest.raises(UserError, match="TimeoutError: timed out"):
        ask(tmp_path / "t.jsonl", ["b"], server, timeout_s=0.1, n_retries=0)


def test_a_model_changed_since_tuning_is_refused(toy_run, tmp_path):
    run = with_inputs(toy_run, tmp_path)
    manifest = load_json(run / "sft" / "manifest.json")
    manifest["counts"]["model fingerprint"] = "0" * 16
    save_json(run / "sft" / "manifest.json", manifest)
    with pytest.raises(
        UserError,
        match=f"model tiny is no longer the one that was tuned; run again: hnlm-ref sft --preset toy --run-dir {run}$",
    ):
        generate(run)


def test_text_mode_keeps_only_pairs_with_an_answer_and_counts_the_rest(server, toy_run, tmp_path):
    run = with_inputs(toy_run, tmp_path)
    words = ("--mode", "text", "--endpoint", server, "--pairs-per-user", 1, "--match", "title")
    generate(run, *words)
    rows = load_jsonl(run / "generate" / "texts.jsonl")
    assert len(rows) == 60 and all(set(row) == {"user", "item", "status", "text", "raw"} for row in rows)
    counts = load_json(run / "generate" / "manifest.json")["counts"]
    assert counts["statuses"] == {"ok": 60} and counts["pairs"] == 60
    assert load_npy(run / "generate" / "embeddings.npy").shape == (60, 32)


@pytest.mark.parametrize("n_answers", [1, 2])
def test_a_title_of_the_catalogue_matches_its_item_however_few_the_answers(
    server, toy_run, tmp_path, monkeypatch, n_answers
):
    run = with_inputs(toy_run, tmp_path)
    prep = Run(run).prep()
    wanted, pairs = [], choose_pairs(prep.train, 1, 0)[: n_answers + 1]
    for u, _ in pairs[:-1]:
        wanted.append(next(j for j in range(len(wanted), 80) if j not in prep.train.row(u)))
    for (u, i), j in zip(pairs, [*wanted, pairs[-1, 1]], strict=True):  # the last is told the item taken itself
        reply = {"choices": [{"message": {"content": said(prep.items[j]["title"])}}]}
        Server.plan[prompts.negative_prompt(prep.users[u], prep.items[i])] = [json.dumps(reply).ljust(99)]
    monkeypatch.setattr(Server, "key", "another")  # no answer to the other questions
    words = ("--mode", "text", "--endpoint", server, "--pairs-per-user", 1)
    generate(run, *words)
    matches, h, scores = (load_npy(run / "generate" / f"{n}.npy") for n in ("matches", "embeddings", "match_scores"))
    assert matches[:, 0].tolist() == wanted
    statuses = load_json(run / "generate" / "manifest.json")["counts"]["statuses"]
    assert statuses == {"ok": n_answers, "is_positive": 1, "bad": 59 - n_answers}
    of_titles = llm.text_vectors(*llm.load_llm("tiny", "cpu"), [item["title"] for item in prep.items])[wanted]
    of_items = load_npy(run / "sft" / "item_text.npy")[wanted]
    np.testing.assert_allclose(h, of_titles, atol=2e-3)
    assert h.dtype == np.float16
    lengths = np.linalg.norm(of_titles, axis=1) * np.linalg.norm(of_items, axis=1)
    np.testing.assert_allclose(scores[:, 0], (of_titles * of_items).sum(1) / lengths, atol=1e-3)
    generate(run, *words, "--match", "title", "--min-similarity", 1)  # no other title is quite the same
    matches = load_npy(run / "generate" / "matches.npy")
    assert matches[:, 0].tolist() == wanted and (matches[:, 1:] == -1).all()


def test_text_mode_with_a_model_that_cannot_write_json_says_so_and_leaves_nothing(toy_run, tmp_path):
    run = with_inputs(toy_run, tmp_path)
    with pytest.raises(UserError, match=r"none of 60 answers names an item \({'bad': 60}\)"):
        generate(run, "--mode", "text", "--pairs-per-user", 1, "--max-new-tokens", 4)
    assert not (run / "generate").exists()


def test_llm_profiles_are_each_ones_own_or_empty(server, tmp_path):
    words = ("--profiles", "llm", "--endpoint", server, "--profile-titles", 2, "--n-retries", 0)
    run_stage("prep", tmp_path / "plain", "--profiles", "template")
    items = load_jsonl(tmp_path / "plain" / "prep" / "items.jsonl")
    Server.plan, Server.key = {prompts.item_profile_prompt(items[3]): [500]}, prompts.PROFILE_KEY
    try:
        run_stage("prep", tmp_path, *words)
    finally:
        Server.key = prompts.NEGATIVE_KEY
    told = load_jsonl(tmp_path / "prep" / "items.jsonl"), load_jsonl(tmp_path / "prep" / "users.jsonl")
    assert told[0][3]["profile"] == "" and told[0][2]["profile"] == prompts.item_profile_prompt(items[2]).strip()
    train = load_npy(tmp_path / "prep" / "train.indices.npy")[: load_npy(tmp_path / "prep" / "train.indptr.npy")[1]]
    named = [item["item"] for item in items if f"- {item['title']}." in told[1][0]["profile"]]
    assert len(named) == 2 and set(named) <= set(train.tolist())  # cases A20, D20
    counts = load_json(tmp_path / "prep" / "manifest.json")["counts"]
    assert counts["profiles ok"] == len(items) + 60 - 1 and counts["profiles failed"] == 1
    rows = load_jsonl(tmp_path / "prep" / "profiles.jsonl")
    about = [{"item": n} for n in range(80)] + [{"user": n} for n in range(60)]
    assert all(row.items() >= own.items() for row, own in zip(rows, about, strict=True))


def test_llm_profiles_of_users_are_told_their_reviews_which_are_kept_as_well(server, tmp_path, monkeypatch):
    (tmp_path / "log.csv").write_text("user,item,text\nu,a,so good\nv,a,\n", encoding="utf-8")
    words = ("--interactions", tmp_path / "log.csv", "--k-core", 1, "--review-chars", 6, "--n-retries", 0)
    monkeypatch.setattr(Server, "key", prompts.PROFILE_KEY)
    run_stage("prep", tmp_path, *words, "--profiles", "llm", "--endpoint", server)
    told = [user["profile"] for user in load_jsonl(tmp_path / "prep" / "users.jsonl")]
    assert ["so goo" in profile for profile in told] == [True, False] and "so good" not in told[0]
    assert load_jsonl(tmp_path / "prep" / "reviews.jsonl") == [{"user": 0, "item": 0, "text": "so goo"}]


def test_profiles_by_a_local_model_keep_to_the_threads_and_are_written_anew_when_the_model_changes(
    tmp_path, monkeypatch
):
    model, tokenizer = llm.tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ("--profiles", "llm", "--profile-model", tmp_path / "model", "--max-new-tokens", 1)
    with pytest.raises(UserError, match=r"none of 140 answers is a profile \({'bad': 140}\); .* another profile_model"):
        run_stage("prep", tmp_path, *words)
    said = json.dumps({prompts.PROFILE_KEY: "Likes chess"})
    monkeypatch.setattr(llm, "generate_texts", lambda model, tokenizer, asked, n: [said for _ in asked])
    words = (*words[:-1], 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        run_stage("prep", tmp_path, *words)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    manifest = tmp_path / "prep" / "manifest.json"
    key = load_json(manifest)["key"]
    next(model.parameters()).data.add_(1)
    model.save_pretrained(tmp_path / "model")
    run_stage("prep", tmp_path, *words)
    assert load_json(manifest)["key"] != key and load_json(manifest)["counts"]["profiles ok"] == 140
