"""Stage 1 from end to end on small logs: cleaning, cores, splits, texts. The slow twin below says what is right."""

import json
import os
import re
from collections import Counter

import numpy as np
import polars as pl
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hnlm_ref import data, readers
from hnlm_ref.artifacts import Run, load_csr, load_json, load_jsonl, load_npy
from hnlm_ref.cli import load_stage
from hnlm_ref.console import UserError

HEADER = "user_id,item_id,rating,timestamp\n"


class Prepared:
    """A finished prep folder, in keys."""

    def __init__(self, folder, counts):
        self.folder, self.counts = folder, counts
        self.items = load_jsonl(folder / "items.jsonl")
        self.users = load_jsonl(folder / "users.jsonl")
        self.user_keys, self.item_keys = [u["key"] for u in self.users], [i["key"] for i in self.items]
        self.csr = {part: load_csr(folder, part, len(self.items)) for part in data.PARTS}

    def pairs(self, *parts):
        return {
            (self.user_keys[u], self.item_keys[i])
            for part in parts or data.PARTS
            for u, i in self.csr[part].pairs().tolist()
        }

    def history(self, user):
        u, train = self.user_keys.index(user), self.csr["train"]
        order = load_npy(self.folder / "train.order.npy")[train.indptr[u] : train.indptr[u + 1]]
        return [self.item_keys[i] for i in train.indices[order]]


def prepare(folder, log, seed=0, **knobs):
    """Run stage 1 on a CSV text (or a path) within this process."""
    path = log
    if isinstance(log, str):
        folder.mkdir(exist_ok=True)
        path = folder / "log.csv"
        path.write_text(log, encoding="utf-8")
    command = load_stage("prep")
    folder.mkdir(exist_ok=True)
    result = command.main_function(command.config(interactions=str(path), **knobs), Run(folder, seed=seed, out=folder))
    return Prepared(folder, result["counts"])


def rows(*lines):
    return HEADER + "".join(line + "\n" for line in lines)


# ---- the slow twin ----------------------------------------------------------------------------------------------


def slow_prep(log, seed, min_rating, duplicates, k, how, valid_ratio, test_ratio):
    """Stage 1 in plain Python: ({part: set of pairs}, users, items, {user: training items oldest first})."""
    best = {}
    for user, item, rating, time in log:
        if rating >= min_rating:
            old = best.setdefault((user, item), time)
            best[user, item] = min(old, time) if duplicates == "first" else max(old, time)
    while True:
        users, items = [u for u, _ in best], [i for _, i in best]
        kept = {(u, i): t for (u, i), t in best.items() if users.count(u) >= k and items.count(i) >= k}
        if len(kept) == len(best):
            break
        best = kept
    pairs = sorted(best)
    draws = dict(zip(pairs, np.random.default_rng(seed).random(len(pairs)).tolist(), strict=True))
    part = {}
    groups = (
        [pairs] if how == "ratio-global" else [[p for p in pairs if p[0] == u] for u in sorted({u for u, _ in pairs})]
    )
    if how == "time":
        groups = []
        moments = sorted(best.values())
        cuts = (
            [
                moments[min(len(pairs) - 1, int(round(len(pairs) * (1 - r), 6) + 0.5))] if r else float("inf")
                for r in (test_ratio, valid_ratio + test_ratio)
            ]
            if pairs
            else []
        )
        for pair in pairs:
            part[pair] = "test" if best[pair] >= cuts[0] else "valid" if best[pair] >= cuts[1] else "train"
    for group in groups:
        n = len(group)
        if how.startswith("leave"):
            ranked = sorted(group, key=lambda p: (best[p], p[1]), reverse=True)
            n_test, n_valid = 1, int(how == "leave-two")
        else:
            ranked = sorted(group, key=draws.get)
            n_test, n_valid = int(n * test_ratio + 0.5), int(n * valid_ratio + 0.5)
        n_test = min(n_test, n - 1)
        n_valid = min(n_valid, n - 1 - n_test)
        for place, pair in enumerate(ranked):
            part[pair] = "test" if place < n_test else "valid" if place < n_test + n_valid else "train"
    train = {p for p in pairs if part[p] == "train"}
    if how in ("ratio-global", "time"):
        known_users, known_items = {u for u, _ in train}, {i for _, i in train}
        pairs = [p for p in pairs if p in train or (p[0] in known_users and p[1] in known_items)]
    parts = {name: {p for p in pairs if part[p] == name} for name in data.PARTS}
    users, items = sorted({u for u, _ in pairs}), sorted({i for _, i in pairs})
    histories = {
        u: [i for _, i in sorted((p for p in train if p[0] == u), key=lambda p: (best[p], p[1]))] for u in users
    }
    return parts, users, items, histories


