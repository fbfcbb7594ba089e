"""The table, the terminal view and the page; the page in a real browser."""

import html
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from matplotlib.figure import Figure

from hnlm_ref import pictures, report
from hnlm_ref.artifacts import Run, load_json, load_jsonl, load_npy, save_json, save_jsonl, save_npy
from hnlm_ref.console import UserError
from hnlm_ref.report import compare, lay_out, result_rows, write
from hnlm_ref.view import View, load_generated, open_runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '</script><script>document.title = "hacked"</script> & "quotes"'


@pytest.fixture(scope="module")
def marked_run(toy_run, tmp_path_factory):
    """The toy run: a name of the page's own signs, titles that are markup or none, replies as text mode writes them."""
    run = shutil.copytree(toy_run, tmp_path_factory.mktemp("marked") / "run<1>{{data}}")
    items = load_jsonl(run / "prep" / "items.jsonl")
    for item in items:
        item["title"] = EVIL if item["item"] % 2 else ""
    save_jsonl(run / "prep" / "items.jsonl", items)
    pairs = load_npy(run / "generate" / "pairs.npy")
    texts = [{"user": int(u), "item": int(i), "status": "ok", "text": EVIL, "raw": "{…}"} for u, i in pairs]
    texts[0] |= {"status": "bad", "text": None, "raw": "I cannot say."}  # stage 3 leaves such a pair out
    save_jsonl(run / "generate" / "texts.jsonl", texts)
    for name in ("pairs", "matches", "match_scores"):
        save_npy(run / "generate" / f"{name}.npy", load_npy(run / "generate" / f"{name}.npy")[1:])
    return run


def test_a_score_is_mean_and_sample_deviation_over_seeds():
    """0.1 and 0.3: mean 0.2, sample standard deviation 0.1414."""
    view = SimpleNamespace(methods={"a": {"seed0": {"x": 0.1}, "seed1": {"x": 0.3}}, "b": {"seed0": {"x": 0.25}}})
    assert View.score(view, "a", "x") == pytest.approx((0.2, 0.02**0.5)) and View.score(view, "b", "x") == (0.25, 0.0)


