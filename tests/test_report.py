"""The table, the terminal view and the page; the page in a real browser."""

import html
import json
import re
import shutil

import pytest

from hnlm_ref import pictures
from hnlm_ref.artifacts import Run, load_json, load_jsonl, load_npy, save_json, save_jsonl, save_npy
from hnlm_ref.console import UserError
from hnlm_ref.report import compare, lay_out, mean_and_spread, table, write
from hnlm_ref.view import View, open_runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '</script><script>document.title = "hacked"</script> & "quotes"'


@pytest.fixture(scope="module")
def marked_run(toy_run, tmp_path_factory):
    """The toy run with a title that is markup, one without a title, and replies as text mode writes them."""
    run = shutil.copytree(toy_run, tmp_path_factory.mktemp("marked") / "run<1>")
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


def test_the_table_gives_mean_and_sample_deviation_over_seeds():
    """0.1 and 0.3: mean 0.2, sample standard deviation 0.1414."""
    assert mean_and_spread([0.1, 0.3]) == "0.2000 ±0.1414" and mean_and_spread([0.25]) == "0.2500"
    assert lay_out([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc  d"


def test_the_table_names_every_method_and_the_numbers_of_metrics_json(toy_run):
    told = load_json(toy_run / "eval" / "metrics.json")["methods"]
    lines = {line.split()[0]: line.split()[1:] for line in table(toy_run).splitlines()}
    for method in ("uniform", "dns", "hnlm"):
        columns = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")
        assert lines[method][:4] == [f"{told[method]['seed0'][column]:.4f}" for column in columns]


def test_show_gives_one_user_s_history_negatives_and_recommendations(toy_run, cli):
    view, prep = View(toy_run), Run(toy_run).prep()
    user = 5
    (told,) = json.loads(cli("show", toy_run, "--user", prep.users[user]["key"], "--json").stdout)["users"]
    assert told["history"] == prep.history(user)[::-1][:20].tolist()
    pairs, matches = (load_npy(toy_run / "generate" / f"{name}.npy") for name in ("pairs", "matches"))
    for pair in told["pairs"]:
        (row,) = ((pairs[:, 0] == user) & (pairs[:, 1] == pair["positive"])).nonzero()[0]
        assert [item for item, _ in pair["matches"]] == matches[row][matches[row] >= 0][:5].tolist()
    assert told["held_out"] == view.run.test().row(user).tolist()
    folder = toy_run / "train" / "dns" / "seed0"
    scores = load_npy(folder / "item.npy") @ load_npy(folder / "user.npy")[user]
    known = set(view.known.row(user).tolist())
    free = sorted((item for item in range(prep.n_items) if item not in known), key=lambda item: -scores[item])
    assert told["lists"]["dns"] == free[:20]
    for item, place in zip(
        (m for m, _ in told["pairs"][0]["matches"]), told["pairs"][0]["places"]["dns"][1:], strict=True
    ):
        assert item in known or free.index(item) + 1 == place


def test_show_in_the_terminal_is_plain_where_there_is_no_terminal(marked_run, cli):
    """Case G07: history, positive, raw text, parsed title, matched items, similarity; the summary has quartiles."""
    prep = Run(marked_run).prep()
    unread = cli("show", marked_run, "--user", prep.users[0]["key"]).stdout  # stage 3 found no title in this reply
    assert "status: bad\n  text: None\n  raw: I cannot say.\n  no matched item" in unread
    key = prep.users[3]["key"]
    text = cli("show", marked_run, "--user", key).stdout
    for part in (f"user {key}", "took ", "raw: {…}", f"text: {EVIL}", "nearest items by similarity", "hnlm recommends"):
        assert part in text
    assert "(no title) i" in text and "\x1b[" not in text
    assert r"raw: {\u2026}" in cli("show", marked_run, "--user", key, PYTHONIOENCODING="latin-1").stdout
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


def test_the_page_needs_no_other_file_and_is_the_same_when_written_again(marked_run, tmp_path):
    for name in ("a", "b"):
        view = View(marked_run)
        view.name = "run\udcff"  # of a folder whose name is no UTF-8
        write([view], tmp_path / name)
    page = (tmp_path / "a").read_text(encoding="utf-8")
    assert page == (tmp_path / "b").read_text(encoding="utf-8")
    loads = re.findall(r"<(?:script|link|img|iframe|image)[^>]*(?:src|href)=|@import|url\((?!#)", page)
    assert loads == [] and page.count("<script") == 2 and "{{" not in re.sub(r'"raw": "[^"]*"', "", page)
    for alt in re.findall(r'<svg role="img" aria-label="([^"]*)"', page):
        assert re.search(r"(dns|generated): .*\d", html.unescape(alt))
    assert page.count('<svg role="img"') == page.count("<figure>") >= 8
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_runs_of_other_users_stand_side_by_side_without_a_paired_test(toy_run, tmp_path, cli):
    other = shutil.copytree(toy_run, tmp_path / "other")
    users = load_jsonl(other / "prep" / "users.jsonl")
    save_jsonl(other / "prep" / "users.jsonl", ({**user, "key": f"x{user['key']}"} for user in users))
    assert cli("report", toy_run, other, "--out", tmp_path / "page.html").stdout.strip() == str(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("not comparable: other users or another split") == 3 and "other: hnlm" in page
    save_jsonl(other / "prep" / "users.jsonl", users)
    assert "p" in compare(open_runs([toy_run, other]), "ndcg@20")[-1]  # the same users, the same test items
    manifest = load_json(other / "prep" / "manifest.json")
    manifest["files"]["test.indices.npy"] = "of another seed"
    save_json(other / "prep" / "manifest.json", manifest)
    told = compare(open_runs([toy_run, other]), "ndcg@20")
    assert ["p" in row for row in told] == [True, True, False, False, False]
    assert told[-1]["not compared"] == "other and run were split otherwise, or hold other data"
    told = load_json(other / "eval" / "metrics.json")
    save_json(other / "eval" / "metrics.json", {**told, "k": [5]})
    with pytest.raises(UserError, match=r"evaluated with different K .*10,20.*5"):
        open_runs([toy_run, other])


@pytest.mark.parametrize("stage", ["prep", "train/dns/seed0"])
def test_a_run_that_has_changed_since_its_evaluation_is_refused(toy_run, tmp_path, cli, stage):
    run = shutil.copytree(toy_run, tmp_path / "run")
    manifest = load_json(run / stage / "manifest.json")
    save_json(run / stage / "manifest.json", {**manifest, "fingerprint": "changed"})
    for words in (("show", run), ("report", run), ("export", run, "--what", "recommendations", "--format", "csv")):
        done = cli(*words, cwd=tmp_path)
        assert done.returncode == 1 and f"eval was made from {stage} {manifest['fingerprint']}, but" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_picture_takes_its_colours_from_the_page_and_tells_its_numbers():
    svg = pictures.curves("x", {"a<b": [([1, 2], [0.25, 0.5])]}, "epoch", "ndcg")
    assert "var(--c0)" in svg and "#fe00" not in svg and "a&lt;b: 0.25 at 1, 0.5 at 2, highest 0.5" in svg


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
    assert page.complaints == [] and page.title() == "HNLMRec: run<1> and run"
    colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    light = [sum(map(int, re.findall(r"\d+", colour))) for colour in colours]
    assert (light[0] < light[1]) == dark and abs(light[0] - light[1]) > 400


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