USERS, ITEMS = st.sampled_from(["7", "07", "7.0", "10", "é"]), st.sampled_from(["10", "2", "B", "a", "None", "ß x"])
ROWS = st.tuples(USERS, ITEMS, st.sampled_from([1, 4, 4.5, 5]), st.integers(0, 6))
LOGS = st.integers(1, 25).flatmap(lambda n: st.lists(ROWS, min_size=n, max_size=40))  # dense: most leave something
HOWS = st.sampled_from(["ratio", "ratio-global", "leave-one", "leave-two", "time"])
RATIOS = st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 0.4])


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    log=LOGS, seed=st.integers(0, 3), k=st.integers(1, 3), how=HOWS, valid_ratio=RATIOS, test_ratio=RATIOS,
    min_rating=st.sampled_from([1.0, 4.0]), duplicates=st.sampled_from(["first", "last"]),
)  # fmt: skip
def test_small_logs_come_out_as_in_the_slow_twin(
    tmp_path, monkeypatch, log, seed, min_rating, duplicates, k, how, valid_ratio, test_ratio
):
    monkeypatch.setenv("HNLM_QUIET", "1")
    text = HEADER + "".join(f"{u},{i},{r},{1_500_000_000 + t}\n" for u, i, r, t in log)
    parts, users, items, histories = slow_prep(log, seed, min_rating, duplicates, k, how, valid_ratio, test_ratio)
    knobs = {"min_rating": min_rating, "duplicates": duplicates, "k_core": k, "split": how}
    ratios = {"valid_ratio": valid_ratio, "test_ratio": test_ratio}
    if not parts["train"] or (not parts["test"] and how in ("ratio-global", "time")):
        with pytest.raises(UserError, match=r"core is empty|nothing is left"):
            prepare(tmp_path / "run", text, seed, **knobs, **ratios)
        return
    done = prepare(tmp_path / "run", text, seed, **knobs, **ratios)
    assert {name: done.pairs(name) for name in data.PARTS} == parts
    assert (done.user_keys, done.item_keys) == (users, items)
    assert {u: done.history(u) for u in users} == histories


# ---- collected cases ------------------------------------------------------------------------------------------------


def test_ids_stay_text_and_blanks_around_them_are_noted(case_input, tmp_path):
    """Case A06."""
    done = prepare(tmp_path, case_input("a06_ids.csv"))
    assert done.user_keys == ["007", "10124420001034504343", "10124420001034504344", "7", "7.0", "u9"]
    assert done.item_keys == ["1", "2"] and done.counts["rows with blanks around an id"] == 1


def test_huge_and_scattered_ids_take_no_more_rows_than_there_are_ids(tmp_path):
    """Case A07."""
    done = prepare(tmp_path, rows("u,5,5,1500000000", "u,4000000000,5,1500000001", "u,9,5,1500000002"))
    assert done.item_keys == ["4000000000", "5", "9"]


def test_separators_blanks_and_headers(case_input, tmp_path):
    """Cases A01, A02, A19."""
    with pytest.raises(UserError, match=r"a08_recbole.inter: no column for item among the 1 found .*--sep '\\t'"):
        prepare(tmp_path / "comma", case_input("a08_recbole.inter"), sep=",")
    tab = prepare(tmp_path / "tab", case_input("a08_recbole.inter"), sep="\\t")
    assert (tab.user_keys, tab.item_keys, tab.counts["rows"]) == (["u1", "u2"], ["i1", "i2"], 3)
    blanks = prepare(tmp_path / "blanks", case_input("a08_spaces.txt"), sep=" ", header=False)
    assert blanks.pairs() == {("u1", "i1"), ("u1", "i2"), ("u2", "i1")}
    excel = prepare(tmp_path / "excel", case_input("a11_bom_crlf.csv"))
    assert excel.pairs() == {("u1", "i1"), ("u1", "i2"), ("u2", "i1")} and excel.counts["rows"] == 3


def test_item_texts_missing_odd_and_in_latin_1(case_input, tmp_path):
    """Cases A03, A04, A05."""
    log = case_input("a05_inter.csv")
    done = prepare(tmp_path / "a", log, items=str(case_input("a05_items_missing.csv")))
    titles = ["None", "NA", "null", "", 'Bread, Butter & "Jam"', "Tom & Jerry", "", "Eight"]
    assert [item["title"] for item in done.items] == titles
    assert done.counts["items without title"] == 2 and done.counts["item rows outside the catalogue"] == 1
    # Tom &amp; Jerry is cleaned; i7 has no row, so neither has it a text
    assert [done.counts[what] for what in ("items without a row", "titles cleaned", "items without text")] == [1] * 3
    assert done.counts["texts cut"] == 0
    assert done.items[3]["profile"] == "Toys" and done.items[6]["profile"] == ""
    with pytest.raises(UserError, match="line 2: byte 0xE9 at place 7 is no UTF-8; try --encoding latin-1"):
        prepare(tmp_path / "b", log, items=str(case_input("a04_items_latin1.csv")))
    done = prepare(tmp_path / "b", log, items=str(case_input("a04_items_latin1.csv")), encoding="latin-1")
    assert done.items[0]["title"] == "Misérables (Les)"


def test_the_core_is_taken_to_the_fixed_point_and_every_pass_is_counted(case_input, tmp_path):
    """Case A09."""
    done = prepare(tmp_path, case_input("a03_kcore_passes.csv"), k_core=2)
    assert (len(done.users), len(done.items), done.counts["pairs"]) == (3, 3, 9)
    assert done.counts["k-core passes"] == [12, 11, 10, 9]