def test_the_columns_of_a_table_are_as_wide_as_their_widest_cell():
    assert lay_out([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc  d"


def test_the_table_names_every_method_and_the_numbers_of_metrics_json(toy_run):
    told = load_json(toy_run / "eval" / "metrics.json")["methods"]
    lines = {line.split()[0]: line.split()[1:] for line in lay_out(result_rows([View(toy_run)])).splitlines()}
    for method in ("uniform", "dns", "hnlm"):
        columns = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")
        assert lines[method][:4] == [f"{told[method]['seed0'][column]:.4f}" for column in columns]


def test_show_gives_one_user_s_history_negatives_and_recommendations(toy_run, cli):
    view, prep = View(toy_run), Run(toy_run).prep()
    user = 5
    (told,) = json.loads(cli("show", toy_run, "--user", prep.users[user]["key"], "--json").stdout)["users"]
    history = prep.history(user)[::-1].tolist()
    assert told["history"] == history[:20] and told["n_history"] == len(history)
    pairs, matches, similarities = (
        load_npy(toy_run / "generate" / f"{name}.npy") for name in ("pairs", "matches", "match_scores")
    )
    asked = pairs[pairs[:, 0] == user, 1].tolist()
    assert [pair["positive"] for pair in told["pairs"]] == [item for item in history if item in asked][:5]
    for pair in told["pairs"]:
        (row,) = ((pairs[:, 0] == user) & (pairs[:, 1] == pair["positive"])).nonzero()[0]
        assert [item for item, _ in pair["matches"]] == matches[row][matches[row] >= 0][:5].tolist()
        assert [value for _, value in pair["matches"]] == similarities[row][matches[row] >= 0][:5].tolist()
    assert told["held_out"] == view.run.test().row(user).tolist()
    folder = toy_run / "train" / "dns" / "seed0"
    scores = load_npy(folder / "item.npy") @ load_npy(folder / "user.npy")[user]
    known = {*prep.train.row(user).tolist(), *prep.valid.row(user).tolist()}
    assert len(known) > len(prep.train.row(user))
    free = sorted((item for item in range(prep.n_items) if item not in known), key=lambda item: -scores[item])
    assert told["lists"]["dns"] == free[:20] and told["n_free"] == len(free)
    for pair in told["pairs"]:  # a training item is placed among the others as if it were new
        assert pair["places"]["dns"][0] == 1 + sum(scores[item] > scores[pair["positive"]] for item in free)
    for item, place in zip(
        (m for m, _ in told["pairs"][0]["matches"]), told["pairs"][0]["places"]["dns"][1:], strict=True
    ):
        assert item in known or free.index(item) + 1 == place


def test_an_evaluation_in_progress_is_read_from_where_it_is_written(toy_run, tmp_path):
    run = shutil.copytree(toy_run, tmp_path / "run")
    assert list(View(run).stages) == ["prep", "sft", "generate", "eval"]
    shutil.copytree(run / "eval", run / ".eval.partial")
    save_json(run / "eval" / "metrics.json", {})  # of an older evaluation, and of an older preparation
    save_json(run / "eval" / "manifest.json", {**load_json(run / "eval" / "manifest.json"), "inputs": {"prep": "old"}})
    test = Run(run).test()
    (run / "prep" / "test.indices.npy").unlink()  # opened once
    view = View(run, run / ".eval.partial", test)
    assert list(view.stages) == ["prep", "sft", "generate"] and list(view.methods) == ["uniform", "dns", "hnlm"]
    assert view.stories([5])["users"][0]["held_out"] == test.row(5).tolist()


def test_curves_run_over_epochs_or_the_seconds_until_their_end(toy_run):
    view, folder = View(toy_run), toy_run / "train" / "dns" / "seed0"
    log, seconds = load_jsonl(folder / "log.jsonl"), load_json(folder / "manifest.json")["timing"]["epoch_seconds"]
    told = [row["valid_ndcg@20"] for row in log]
    assert view.curves("dns", "valid_ndcg@20", False) == [(list(range(1, len(log) + 1)), told)]
    ((times, values),) = view.curves("dns", "valid_ndcg@20", True)
    assert times == pytest.approx([sum(seconds[: n + 1]) for n in range(len(log))]) and values == told
    assert view.curves("dns", "no such column", False) == []


def test_a_mean_over_seeds_is_taken_place_by_place_and_an_empty_group_stays_empty():
    seeds = {"seed0": {"groups": [0.1, None], "lists": {"a": 1, "b": 2}}, "seed1": {"groups": [0.3, None], "lists": {}}}
    view = SimpleNamespace(methods={"dns": seeds})
    assert View.mean(view, "dns", "groups") == [pytest.approx(0.2), pytest.approx(float("nan"), nan_ok=True)]
    seeds["seed1"]["lists"] = {"a": 2, "b": 5}
    assert View.mean(view, "dns", "lists") == [1.5, 3.5]


def test_a_user_s_value_is_the_mean_over_seeds_of_its_column(tmp_path):
    (tmp_path / "per_user").mkdir()
    for seed, values in enumerate(([[9, 9], [0.1, np.nan]], [[9, 9], [0.4, np.nan]])):
        save_npy(tmp_path / "per_user" / f"dns-seed{seed}.npy", np.array(values))
    view = SimpleNamespace(
        metrics={"columns": ["recall@20", "ndcg@20"]}, eval_dir=tmp_path, methods={"dns": {"seed0": {}, "seed1": {}}}
    )
    view.prep = SimpleNamespace(users=[{"key": "a"}, {"key": "b"}])
    found = View.per_user(view, "dns", "ndcg@20")
    assert list(found) == ["a", "b"] and found["a"] == pytest.approx(0.25) and np.isnan(found["b"])


def test_pairs_without_a_readable_reply_are_there_again(tmp_path):
    assert load_generated(Run(tmp_path))["pairs"].shape == (0, 2)
    folder = tmp_path / "generate"
    folder.mkdir()
    save_json(folder / "manifest.json", {})
    tables = {"pairs": np.array([[0, 1]], np.int32), "matches": np.array([[5, -1]], np.int32)}
    for name, rows in {**tables, "match_scores": np.array([[0.5, -1]], np.float32)}.items():
        save_npy(folder / f"{name}.npy", rows)
    made = load_generated(Run(tmp_path))
    assert made["replies"] is None and made["pairs"].tolist() == [[0, 1]]
    replies = [{"status": "bad", "text": None, "raw": "?"}, {"status": "ok", "text": "Up", "raw": "{}"}]
    save_jsonl(folder / "texts.jsonl", ({"user": 0, "item": n, **reply} for n, reply in enumerate(replies)))
    made = load_generated(Run(tmp_path))
    assert made["pairs"].tolist() == [[0, 0], [0, 1]] and made["replies"] == replies
    assert made["matches"].tolist() == [[-1, -1], [5, -1]] and made["match_scores"].tolist() == [[-1, -1], [0.5, -1]]


def told_of(n_seeds: int = 2, **metrics) -> SimpleNamespace:
    """What the sentences and tables read of a view: dns has 0.1 and 0.3, hnlm 0.3 and 0.5 in every column."""
    methods = {method: {f"seed{n}": {} for n in range(n_seeds)} for method in ("dns", "hnlm")}
    scores = {"dns": (0.2, 0.02**0.5), "hnlm": (0.4, 0.02**0.5)} if n_seeds > 1 else {"dns": (0.1, 0), "hnlm": (0.3, 0)}
    timing = [{"timing": {"epoch_seconds": [1.0, 2.0]}, "knobs": {"backbone": "mf", "dim": 8}},
              {"timing": {"epoch_seconds": [2.0]}}]  # fmt: skip
    counts = {"users": 1200, "items": 3400, "train": 5600, "valid": 7, "test": 8}
    return SimpleNamespace(
        name="one", prefix="one: ", methods=methods, k=20,
        metrics={"k": [20], "subset": None, "users_without_test": 0, **metrics},
        stages={"prep": {"counts": counts}},
        score=lambda method, column: scores[method],
        training=lambda method: timing[:n_seeds],
    )  # fmt: skip


def test_the_rows_and_sentences_of_a_run_by_hand(tmp_path):
    view = told_of()
    rows = [["one: dns", "0.2000 ±0.1414", "0.2000 ±0.1414", "2", "2.5"],
            ["one: hnlm", "0.4000 ±0.1414", "0.4000 ±0.1414", "2", "2.5"]]  # fmt: skip
    assert report.result_rows([view]) == [["method", "recall@20", "ndcg@20", "seeds", "seconds"], *rows]
    counts = "one: 1,200 users, 3,400 items, 5,600 / 7 / 8 train / valid / test pairs"
    assert report.head(view) == f"{counts}; mf with 8 dimensions; language model: none"
    text = report.head(told_of(users_without_test=1234))  # case C09
    assert text.startswith(f"{counts} (1,234 users without test items left out); mf")
    view.stages["sft"] = {"knobs": {"model": "hub/SmolLM2"}}
    assert report.head(view).endswith("; language model: SmolLM2")
    few = {"n": 1234, "distinct_items": 5600, "top_item_share": 0.125, "false": [0.02, 0.01, 0.03], "chance": 0.01}
    view = told_of(negatives={"dns": {**few, "percentile": 0.875}, "llm": {**few, "percentile": None}})
    share = "2.00% (1.00% to 3.00%)"
    assert report.negative_rows([view])[1:] == [
        ["one: dns", "1,234", "5,600", "12.50%", "87.5%", share, "1.00%", "2.0"],
        ["one: llm", "1,234", "5,600", "12.50%", "-", share, "1.00%", "2.0"],
    ]
    assert report.generated_line(told_of(generated=None)) == "no generated negatives in this run"
    made = {"pairs": 1000, "without_match": 2000, "similarity": None, "status": {"ok": 3000, "bad": 1}}
    line = "generated: 1,000 pairs, 2,000 without a matched item"
    assert report.generated_line(told_of(generated=made)) == f"{line}; 3,000 replies ok; 1 replies bad"
    made = {**made, "similarity": [0.1, 0.2], "status": {}}
    line += "; similarity, minimum, quartiles, maximum: 0.100, 0.200"
    assert report.generated_line(told_of(generated=made)) == line
    view.run = SimpleNamespace(dir=tmp_path)
    assert report.quality_rows([view]) == []
    (tmp_path / "generate").mkdir()
    quality = {"matched": {"false_rate": 0.1, "recall": 0.25}, "popular": {"false_rate": 1, "recall": 0}}
    save_json(tmp_path / "generate" / "quality.json", quality)
    rows = [["one: matched", "0.100", "0.250"], ["one: popular", "1.000", "0.000"]]
    assert report.quality_rows([view]) == [["on validation", "false rate", "recall"], *rows]


def test_pictures_are_of_what_there_are_numbers_for(monkeypatch):
    drawn = {}
    for kind in ("intervals", "curves"):
        monkeypatch.setattr(pictures, kind, lambda name, *told: drawn.update({name: told}))
    view = told_of(negatives={"dns": {"false": [0.02, 0.01, 0.03], "chance": 0.005}})
    view.mean = lambda method, key: [0.1, 0.2, 0.3]
    view.curves = lambda method, key, by_second: [([1], [0.5])] if key == "valid_ndcg@20" and method == "dns" else []
    report.draw([view])
    assert list(drawn) == ["quality", "val0", "val1", "by_popularity", "by_activity", "lists", "false"]
    (dns, *ends, _), hnlm = drawn["quality"][0]
    assert (dns, hnlm[0]) == ("one: dns", "one: hnlm") and ends == pytest.approx(
        [0.2, 0.2 - 0.02**0.5, 0.2 + 0.02**0.5]
    )
    assert drawn["val1"] == ({"one: dns": [([1], [0.5])]}, "seconds of training", "validation ndcg@20")
    groups = {f"one: {method}": [(range(1, 4), [0.1, 0.2, 0.3])] for method in ("dns", "hnlm")}
    assert drawn["by_activity"] == (groups, "users, least to most active", "ndcg@20", ())
    assert drawn["lists"] == (groups, "lists of 20", "share", ("coverage", "Gini", "head share"))
    assert drawn["false"][0] == [("one: dns", 2, 1, 3, 0.5)]
    drawn.clear()
    alone = told_of(1, negatives={})
    alone.mean, alone.curves = view.mean, view.curves
    report.draw([alone])
    assert "false" not in drawn and drawn["quality"][0][0] == ("one: dns", 0.1, 0.1, 0.1, None)


def test_a_table_of_the_page_has_a_head_and_no_markup_of_its_cells():
    head, rows = "<thead><tr><th>a</th><th>b</th></tr></thead>", "<tr><td>&lt;i&gt;</td><td>1</td></tr>"
    found = report._table([["a", "b"], ["<i>", "1"]])
    assert found == f"<div class=scroll tabindex=0><table>{head}<tbody>{rows}</tbody></table></div>"
    assert report._table([]) == report._table([["a", "b"]]) == ""


def test_a_comparison_is_told_with_its_interval_or_that_there_is_none(monkeypatch):
    told = {"difference": 0.2, "low": -0.1, "high": 0.5, "p": 0.0125}
    rows = [{"method": "b", "against": "a", **told}, {"method": "c", "against": "a", "not compared": "other users"}]
    monkeypatch.setattr(report, "compare", lambda views, metric: rows if metric == "ndcg@20" else [])
    assert report.comparison_rows([told_of()]) == [
        ["ndcg@20, paired over users", "difference", "95 % interval", "p"],
        ["b against a", "+0.2000", "-0.1000 to +0.5000", "0.0125"],
        ["c against a", "not comparable: other users or another split", "", ""],
    ]


def test_a_user_is_told_line_by_line():
    reply = {"status": "ok", "text": "T", "raw": "R"}
    pairs = [
        {"positive": 1, "matches": [(2, 0.5), (4, -0.25)], "places": {"dns": [7, 1, 1200]}, "reply": reply},
        {"positive": 0, "matches": [], "places": {"dns": [3]}, "reply": {"status": "bad", "text": None, "raw": "?"}},
        {"positive": 0, "matches": [], "places": {"dns": [3]}, "reply": None},
    ]
    user = {"key": "u7", "history": [1, 0], "n_history": 30, "held_out": [2, 3], "pairs": pairs}
    lines = list(report._lines({**user, "lists": {"dns": [2, 4]}}, dict(enumerate("ABCDE"))))
    assert [click.unstyle(line) for line in lines] == [
        "user u7: 30 training items, the newest first", "  B", "  A",
        "\ntook B  place 7 (dns)", "  status: ok", "  text: T", "  raw: R",
        "  generated negative, nearest items by similarity:",
        "  +0.500  C  held out: a false negative  place 1 (dns)", "  -0.250  E  place 1,200 (dns)",
        "\ntook A  place 3 (dns)", "  status: bad", "  raw: ?", "  no matched item",  # never a title "None"
        "\ntook A  place 3 (dns)", "  no matched item",
        "\ndns recommends: 1 of 2 held-out items found", "  ✓ C", "    E",
    ]  # fmt: skip
    assert lines[-2] == click.style("  ✓ C", fg="green") and "\x1b[31m  held out" in lines[8]


def test_a_run_is_told_as_json_or_as_its_line_and_tables(toy_run, monkeypatch):
    told, view = json.loads(report.show(toy_run, None, True)), View(toy_run)
    manifest = load_json(toy_run / "train" / "dns" / "seed0" / "manifest.json")
    assert told["metrics"] == load_json(toy_run / "eval" / "metrics.json")
    assert told["timing"]["dns"] == [manifest["timing"]] and set(told["timing"]) == set(view.methods)
    assert told["counts"]["prep"]["train"] == view.prep.train.nnz
    shown = report.show(toy_run, None, False)
    bold = [click.unstyle(line).split("  ")[0] for line in shown.splitlines() if line.startswith("\x1b[1m")]
    first, *tables, last = click.unstyle(shown).split("\n\n")
    assert first == report.head(view) and last == report.generated_line(view)
    beginnings = ["method", "ndcg@20, paired over users", "lists of", "negatives of"]
    assert [text.split("  ")[0] for text in tables] == beginnings == bold
    monkeypatch.setattr(report, "compare", lambda *_: [])  # as of one method alone
    monkeypatch.setattr(report, "list_rows", lambda _: [["lists of"], ["one"]])
    shown = report.show(toy_run, None, False)
    assert "paired over users" not in shown and "lists of" in shown


def test_the_explorer_holds_users_evenly_from_the_least_to_the_most_active(toy_run):
    view = View(toy_run)
    degrees, keys = view.prep.train.degrees(), [user["key"] for user in view.prep.users]
    tested = [u for u in range(60) if len(view.run.test().row(u))]
    order = sorted(tested, key=lambda u: degrees[u])
    told = report._explorer(view, 3)
    middle = order[(len(order) - 1) // 2]
    assert [user["key"] for user in told["users"]] == [keys[u] for u in (order[0], middle, order[-1])]
    assert told["first"] == 1 and told["story"] == ["uniform", "hnlm"] and told["name"] == "run"
    assert len(report._explorer(view, 500)["users"]) == len(tested)


def test_the_explorer_opens_at_a_user_with_a_match_and_holds_those_with_pairs_if_there_are_any(toy_run):
    view = View(toy_run)
    degrees, made = view.prep.train.degrees(), view.generated
    tested = [u for u in range(60) if len(view.run.test().row(u))]
    order = sorted(tested, key=lambda u: degrees[u])
    few = [order[0], order[3], order[9]]
    kept = np.isin(made["pairs"][:, 0], few)
    matches = np.where(made["pairs"][:, :1] == order[9], made["matches"], -1)
    view.generated = {**made, "matches": matches, "pairs": np.where(kept[:, None], made["pairs"], -1)}
    told = report._explorer(view, 200)
    assert [user["key"] for user in told["users"]] == [view.prep.users[u]["key"] for u in few] and told["first"] == 2
    view.generated = {**made, "pairs": np.full_like(made["pairs"], -1)}
    del view.methods["hnlm"]
    told = report._explorer(view, 200)
    assert len(told["users"]) == len(tested) and (told["first"], told["story"]) == (0, None)


def test_every_stage_is_folded_away_with_its_knobs_and_without_markup(toy_run):
    view = View(toy_run)
    view.name = "<run>"
    view.stages["<img>"] = view.stages["prep"]
    text = report._made(view)
    assert "<img>" not in text and "<h3>&lt;img&gt;</h3>" in text
    del view.stages["<img>"]
    text = report._made(view)
    assert re.findall(r"<h3>(.*?)</h3>", text) == [
        "prep",
        "sft",
        "generate",
        "eval",
        *(f"train {m}" for m in view.methods),
    ]
    told = json.loads(html.unescape(re.findall(r"<pre>(.*?)</pre>", text)[5]))
    manifest = load_json(toy_run / "train" / "dns" / "seed0" / "manifest.json")
    assert told == {key: manifest[key] for key in ("seed", "knobs", "counts", "timing", "fingerprint", "versions")}
    assert "<summary>&lt;run&gt;: knobs" in text


def test_show_in_the_terminal_is_plain_where_there_is_no_terminal(marked_run, cli):
    """Case G07: history, positive, raw text, parsed title, matched items, similarity; the summary has quartiles."""
    prep = Run(marked_run).prep()
    unread = cli("show", marked_run, "--user", prep.users[0]["key"]).stdout  # stage 3 found no title in this reply
    assert "status: bad\n  raw: I cannot say.\n  no matched item" in unread
    key = prep.users[3]["key"]
    text = cli("show", marked_run, "--user", key).stdout
    for part in (f"user {key}", "took ", "raw: {…}", f"text: {EVIL}", "nearest items by similarity", "hnlm recommends"):
        assert part in text
    assert "(no title) i" in text and "\x1b[" not in text
    summary = cli("show", marked_run).stdout
    assert re.search(r"without a matched item; similarity, minimum, quartiles, maximum: (-?\d\.\d{3}(, )?){5}", summary)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("show", "{run}", "--user", "nobody"), "--user nobody:"),
        (("show", "{empty}"), "is not finished; run: hnlm-ref eval"),
        (("report", "{empty}"), "is not finished; run: hnlm-ref eval"),
        (("export", "{run}", "--what", "negatives", "--format", "csv", "--method", "dsn"), "did you mean 'dns'?"),
        (("report", "{run}", "--out", "{empty}/no/page.html"), "page.html.tmp: No such file or directory"),
    ],
)
def test_a_mistake_is_one_sentence(toy_run, tmp_path, cli, words, sentence):
    done = cli(*(word.format(run=toy_run, empty=tmp_path) for word in words), cwd=tmp_path)
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_s_name_that_is_no_utf_8_does_not_cost_the_page(toy_run, tmp_path):
    view = View(toy_run)
    view.name = os.fsdecode(b"r\xe9")
    write([view], tmp_path / "page")
    assert "<title>HNLMRec: r?</title>" in (tmp_path / "page").read_text(encoding="utf-8")