def test_an_empty_core_stops_prep_and_names_the_largest_k(case_input, tmp_path, cli):
    """Case A10."""
    done = cli("prep", "--interactions", case_input("a02_kcore_chain.csv"), "--k-core", "2", "--run-dir", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the 2-core is empty (5 rows, largest k with data left: 1)" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_pair_is_kept_once_after_the_rating_filter(case_input, tmp_path):
    """Case A11."""
    done = prepare(tmp_path, case_input("a01_dups.csv"), min_rating=4)
    assert done.pairs() == {("u1", "i1"), ("u1", "i2"), ("u2", "i1"), ("u2", "i2")}
    assert (done.counts["below min_rating"], done.counts["repeated pairs"]) == (1, 1)
    assert "below min_rating" not in prepare(tmp_path, "user,item\nu,i\n").counts
    done = prepare(tmp_path, "user,item\nu,i\n", min_rating=4)
    assert done.pairs() == {("u", "i")} and done.counts["below min_rating"] == "not applied, the log has no ratings"


@pytest.mark.parametrize(("duplicates", "history"), [("first", ["a", "b"]), ("last", ["b", "a"])])
def test_of_a_repeated_pair_the_first_or_the_last_row_in_time_stays(tmp_path, duplicates, history):
    log = rows("u,a,5,1500000003", "u,a,5,1500000001", "u,a,5,1500000004", "u,b,5,1500000002")
    done = prepare(tmp_path, log, duplicates=duplicates, test_ratio=0, valid_ratio=0)
    assert done.history("u") == history and done.counts["repeated pairs"] == 2


@pytest.mark.parametrize("unit", [1, 1000, 1_000_000, 1_000_000_000, "date"])
def test_the_window_holds_its_start_and_not_its_end_in_every_unit(tmp_path, unit):
    """Case A13: 2015-01-01 is 1420070400, 2018-01-01 is 1514764800."""
    seconds = {"a": 1420070399, "b": 1420070400, "c": 1514764799, "d": 1514764800}
    dates = {
        "a": "2014-12-31 23:59:59",
        "b": "2015-01-01 00:00:00",
        "c": "2017-12-31 23:59:59",
        "d": "2018-01-01 00:00:00",
    }
    lines = [f"u,{i},5,{dates[i] if unit == 'date' else t * unit}" for i, t in seconds.items()]
    window = {"date_from": "2015-01-01", "date_to": "2018"}
    assert prepare(tmp_path, rows(*lines), **window).item_keys == ["b", "c"]


def test_milliseconds_are_found_and_a_mixture_is_refused(case_input, tmp_path):
    """Cases A13, A14."""
    done = prepare(tmp_path / "a", case_input("a07_ts_ms.csv"), date_from="2015-01-01", date_to="2018-01-01")
    assert done.counts["pairs"] == 3 and "time in ms" in done.counts["format"]
    with pytest.raises(UserError, match="line 3: time 1451606399000 cannot be in s"):
        prepare(tmp_path / "b", case_input("a07_ts_mixed.csv"))
    assert prepare(tmp_path / "b", case_input("a07_ts_mixed.csv"), time_unit="s").counts["bad rows skipped"] == 0


def test_held_out_rows_older_than_their_users_last_training_row_are_counted(tmp_path):
    """Of u the rows of times 2 and 3 are older than 4, of v none is older than 1; u, b stays in train at 4."""
    (tmp_path / "test.csv").write_text("user,item,time\nu,d,2\nu,c,3\nu,e,4\nv,b,1\nv,d,2\nu,b,0\n", encoding="utf-8")
    log = "user,item,time\nu,a,1\nu,b,4\nv,a,1\nw,c,1\nw,d,1\nw,e,1\n"
    done = prepare(tmp_path, log, test_file=str(tmp_path / "test.csv"), time_unit="s")
    assert done.counts["test"] == 5 and done.counts["held-out rows older than their user's last training row"] == 2
    assert done.history("u") == ["a", "b"] and done.counts["held-out pairs also in an earlier part"] == 1
    places = prepare(tmp_path, log, test_file=str(tmp_path / "test.csv"), time_unit="order")  # of two files, not times
    assert places.counts["test"] == 5 and not any("older" in name for name in places.counts)


def test_the_parts_of_a_ready_split_have_times_in_one_unit_or_none(tmp_path):
    log, test = rows("u,b,5,1420070400", "u,a,5,1420070401"), tmp_path / "test.csv"
    test.write_text("user_id,item_id\nu,c\n", encoding="utf-8")
    assert prepare(tmp_path, log + "v,c,5,1420070400\n", test_file=str(test)).history("u") == ["b", "a"]
    test.write_text(rows("u,c,5,2015-01-01"), encoding="utf-8")  # seconds like the others, once read
    repeated = prepare(tmp_path, log + "v,c,5,1420070400\nu,a,5,1420070399\n", test_file=str(test))
    assert repeated.history("u") == ["a", "b"] and repeated.counts["repeated pairs"] == 1
    assert repeated.pairs("test") == {("u", "c")}
    for time, unit in ((1420070400000, "ms"), (7, "order")):
        test.write_text(rows(f"u,c,5,{time}"), encoding="utf-8")
        with pytest.raises(UserError, match=f"the parts of the split have times in s and {unit}; name --time-unit"):
            prepare(tmp_path, log, test_file=str(test))


def test_later_rows_of_unseen_users_and_items_are_counted_and_an_empty_test_is_refused(case_input, tmp_path):
    """Cases A15, A16."""
    log = case_input("a09_split_unseen.csv")
    with pytest.raises(UserError, match=r"unseen users: 1, .*unseen items: 2, .*left out: 3, train: 4; choose"):
        prepare(tmp_path / "a", log, split="time", test_from="1420070450", valid_ratio=0.0)
    done = prepare(tmp_path / "b", log, split="time", test_from="1420070404", valid_ratio=0.0)
    assert done.pairs("train") == {("u1", "i1"), ("u1", "i2"), ("u2", "i1")} and done.pairs("test") == {("u2", "i2")}
    assert (done.user_keys, done.item_keys) == (["u1", "u2"], ["i1", "i2"])
    assert [done.counts[what] for what in ("rows", "train", "test", "held-out rows left out")] == [7, 3, 1, 3]
    both = rows("u1,i1,5,1", "u1,i2,5,2", "u2,i1,5,3", "u3,i9,5,8", "u2,i2,5,9")  # u3 and i9 are new in one row
    counts = prepare(tmp_path / "c", both, split="time", test_from="5", valid_ratio=0.0, time_unit="s").counts
    assert [counts[f"held-out rows {what}"] for what in ("of unseen users", "of unseen items", "left out")] == [1] * 3


def test_a_bound_in_time_that_is_not_given_follows_from_its_ratio():
    """Ten rows at times 1 to 10, a tenth for validation and two for the test unless a time says otherwise."""
    numbers = np.arange(10, dtype=np.int32)
    log = data.Log(
        pl.Series(["u"]), pl.Series(list("abcdefghij")), 0 * numbers, numbers, 0 * numbers, time=numbers + 1.0, unit="s"
    )

    def parts(valid_from, test_from, valid_ratio=0.1):
        found = data.split(log, "time", (valid_ratio, 0.2), (valid_from, test_from), np.random.default_rng(0))
        return "".join("-ve"[part] for part in found)

    assert parts(None, None) == "-------vee"
    assert parts(None, "8.0") == "------veee" and parts(None, "8.0", 0.0) == "-------eee"
    assert parts("6.0", None) == "-----vvvee" and parts("6.0", "8.0") == "-----vveee"
    with pytest.raises(UserError, match=r"valid_from 9\.0 is not before the test begins: validation"):
        parts("9.0", None)


def test_a_user_of_two_rows_keeps_one_to_train_on_and_a_seed_says_which(tmp_path):
    log = "user,item\n" + "".join(f"u{u},i{i}\n" for u in range(30) for i in range(2))
    done = [prepare(tmp_path / str(seed), log, seed=seed, valid_ratio=0.5, test_ratio=0.5) for seed in (0, 1)]
    for found in done:
        assert [found.counts[part] for part in data.PARTS] == [30, 0, 30]
    assert done[0].pairs("train") != done[1].pairs("train")


def test_the_nearest_reading_of_published_sizes_may_be_larger_or_smaller(capsys):
    compare = load_stage("prep").main_function.__globals__["compare"]
    compare({"half": (5, 5, 5), "more": (11, 11, 11), "far more": (30, 30, 30)}, (10, 10, 10))
    assert "nearest: more" in capsys.readouterr().err


def test_rows_in_any_order_give_the_same_files(case_input, tmp_path):
    """Case A17: equal times go by item, and the user is told."""
    header, *lines = case_input("a12_time_ties.csv").read_text(encoding="utf-8").splitlines()
    one = prepare(tmp_path / "one", "\n".join([header, *lines]), split="leave-one")
    two = prepare(tmp_path / "two", "\n".join([header, *reversed(lines)]), split="leave-one")
    assert one.pairs("test") == two.pairs("test") == {("u1", "i5")}
    assert one.counts["pairs at the same time as another of their user"] == 5
    # another time of the same user, the same time of another user, and two pairs of a third
    more = [*lines, "u1,i6,5,1420070401", "u2,i1,5,1420070401", "u3,i1,5,1420070402", "u3,i2,5,1420070402"]
    more = prepare(tmp_path / "more", "\n".join([header, *more, "u4,i1,5,1420070402"]), split="leave-one")
    assert more.counts["pairs at the same time as another of their user"] == 5 + 2
    for path in sorted(one.folder.iterdir()):
        assert path.name == "log.csv" or path.read_bytes() == (two.folder / path.name).read_bytes()


def test_bad_rows_are_named_by_line_or_skipped(case_input, tmp_path):
    """Case A18."""
    log = case_input("a10_bad_rating.csv")
    with pytest.raises(UserError, match=r"line 3: rating '—' .*line 4: no rating; line 5: time 'notatime'"):
        prepare(tmp_path / "a", log)
    done = prepare(tmp_path / "b", log, skip_bad_rows=True)
    assert done.counts["rows"] == 1 and done.counts["bad rows skipped"] == 3


def test_held_out_titles_are_in_no_profile(tmp_path):
    """Case A20: the same for the reviews."""
    lines = ["user,item,time,text", *(f"u,i{n},{1500000000 + n},{'TESTLEAK' if n > 7 else 'fine'}" for n in range(10))]
    titles = ["item,title", *(f"i{n},{'TESTLEAK' if n > 7 else f'Title {n}'}" for n in range(10))]
    (tmp_path / "items.csv").write_text("\n".join(titles), encoding="utf-8")
    done = prepare(tmp_path, "\n".join(lines), items=str(tmp_path / "items.csv"), split="leave-two", review_chars=99)
    assert done.users[0]["profile"].startswith('Lately took "Title 7", "Title 6"')
    assert "TESTLEAK" not in (tmp_path / "users.jsonl").read_text(encoding="utf-8")
    assert (tmp_path / "reviews.jsonl").read_text(encoding="utf-8").count("fine") == 8
    assert "TESTLEAK" not in (tmp_path / "reviews.jsonl").read_text(encoding="utf-8")


def test_users_with_1_2_and_10_rows_under_8_1_1(tmp_path):
    """Case A21."""
    lines = [f"u{n},i{i},5,{1500000000 + i}" for n in (1, 2, 10) for i in range(n)]
    done = prepare(tmp_path, rows(*lines), test_ratio=0.1, valid_ratio=0.1)
    sizes = [[int(done.csr[part].degrees()[u]) for part in data.PARTS] for u in range(3)]
    assert dict(zip(done.user_keys, sizes, strict=True)) == {"u1": [1, 0, 0], "u2": [2, 0, 0], "u10": [8, 1, 1]}


def test_a_share_that_ends_in_a_half_is_rounded_up(tmp_path):
    """Of 50 rows 0.29 are 14.5, a little less in floating point."""
    done = prepare(tmp_path, rows(*(f"u,i{i},5,1500000000" for i in range(50))), test_ratio=0.29, valid_ratio=0.01)
    assert [done.counts[part] for part in data.PARTS] == [34, 1, 15]


# ---- the rest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  Tom &amp; Jerry\n", "Tom & Jerry"),
        ("&amp;quot;Best&amp;quot; &reg;", '"Best" ®'),
        ("<b>Big</b><br/>red <a href='x'>box</a>", "Big red box"),
        ('<span class="a-size-medium a-color-secondary a-text-normal', ""),
        ("<script>var x = 1;</script>Plain", "Plain"),
        ("<SCRIPT>var x;\nx = 1;</SCRIPT>Plain<BR>", "Plain"),
        ("var aPageStart = (new Date()).getTime();\nvar ue_t0=ue_t0||+new Date();", ""),
        (".a-box-inner{ background-color:#fff } #alohaBuyBoxWidget", ""),
        ("I <3 maths: 1 < 2 > 0, x<y", "I <3 maths: 1 < 2 > 0, x<y"),
    ],
)
def test_markup_is_cleaned_and_comparisons_are_left(raw, clean):
    assert data.clean_text(raw) == clean


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ('["a", ["b", ["c"]], 4.5]', "a, b, c, 4.5"),
        ('["a", null]', "a"),
        ("[null]", ""),
        ('["", "a", " ", [""]]', "a"),  # as in Amazon's descriptions
        ("[Box] of cups", "[Box] of cups"),
        ("['Crime', 'Drama']", "Crime, Drama"),  # Python's, as pandas writes it
        ("[2012]", "[2012]"),  # a title
        ("['un", "['un"),
        ('{"a": ["b"]}', '{"a": ["b"]}'),
        (None, ""),
    ],
)
def test_a_list_in_a_field_becomes_its_members_and_other_text_is_left(value, text):
    assert data.flat_text(value) == text


@pytest.mark.parametrize(
    ("text", "unit", "number"),
    [
        ("2015", "s", 1420070400),
        ("2015-02", "date", 1420070400 + 31 * 86400),
        ("2015-01-01T00:01", "ms", 1420070460e3),
        ("2015-01-01 00:00:01.5", "us", 1420070401.5e6),
        ("1420070400.5", "s", 1420070400.5),
        ("-1e3", "ms", -1000),
        ("2015", "order", 2015),
    ],
)
def test_a_bound_is_a_date_or_a_number_in_the_unit_of_the_log(text, unit, number):
    assert data.moment(text, unit) == number


def test_each_reading_of_the_published_sizes_counts_its_own_pairs():
    """C's item 3 has one user, D has one item; without both, C is left with one. Of item 1 all pairs are held out."""
    pairs = [("A", 1), ("A", 2), ("B", 1), ("B", 2), ("C", 3), ("C", 4), ("D", 4)]
    user, item = np.array([ord(u) - ord("A") for u, _ in pairs]), np.array([i - 1 for _, i in pairs])
    log = data.Log(pl.Series(list("ABCD")), pl.Series(list("1234")), user, item, 0 * user)
    assert data.published_readings(log, 2, lambda some: (some.item == 0).astype(int)) == {
        "2-core to the fixed point, all pairs": (2, 2, 4),
        "2-core to the fixed point, training pairs": (2, 1, 2),
        "one pass of the 2-core, all pairs": (3, 3, 5),
        "one pass of the 2-core, training pairs": (3, 2, 3),
        "users with 2 or more, items as they are, all pairs": (3, 4, 6),
        "users with 2 or more, items as they are, training pairs": (3, 3, 4),
    }