def test_the_page_needs_no_other_file_and_is_the_same_when_written_again(marked_run, tmp_path):
    for name in ("a", "b"):
        write([View(marked_run)], tmp_path / name)
    page = (tmp_path / "a").read_text(encoding="utf-8")
    assert page == (tmp_path / "b").read_text(encoding="utf-8")
    loads = re.findall(r"<(?:script|link|img|iframe|image)[^>]*(?:src|href)=|@import|url\((?!#)", page)
    filled = re.sub(r'"raw": "[^"]*"|(?<=run&lt;1&gt;){{data}}|(?<=run\\u003c1>){{data}}', "", page)  # not the name
    assert loads == [] and page.count("<script") == 2 and "{{" not in filled
    for alt in re.findall(r'<svg role="img" aria-label="([^"]*)"', page):
        assert re.search(r"(dns|generated): .*\d", html.unescape(alt))
    assert page.count('<svg role="img"') == page.count("<figure>") >= 8
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_runs_of_other_users_stand_side_by_side_without_a_paired_test(toy_run, tmp_path, cli, monkeypatch):
    other = shutil.copytree(toy_run, tmp_path / "other")
    users = load_jsonl(other / "prep" / "users.jsonl")
    save_jsonl(other / "prep" / "users.jsonl", ({**user, "key": f"x{user['key']}"} for user in users))
    assert cli("report", toy_run, other, "--out", tmp_path / "page.html").stdout.strip() == str(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("not comparable: other users or another split") == 3 and "other: hnlm" in page
    save_jsonl(other / "prep" / "users.jsonl", users)
    assert "p" in compare(open_runs([toy_run, other]), "ndcg@20")[-1]  # the same users, the same test items
    manifest = load_json(other / "prep" / "manifest.json")
    manifest["files"]["items.jsonl"] = "with other profiles"
    save_json(other / "prep" / "manifest.json", manifest)
    assert all("p" in row for row in compare(open_runs([toy_run, other]), "ndcg@20"))
    manifest["files"]["test.indices.npy"] = "of another seed"
    save_json(other / "prep" / "manifest.json", manifest)
    told = compare(open_runs([toy_run, other]), "ndcg@20")
    assert ["p" in row for row in told] == [True, True, False, False, False]
    assert told[-1]["not compared"] == "other and run were split otherwise, or hold other data"
    twin = shutil.copytree(toy_run, tmp_path / "twin" / "run")
    assert [view.prefix for view in open_runs([toy_run, twin])] == [f"{toy_run}: ", f"{twin}: "]
    assert [view.prefix for view in open_runs([toy_run, other])] == ["run: ", "other: "]
    assert [view.prefix for view in open_runs([toy_run])] == [""]
    monkeypatch.chdir(toy_run)
    assert View(Path()).name == "run"
    told = load_json(other / "eval" / "metrics.json")
    save_json(other / "eval" / "metrics.json", {**told, "k": [5]})
    with pytest.raises(UserError, match=r"evaluated with different K, .*5.*10, 20"):
        open_runs([toy_run, other])


@pytest.mark.parametrize("stage", ["prep", "train/dns/seed0"])
def test_a_run_that_has_changed_since_its_evaluation_is_refused(toy_run, tmp_path, cli, stage):
    run = shutil.copytree(toy_run, tmp_path / "run")
    manifest = load_json(run / stage / "manifest.json")
    save_json(run / stage / "manifest.json", {**manifest, "fingerprint": "changed"})
    for words in (("show", run), ("report", run), ("export", run, "--what", "recommendations", "--format", "csv")):
        done = cli(*words, cwd=tmp_path)
        assert done.returncode == 1 and f"eval was made from {stage} {manifest['fingerprint']}, but" in done.stderr
        assert done.stderr.endswith(f"is now changed; run again: hnlm-ref eval --run-dir {run}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_kind_of_negatives_without_figures_is_a_row_of_dashes(tmp_path):
    (tmp_path / "generate").mkdir()
    save_json(tmp_path / "generate" / "quality.json", {"uniform": {"x_y": 0.5}, "nearest item": {"x_y": None}})
    view = SimpleNamespace(run=SimpleNamespace(dir=tmp_path), prefix="")
    assert report.quality_rows([view]) == [["on validation", "x y"], ["uniform", "0.500"], ["nearest item", "-"]]


def test_a_picture_draws_the_numbers_it_is_given(monkeypatch):
    figure = Figure()
    monkeypatch.setattr(pictures, "_svg", lambda draw, *_: draw(figure.add_subplot()))
    pictures.intervals("x", [("a", 2, 1, 3, 0.5), ("b", 7, 6, 8, None)], "share, %")
    pictures.curves("x", {"a": [([1, 2], [3, 4]), ([1], [5])], "b": [([2], [6])]}, "epoch", "ndcg")
    pictures.curves("x", {"a": [(range(1, 3), [3, 4])]}, "lists", "share", ("p", "q"))
    bars, lines, named = figure.axes
    drawn = [[line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes]
    assert drawn[0] == [[[1, 0], [3, 0]], [[2, 0]], [[0.5, 0]], [[6, 1], [8, 1]], [[7, 1]]]  # bar, dot, perhaps a mark
    assert drawn[1:] == [[[[1, 3], [2, 4]], [[1, 5]], [[2, 6]]], [[[1, 3], [2, 4]]]]
    assert bars.get_ylim() == (1.5, -0.5) and [text.get_text() for text in bars.get_yticklabels()] == ["a", "b"]
    assert named.get_xticks().tolist() == [1, 2] and [text.get_text() for text in named.get_xticklabels()] == ["p", "q"]
    labels = [(axes.get_xlabel(), axes.get_ylabel()) for axes in (bars, lines, named)]
    assert labels == [("share, %", ""), ("epoch", "ndcg"), ("lists", "share")]


def test_a_name_in_the_legend_may_begin_with_a_dash_below():
    svg = pictures.curves("x", {"_a": [([1], [0.5])], "b": [([1], [0.25]), ([1], [0.3])]}, "epoch", "ndcg")
    assert re.findall(r">(_a|b)</text>", svg) == ["_a", "b"]


def test_a_picture_takes_its_colours_from_the_page_and_tells_its_numbers():
    svg = pictures.curves("x", {"a<b": [([1, 2], [0.25, 0.5])]}, "epoch", "ndcg")
    assert "var(--c0)" in svg and "#fe00" not in svg and "a&lt;b: 0.25 to 0.5, at most 0.5" in svg


def test_as_many_lines_as_a_comparison_has_differ_in_colour_or_dash():
    svg = pictures.curves("x", {f"m{n}": [([1, 2], [0, n])] for n in range(13)}, "epoch", "ndcg")
    assert len(set(re.findall(r'style="(fill: none[^"]*var\(--c\d\)[^"]*)"', svg))) == 13


# ---- in a browser -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH; apt-get install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(marked_run, toy_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write(open_runs([marked_run, toy_run]), path)
    return path


@pytest.fixture
def page(browser, file, request):
    width, scheme = getattr(request, "param", (1280, "light"))
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    opened.complaints = []
    opened.on("console", lambda message: opened.complaints.append(message.text))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.goto(file.as_uri())
    yield opened
    opened.close()


@pytest.mark.parametrize("page", [(w, s) for w in (1280, 390) for s in ("light", "dark")], indirect=True)
def test_the_page_fits_its_window_and_has_nothing_to_complain_about(page):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.complaints == [] and page.title() == "HNLMRec: run<1>{{data}} and run"
    colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    light = [sum(map(int, re.findall(r"\d+", colour))) for colour in colours]
    assert (light[0] < light[1]) == dark and abs(light[0] - light[1]) > 400


@pytest.mark.parametrize(("n", "name"), [(13, "hnlm_matched"), (8, "a run: hnlm@mix_alpha=0.05@pool_size=4")])
def test_the_words_of_a_picture_lie_within_it(browser, n, name):
    names, page = [name + str(number) for number in range(n)], browser.new_page()
    curves = {label: [([1, 2], [0.1, 0.2])] for label in names}
    points = [(label, 1.0, 0.5, 1.5, 1.0) for label in names]
    for svg in (
        pictures.curves("x", curves, "epoch", report.CURVES[2][4]),
        pictures.intervals("x", points, "held-out positives, %"),
    ):
        page.set_content(f"<body style='font-family: sans-serif'>{svg}")
        beyond = """() => { const [svg, ...texts] = document.querySelectorAll("svg, svg text");
            const [outer, ...inner] = [svg, ...texts].map(node => node.getBoundingClientRect());
            return inner.filter(box => box.left < outer.left - 1 || box.right > outer.right + 1
                || box.top < outer.top - 1 || box.bottom > outer.bottom + 1).length; }"""
        assert page.evaluate(beyond) == 0
    page.close()


def test_the_explorer_answers(page, marked_run, toy_run):
    assert EVIL in page.inner_text("#history") and "hacked" not in page.title()  # titles never become markup
    assert EVIL in page.inner_text("#negative")  # the language model's answer
    page.select_option("#run", label="run")
    page.select_option("#user", index=0)
    prep, shown = Run(toy_run).prep(), page.inner_text("#user option:checked").split()[0]
    (told,) = View(toy_run).stories([user["user"] for user in prep.users if user["key"] == shown])["users"]
    titles = [prep.items[item]["title"] for item in told["history"]]
    assert page.locator("#history li").all_inner_texts() == titles
    for n, pair in enumerate(told["pairs"]):
        page.locator("#pairs button").nth(n).click()
        rows = page.locator("#negative tbody tr").all_inner_texts()
        assert prep.items[pair["positive"]]["title"] in rows[0] and len(rows) == 1 + len(pair["matches"])
        for row, (item, similarity) in zip(rows[1:], pair["matches"], strict=True):
            assert prep.items[item]["title"] in row and f"{similarity:.3f}" in row
    for place, (method, items) in enumerate(told["lists"].items()):
        card = page.locator("#lists section").nth(place)
        assert card.locator("h3").inner_text() == f"{method} recommends"
        hits = card.locator(".hit").all_inner_texts()
        assert hits == ["✓ " + prep.items[item]["title"] for item in items if item in told["held_out"]]
    before = page.inner_text("#lists")
    page.click("#next")
    assert page.inner_text("#lists") != before and page.input_value("#user") == "1"
    page.click("#previous")
    assert page.inner_text("#lists") == before and page.complaints == []