def test_pairs_whose_number_has_more_than_32_bits_are_told_apart():
    keys, user = pl.Series(range(1 << 16)), np.array([0, 1 << 16], np.int32)
    assert len(data.deduplicate(data.Log(keys, keys, user, 0 * user, 0 * user), "first", {})) == 2


def test_reviews_are_those_of_the_rows_that_stay_cut_and_the_smaller_of_two(tmp_path):
    log = "user,item,time,text\nv,a,1,\nu,b,2,bb bb\nu,a,1,z\nu,a,1,y\nu,a,3,x\n"
    prepare(tmp_path, log, review_chars=4)
    taken = [{"user": 0, "item": 0, "text": "y"}, {"user": 0, "item": 1, "text": "bb b"}]
    assert load_jsonl(tmp_path / "reviews.jsonl") == taken
    (tmp_path / "test.csv").write_text("user,item\nv,b\n", encoding="utf-8")
    for test_file in (None, str(tmp_path / "test.csv")):
        prepare(tmp_path, log, review_chars=4, columns=("time=",), test_file=test_file)
        assert load_jsonl(tmp_path / "reviews.jsonl") == [{**taken[0], "text": "x"}, taken[1]]
    for text, kept in ((log, 0), ("user,item\nu,a\n", 4)):
        assert not (prepare(tmp_path / "none", text, review_chars=kept).folder / "reviews.jsonl").exists()


def test_a_row_below_min_rating_gives_no_review_to_the_row_that_stays(tmp_path):
    prepare(tmp_path, "user,item,rating,text\nu,a,1,bad\nu,a,5,good\nu,b,5,fine\n", min_rating=4, review_chars=9)
    assert [review["text"] for review in load_jsonl(tmp_path / "reviews.jsonl")] == ["good", "fine"]


def test_where_min_rating_is_not_applied_to_the_log_it_is_not_to_its_reviews(tmp_path):
    prepare(tmp_path / "bare", "user,item,text\nu,a,one\nu,b,two\n", min_rating=4, review_chars=9)
    (tmp_path / "test.csv").write_text("user,item\nu,c\nv,b\n", encoding="utf-8")
    log, ready = "user,item,rating,text\nu,b,1,one\nv,c,5,two\n", {"test_file": str(tmp_path / "test.csv")}
    prepare(tmp_path / "ready", log, min_rating=4, review_chars=9, **ready)
    for name in ("bare", "ready"):
        assert [row["text"] for row in load_jsonl(tmp_path / name / "reviews.jsonl")] == ["one", "two"]


def test_a_second_row_of_an_item_is_counted(tmp_path):
    (tmp_path / "items.csv").write_text("item,title\na,A\nb,B\na,other\nz,Z\n", encoding="utf-8")
    done = prepare(tmp_path, "user,item\nu,a\nu,b\n", items=str(tmp_path / "items.csv"))
    assert [item["title"] for item in done.items] == ["A", "B"]
    assert done.counts["item rows of an item that has one"] == 1


def test_an_empty_review_is_none_in_every_format_and_beside_a_bad_row(tmp_path):
    lines = [
        json.dumps({"user": "u", "item": item, "text": text}) for item, text in (("a", ""), ("a", "fine"), ("b", ""))
    ]
    for log in ("\n".join(lines), "user,item,text\nu,a,\nu,a,fine\nu,b,\n,c,bad\n"):
        prepare(tmp_path, log, review_chars=9, skip_bad_rows=True)
        assert load_jsonl(tmp_path / "reviews.jsonl") == [{"user": 0, "item": 0, "text": "fine"}]


def test_profiles_hold_so_many_titles_and_so_much_text_and_the_first_of_two_rows_counts(tmp_path):
    items = [f" i1 ,One,{'x' * 299} yz", "i2,Two,abc d", "i2,Again,", "i3,,", "i9,Other,"]
    (tmp_path / "items.csv").write_text("item,title,description\n" + "\n".join(items), encoding="utf-8")
    log = rows("u,i1,5,1500000001", "u,i2,5,1500000002", "u,i3,5,1500000003", "v,i3,5,1500000001")
    done = prepare(tmp_path, log, items=str(tmp_path / "items.csv"), test_ratio=0, valid_ratio=0, text_chars=302)
    assert [user["profile"] for user in done.users] == ['Lately took "Two", "One".', "Took nothing that has a title."]
    profiles = ["One. " + "x" * 299, "Two. abc d", ""]  # of the text 300 characters, a blank at its end is cut
    assert [item["profile"] for item in done.items] == profiles and done.counts["texts cut"] == 0
    done = prepare(tmp_path, log, items=str(tmp_path / "items.csv"), test_ratio=0, text_chars=4, profile_titles=1)
    assert done.users[0]["profile"] == 'Lately took "Two".' and done.items[1]["text"] == "abc"
    assert done.counts["texts cut"] == 2 and done.counts["item rows outside the catalogue"] == 1


def test_published_sizes_are_printed_beside_ours_and_the_nearest_reading_named(tmp_path, capsys):
    """Case X44: 4 users with 5 of 5 items, a fifth with one: 20 pairs in the 2-core, of them 12 (3 each) in train."""
    lines = [f"u{u},i{i},5,{1500000000 + i}" for u in range(4) for i in range(5)] + ["u9,i0,5,1500000000"]
    prepare(tmp_path, rows(*lines), k_core=2, valid_ratio=0.2, published=(4, 5, 12))
    told = capsys.readouterr().err
    assert "published: 4 5 12" in told
    assert "nearest: 2-core to the fixed point, training pairs" in told
    assert "20 (+66.7%)" in told and "12 (+0.0%)" in told
    # of one item all four pairs are held out: "4 (-20.0%)" items are left in train
    counted = "rows: 21, k-core passes: [20], held-out rows of unseen items: 4, train: 12, valid: 4, test: 4, "
    counted += "items without a row: 5, items without title: 5, items without text: 5, users: 4, items: 5, pairs: 20\n"
    assert "4 (-20.0%)" in told and counted in told


def test_a_file_name_that_is_no_utf_8_is_kept(cli, tmp_path):
    log = tmp_path / os.fsdecode(b"caf\xe9.csv")
    log.write_text(rows("u,i,5,1500000000", "u,i,x,1500000000"), encoding="utf-8")
    done = cli("prep", "--interactions", log, "--skip-bad-rows", "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert load_json(tmp_path / "run" / "prep" / "manifest.json")["knobs"]["interactions"] == str(log)
    assert load_jsonl(tmp_path / "run" / "prep" / "skipped.jsonl")[0]["file"] == log.name
    assert "1 users x 1 items" in cli("data", log, PYTHONIOENCODING="utf-8:strict").stdout


def test_a_history_cannot_be_split_by_time(tmp_path):
    (tmp_path / "log.txt").write_text("u c a b\nv a b c d\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"--split time: each line of .*log\.txt is a history, which orders"):
        prepare(tmp_path / "run", tmp_path / "log.txt", split="time", format="sequence")
    for bound in ("date_from", "date_to"):  # of what? of a running number of lines
        with pytest.raises(UserError, match=r"--date-from, --date-to or --split time: .* and no dates"):
            prepare(tmp_path / "run", tmp_path / "log.txt", **{bound: "2"})
    assert prepare(tmp_path / "run", tmp_path / "log.txt", split="leave-one").pairs("test") == {("u", "b"), ("v", "d")}


def test_the_unit_of_the_times_can_be_named_when_a_log_is_looked_at(cli, tmp_path):
    (tmp_path / "log.csv").write_text(HEADER + "u,i,5,5\nu,j,5,1600000000\n", encoding="utf-8")
    refused = cli("data", tmp_path / "log.csv")
    assert "time 1600000000 cannot be in order as the first one is (or name --time-unit)" in refused.stdout
    assert "2 rows, 0 that cannot be read" in cli("data", tmp_path / "log.csv", "--time-unit", "s").stdout
    assert (
        "no time unit 'sec'; known are auto, date, order, s,"
        in cli("data", tmp_path / "log.csv", "--time-unit", "sec").stderr
    )


def test_describe_tells_what_a_log_is_and_writes_nothing(case_input, tmp_path):
    told = data.describe(str(case_input("a03_kcore_passes.csv")))
    for part in ("csv", "time in s", "13 rows", "5 users x 5 items", "2-core: 3 users x 3 items, 9 pairs"):
        assert part in told
    assert "largest k with a k-core: 3" in told  # the three users' full 3 x 3 block
    (tmp_path / "log").write_text("user,item,rating\nu,i,x\nu,i,y\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"log holds no rows that can be read, line 2: rating 'x' is no number; it was"):
        data.describe(str(tmp_path / "log"))
    assert "3 that cannot be read" in data.describe(str(case_input("a10_bad_rating.csv")))
    for text in ("user,item\nu,i\n", "user,item,time\nu,i,5\n"):
        (tmp_path / "log").write_text(text, encoding="utf-8")
        assert data.describe(str(tmp_path / "log")).splitlines()[3:] == ["no ratings", "largest k with a k-core: 1"]


@pytest.mark.parametrize(("unit", "new_year"), [("s", 1420070400), ("ms", 1420070400000)])
def test_describe_tells_of_a_folder_every_line_it_should(tmp_path, unit, new_year):
    """Three users, three items, five of nine cells; the first second or millisecond of 2015 and the last of 2014."""
    taken = ["a x 5", "a y 5", "b x 5", "b y 5", "c z 4", "a x 1"]
    lines = [f"{row} {new_year - (row == 'c z 4')}" for row in taken] + [f"d x good {new_year}"] * 12
    head = "user_id:token item_id:token rating:float timestamp:float"
    (tmp_path / "l.train.inter").write_text("\n".join([head, *lines]).replace(" ", "\t"), encoding="utf-8")
    (tmp_path / "l.item").touch()
    (tmp_path / "l.test.inter").touch()
    columns = "user=user_id:token item=item_id:token rating=rating:float time=timestamp:float"
    assert data.describe(str(tmp_path)).splitlines() == [
        f"{tmp_path / 'l.train.inter'}: recbole, separator tab, utf-8, time in {unit}, {columns}",
        f"item texts: {tmp_path / 'l.item'}",
        f"test: {tmp_path / 'l.test.inter'}",
        "6 rows, 12 that cannot be read, 1 repeated pairs",
        *(f"  line {n}: rating 'good' is no number" for n in range(8, 18)),
        "3 users x 3 items, 5 pairs, density 5.56e-01",
        "  rating",
        *(
            "       1            1 " + "#" * 10,
            "       4            1 " + "#" * 10,
            "       5            4 " + "#" * 40,
        ),
        "    year",
        *("    2014            1 " + "#" * 8, "    2015            5 " + "#" * 40),
        "largest k with a k-core: 2",
        "  2-core: 2 users x 2 items, 4 pairs",
    ]


def test_more_than_30_values_are_shown_in_ten_ranges():
    assert data.histogram("x", np.arange(30)) == ["       x", *(f"{n:8}            1 {'#' * 40}" for n in range(30))]
    shown = data.histogram("x", np.array([*range(30), 95, *[300] * 200]))
    counts, bars = [30, 0, 0, 1, 0, 0, 0, 0, 0, 200], [6, 0, 0, 1, 0, 0, 0, 0, 0, 40]
    assert shown[1:] == [f"{30 * n:8}{counts[n]:13} {'#' * bars[n]}" for n in range(10)]


def test_the_toy_log_gives_every_stage_something_to_learn(tmp_path):
    """Of each user's items 10 to 20 are of the two subjects it likes, rated 4 or 5, and up to four are not."""
    done = prepare(tmp_path, data.make_toy_log(tmp_path, 0))
    assert (len(done.users), len(done.items)) == (60, 80)
    ratings, subjects = {True: set(), False: set()}, {item["key"]: item["text"] for item in done.items}
    log = [line.split(",") for line in (tmp_path / "toy.csv").read_text(encoding="utf-8").splitlines()[1:]]
    for user in done.user_keys:
        mine = [(subjects[item], int(rating)) for u, item, rating, _ in log if u == user]
        liked = {subject for subject, _ in Counter(subject for subject, _ in mine).most_common(2)}
        for subject, rating in mine:
            ratings[subject in liked].add(rating)
        n_liked = sum(subject in liked for subject, _ in mine)
        assert 10 <= n_liked <= 20 and len(mine) - n_liked <= 4
    assert ratings == {True: {4, 5}, False: {2, 3, 4}}
    again = tmp_path / "again"
    again.mkdir()
    data.make_toy_log(again, 0)
    assert (again / "toy.csv").read_bytes() == (tmp_path / "toy.csv").read_bytes()


@pytest.mark.parametrize(
    ("ratios", "parts"),
    [
        ((0, 0), [0] * 5),
        ((0.4, 0), [0, 0, 0, 1, 1]),
        ((0, 0.4), [0, 0, 0, 2, 2]),
        ((0, 0.1), [0, 2]),
        ((0.3, 0.2), [0, 0, 0, 0, 1, 1, 2]),  # 7 - 1.4 - 2.1 is 3.5, a little less in floating point
    ],
)
def test_a_split_by_time_halves_rounded_up_and_a_ratio_of_0_leaves_its_part_empty(ratios, parts):
    keys, number = pl.Series(list("abcdefg")), np.arange(len(parts), dtype=np.int32)
    log = data.Log(keys[:1], keys, 0 * number, number, 0 * number, time=number.astype(float), unit="order")
    assert data.split(log, "time", ratios, (None, None), np.random.default_rng(0)).tolist() == parts


@pytest.mark.parametrize(
    ("knobs", "names"),
    [
        ({}, []),
        ({"interactions": "a", "items": "b", "valid_file": "c", "test_file": "d"}, ["a", "b", "c", "d"]),
        ({"profiles": "llm"}, []),
        ({"profiles": "llm", "profile_model": "m"}, ["m"]),
        ({"profiles": "template", "profile_model": "m"}, []),
        ({"profiles": "llm", "profile_model": "m", "endpoint": "http://127.0.0.1:8000/v1"}, []),
    ],
)
def test_the_files_that_go_into_prep_are_named(knobs, names):
    command = load_stage("prep")
    assert command.files(command.config(**knobs)) == names


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"valid_ratio": 0.9, "test_ratio": 0.9}, "valid_ratio 0.9 and test_ratio 0.9 are more than 1 together"),
        ({"published": (1, 2)}, "published 1,2: three positive numbers are wanted"),
        ({"published": (0, 0, 0)}, "published 0,0,0: three positive numbers are wanted"),
        ({"published": (1, 2, 0)}, "published 1,2,0: three positive numbers are wanted"),
        ({"endpoint": ""}, "endpoint '' is no address; write one like http://127.0.0.1:8000/v1"),
        ({"endpoint": "localhost:8000/v1"}, "endpoint 'localhost:8000/v1' is no address"),
    ],
)
def test_knobs_that_cannot_be_are_refused_before_anything_runs(knobs, sentence):
    load_stage("prep").config(valid_ratio=0.5, test_ratio=0.5, published=(1, 1, 1))  # at the bounds
    with pytest.raises(UserError, match=sentence):
        load_stage("prep").config(**knobs)


def test_a_window_that_holds_nothing_is_refused_with_the_counts(tmp_path):
    with pytest.raises(UserError, match=r"1-core is empty \(0 rows, .* left: 0\); widen .*before date_from: 1"):
        prepare(tmp_path, rows("u,i,5,1500000000"), date_from="2020-01-01")


def test_items_written_otherwise_than_in_the_log_are_refused(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,title\n1,Tea\n2,Cup\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"items.csv tells of no item of the log: .*'item_id'.*'1.0'.*--item-columns"):
        prepare(tmp_path, rows("u,1.0,5,1500000000", "u,2.0,5,1500000001"), items=str(tmp_path / "items.csv"))


def test_the_page_on_own_data_does_what_it_says(tmp_path):
    page = (ROOT / "stages" / "DATA.md").read_text(encoding="utf-8")
    log, items = re.findall(r"```\n(\w+_id,.*?)```", page, re.S)
    (tmp_path / "items.csv").write_text(items, encoding="utf-8")
    done = prepare(tmp_path, log, items=str(tmp_path / "items.csv"), min_rating=4.0, k_core=2)
    assert (len(done.users), len(done.items), done.counts["pairs"]) == (4, 5, 17)  # 20 rows, three rated below 4
    assert done.counts["items without title"] == 0
    for name in readers.FORMATS:
        assert f"`{name}`" in page
    for aliases in readers.ALIASES.values():
        assert any(alias in re.sub(r"[_]", "", page.lower()) for alias in aliases)
    tables = page.partition("## The log")[2].partition("## What happens")[0]
    for role, names in re.findall(r"^\| `(\w+)`.*? \| (\w[^;|`]*)", tables, re.M):
        if role in readers.ALIASES and names != "as above":
            for name in names.strip().split(", "):
                assert readers._aliases([name], (role,)) == {role: name}
