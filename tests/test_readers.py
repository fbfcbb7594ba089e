"""Every format against counts worked out elsewhere, and every kind of broken file by its sentence."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import shutil
import subprocess
import tarfile
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import HEADER, prepare, rows

from hnlm_ref import data, readers
from hnlm_ref.artifacts import load_jsonl
from hnlm_ref.console import UserError

# ---- real data: users, items, pairs as README of the data sets counts them -----------------------------------------

TOYS, YELP, RAW = "amazon-toys-2014-5core", "yelp-2019-5core-named", "yelp-raw-subset"
REAL = {
    "gift-cards": ("amazon-gift-cards-2018", {}, (458, 148, 2965)),
    "toys": (f"{TOYS}/Toys_and_Games.txt", {}, (19412, 11924, 167597)),
    "toys by ASIN": (f"{TOYS}/user_sequence.txt.gz", {"items": f"{TOYS}/derived/items.tsv.gz"}, (19412, 11924, 167597)),
    "cds lightgcn": ("amazon-cds-lightgcn", {}, (43169, 35648, 604475 + 172951)),
    "games recbole": ("amazon-games-recbole", {"split": "leave-two"}, (50546, 16859, 440264)),
    "games 5-core": ("amazon-games-recbole", {"k_core": 5}, (50335, 16428, 437772)),
    "games 10-core": ("amazon-games-recbole", {"k_core": 10}, (5305, 3168, 84774)),
    "beauty 2023": ("amazon-beauty-2023-5core-ratings/All_Beauty.csv", {}, (253, 356, 2535)),
    "yelp": (f"{YELP}/Yelp.txt.gz", {}, (30431, 20033, 304524)),
    "yelp 5-core": (f"{YELP}/Yelp.txt.gz", {"k_core": 5}, (28330, 18775, 292017)),
    "yelp raw": (f"{RAW}/review_subset.json.gz", {"items": f"{RAW}/item_subset.json"}, (1618, 432, 3969)),
    "ml-latest-small": ("ml-latest-small", {}, (610, 9724, 100836)),
    "filmtrust": ("filmtrust-selfrec/ratings.txt", {}, (1508, 2071, 35494)),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_data_gives_the_published_counts(shared_data, tmp_path, name):
    path, knobs, expected = REAL[name]
    knobs = {k: str(shared_data / v) if k == "items" else v for k, v in knobs.items()}
    counts = prepare(tmp_path, shared_data / path, **knobs).counts
    assert (counts["users"], counts["items"], counts["pairs"]) == expected


def test_cds_with_titles_counts_targets_and_with_the_histories_all_pairs(shared_data, tmp_path):
    files = sorted((shared_data / "amazon-cds-2018-titles").glob("*.csv.gz"))
    texts = [gzip.decompress(file.read_bytes()).decode() for file in files]
    log = tmp_path / "cds.csv"
    log.write_text(texts[0] + texts[1].partition("\n")[2], encoding="utf-8", newline="")
    done = prepare(tmp_path / "run", log, item_columns=("item=item_asin", "title=item_title"))
    assert (done.counts["rows"], done.counts["users"]) == (12313, 2991)
    assert not any("<span" in item["title"] for item in done.items)
    histories = ("history=item_asins", "item=item_asin")
    whole = prepare(tmp_path / "whole", log, columns=histories).counts
    assert (whole["users"], whole["items"], whole["pairs"]) == (2991, 5590, 25682)
    four = prepare(tmp_path / "four", log, columns=histories, k_core=4).counts
    assert (four["users"], four["items"], four["pairs"]) == (2426, 2356, 17085)


def test_columns_of_the_items_are_those_of_the_file_beside_the_log_if_there_is_one(tmp_path):
    (folder := tmp_path / "known").mkdir()
    log = "userId,movieId,rating,timestamp\nu1,i1,5,1420070400\nu1,i2,5,1420070401\n"
    (folder / "ratings.csv").write_text(log, encoding="utf-8")
    (folder / "movies.csv").write_text("movieId,title,name_de\ni1,Heat,Hitze\ni2,Up,Oben\n", encoding="utf-8")
    done = prepare(tmp_path / "run", folder, item_columns=("title=name_de",), test_ratio=0.0)
    assert [item["title"] for item in done.items] == ["Hitze", "Oben"]


def test_a_ready_split_is_checked_for_overlap_and_for_ids_outside(shared_data, tmp_path):
    counts = prepare(tmp_path / "film", shared_data / "filmtrust-selfrec").counts
    assert counts["held-out pairs also in an earlier part"] == 1
    assert counts["rows"] == 33750 + 1747
    lightgcn = prepare(tmp_path / "cds", shared_data / "amazon-cds-lightgcn").counts
    assert (lightgcn["train"], lightgcn["valid"], lightgcn["test"]) == (604475, 0, 172951)


# ---- made-up lines of the true layouts ------------------------------------------------------------------------------

AMAZON = {"reviewerID": "A1", "asin": "B1", "overall": 5.0, "unixReviewTime": 1400000000, "reviewText": "good\nbox"}
NEWER = {"user_id": "A1", "parent_asin": "B1", "asin": "B9", "rating": 4.0, "timestamp": 1588687728923, "text": "ok"}
META = {
    "parent_asin": "B1",
    "title": "Box",
    "store": "Acme",
    "categories": ["Toys", "Boxes"],
    "description": [],
    "features": ["red"],
}
YELP_REVIEW = {"user_id": "A1", "business_id": "B1", "stars": 4, "date": "2016-03-09 00:00:00", "text": "x"}
LAYOUTS = {
    "amazon-2018": (json.dumps(AMAZON), "s", "A1", "B1"),
    "amazon-2018 of 2014": (str(AMAZON), "s", "A1", "B1"),
    "amazon-2023": (json.dumps(NEWER), "ms", "A1", "B1"),
    "amazon-2023-ratings": ("user_id,parent_asin,rating,timestamp\nA1,B1,5.0,1588687728923", "ms", "A1", "B1"),
    "amazon-2018-ratings": ("B000000001,A1000000001,5.0,1400000000", "s", "A1000000001", "B000000001"),
    "yelp": (json.dumps(YELP_REVIEW), "date", "A1", "B1"),
    "movielens-100k": ("196\t242\t3\t881250949", "s", "196", "242"),
    "movielens-100k after a mark": ("\ufeff196\t242\t3\t881250949", "s", "196", "242"),
    "movielens-1m": ("1::1193::5::978300760", "s", "1", "1193"),
    "movielens-1m with quotes": ('"1"::1193::5::978300760', "s", '"1"', "1193"),
    "movielens": ("userId,movieId,rating,timestamp\n1,2,3.5,1112486027", "s", "1", "2"),
    "recbole": ("user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t2\t3\t881250949.0", "s", "1", "2"),
    "selfrec": ("1 2 4\n2 1 3.5", None, "1", "2"),
    "sequence": ("u1 x'3 i1 i2\nu2 i1", "order", "u1", "x'3"),
    "sequence with a user of no items": ("u1 i3 i1 i2\nu2\nu3 i1", "order", "u1", "i3"),
    "sequence of like lengths": ("u1 i3 i1 i2 i5\nu2 i1 i4 i3 i2", "order", "u1", "i3"),
    "sequence sorted by number": ("99 9 10\n2 3", None, "99", "9"),
    "sequence sorted as text": ("1 10 9\n2 3", None, "1", "10"),
    "csv with histories": ("user,item_id_list\nu1,i3 i1\nu2,i1", "order", "u1", "i3"),
    "json with histories": ('{"user":"u1","item_id_list":["i3","i1"]}', "order", "u1", "i3"),
    "json of Python literals with histories": ("{'user': 'u1', 'item_id_list': ['ä', 'a']}", "order", "u1", "ä"),
    "tsv with quotes": ('user\titem\n"u ""1"""\ti1', None, 'u "1"', "i1"),
    "tsv with quotes that end within": ('user\titem\nu1\t"Big" box', None, "u1", '"Big" box'),
    "recbole with quotes": ('user_id:token\titem_id:token\nu1\t"i1"', None, "u1", '"i1"'),
    "csv of bars in quotes": ('user|item|text\n"u|1"|i1|"a ""b"""', None, "u|1", "i1"),
    "csv of bars with quotes that end within": ('user|item\nu1|"Big" box', None, "u1", '"Big" box'),
    "csv of semicolons in quotes": ('user;item;at:x\n"u;1";i1;2', None, "u;1", "i1"),
    "csv with commas in quotes": ('"user","item","text","date"\nu,i,"a, b",2015-01-01', "date", "u", "i"),
    "csv of five columns between blanks": ("user item rating time weight\nu1 i1 5 1400000000 2", "s", "u1", "i1"),
    "csv with a carriage return in a field": ("user,item,at\nu1,i1,a\rb", None, "u1", "i1"),
    "csv with two columns of users": ("user_id,userID,item\nu1,u2,i1", None, "u1", "i1"),
    "json with numbers": ('{"user": 7, "item": 10}', None, "7", "10"),
    "json with numbers after a blank": (' {"user": 7, "item": 10}', None, "7", "10"),
    "json of Python literals with numbers": ("{'user': 7, 'item': 10}", None, "7", "10"),
    "json of Python literals with numbers after a mark": ("\ufeff{'user': 7, 'item': 10}", None, "7", "10"),
    "csv after a blank line": ("\n \nuser,item\nu1,i1", None, "u1", "i1"),
    "csv": ("who;item;user\nx;i1;u1", None, "u1", "i1"),
    "tsv": ("user\titem\ttime\nu1\ti1\t2015-01-01", "date", "u1", "i1"),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_format_is_recognised_and_its_first_row_read(tmp_path, name, ending):
    text, unit, user, item = LAYOUTS[name]
    path = tmp_path / "log"
    path.write_text(text.replace("\n", ending or "\n") + ending, encoding="utf-8", newline="")
    layout = readers.sniff(path)
    assert (layout.format, layout.unit) == (name.split(" ")[0], unit)
    assert readers.sniff(path, layout.format).columns == layout.columns
    row = pl.concat(readers.frames(layout, readers.Bad())).row(0, named=True)
    assert (row["user"], row["item"], row["time"] is None) == (user, item, unit is None)


def test_amazon_2023_meta_gives_title_store_categories_and_features(tmp_path):
    (tmp_path / "Toys.jsonl").write_text(json.dumps(NEWER) + "\n", encoding="utf-8")
    (tmp_path / "meta_Toys.jsonl").write_text(json.dumps(META) + "\n", encoding="utf-8")
    done = prepare(tmp_path, tmp_path, review_chars=100)
    assert [(i["key"], i["title"], i["text"]) for i in done.items] == [("B1", "Box", "Acme. Toys, Boxes. red")]
    assert load_jsonl(tmp_path / "reviews.jsonl") == [{"user": 0, "item": 0, "text": "ok"}]


def test_amazon_2014_meta_in_python_literals_with_nested_categories(tmp_path):
    meta = {
        "asin": "B1",
        "title": 'Tom\'s "Box"',
        "categories": [["Toys & Games", "Boxes"]],
        "price": 3.5,
        "description": "Of wood",
    }
    (tmp_path / "meta.json").write_text(f"{meta}\n", encoding="utf-8")
    (tmp_path / "log.json").write_text(f"{AMAZON}\n", encoding="utf-8")
    done = prepare(tmp_path, tmp_path / "log.json", items=str(tmp_path / "meta.json"))
    assert [(i["title"], i["text"]) for i in done.items] == [('Tom\'s "Box"', "Toys & Games, Boxes. Of wood")]


def test_movielens_100k_and_1m_folders_with_their_latin_1_titles(tmp_path):
    title = "Misérables, Les (1995)"
    for folder, files in {
        "100k": {"u.data": "1\t7\t5\t881250949\n", "u.item": f"7|{title}|01-Jan-1995||http://x|0\n"},
        "1m": {"ratings.dat": "1::7::5::978300760\n", "movies.dat": f"7::{title}::Drama|Musical\n"},
    }.items():
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text, encoding="latin-1")
        done = prepare(tmp_path / f"{folder}-run", tmp_path / folder)
        assert (done.items[0]["title"], done.items[0]["text"]) == (title, "" if folder == "100k" else "Drama, Musical")
    with pytest.raises(UserError, match="line 1: byte 0xE9 at place 7 is no UTF-8"):
        prepare(tmp_path / "run", tmp_path / "1m", encoding="UTF-8")
    (tmp_path / "1m" / "movies.dat").write_text(f"7::{title}::Drama\n", encoding="utf-8")
    assert prepare(tmp_path / "run", tmp_path / "1m").items[0]["title"] == title


@pytest.mark.parametrize(
    "files",
    [
        ["toy.csv", "toy_items.csv", "", ""],
        ["x.train.inter", "x.item", "x.valid.inter", "x.test.inter"],
        ["x.train.inter.gz", "", "", "x.test.inter.gz"],
        ["x.inter", "x.item", "", ""],
        ["ratings.csv", "movies.csv", "", ""],
        ["yelp_academic_dataset_review.json", "yelp_academic_dataset_business.json", "", ""],
        ["Toys_5.json.gz", "meta_Toys.json.gz", "", ""],
        ["reviews_Toys_5.json.gz", "meta_Toys.json.gz", "", ""],
        ["trainset.txt", "", "", "testset.txt"],
        ["train.txt", "", "valid.txt", "test.txt"],
    ],
)
def test_a_folder_is_known_by_its_file_names(tmp_path, files):
    for name in filter(None, [*files, "README.md"]):
        (tmp_path / name).touch()
    assert readers.locate(tmp_path) == tuple(tmp_path / name if name else None for name in files)


def test_a_recbole_folder_with_its_three_parts_is_a_ready_split(tmp_path):
    parts = {"train": "1 1,1 2,2 1,3 2", "valid": "1 3,2 2", "test": "1 1,3 1,2 2,4 9"}
    for part, pairs in parts.items():
        lines = pairs.replace(" ", "\t").replace(",", "\n")
        (tmp_path / f"x.{part}.inter").write_text(f"user_id:token\titem_id:token\n{lines}\n", encoding="utf-8")
    done = prepare(tmp_path / "run", tmp_path)
    assert done.pairs("train") == {("1", "1"), ("1", "2"), ("2", "1"), ("3", "2")}
    # item 3 and item 9 are in no training row, nor is user 4; (1, 1) stays in train, (2, 2) in valid
    assert (done.pairs("valid"), done.pairs("test")) == ({("2", "2")}, {("3", "1")})
    assert done.counts["held-out pairs also in an earlier part"] == 2
    assert done.counts["held-out rows of unseen users"] == 1 and done.counts["held-out rows of unseen items"] == 2


def test_the_parts_beside_a_sequence_are_sequences(tmp_path):
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(b"1 2 3\n2 3 4 5\n"))
    (tmp_path / "test.txt").write_text("1 5 4\n2 2 9\n", encoding="utf-8")
    done = prepare(tmp_path / "run", tmp_path)
    assert done.pairs("test") == {("1", "4"), ("1", "5"), ("2", "2")} and done.counts["rows"] == 9
    assert done.counts["format"] == "sequence, gzip, separator blanks, utf-8, user item item ..."
    # Places in two files cannot be compared; no other split is made, so none in time is refused.
    ordered = prepare(tmp_path / "run", tmp_path, time_unit="order", split="time").counts
    assert "held-out rows older than their user's last training row" not in ordered


def test_a_part_without_rows_is_refused_with_its_own_first_line(tmp_path):
    (tmp_path / "test.csv").write_text(rows("u1,,5,1420070400"), encoding="utf-8")
    sentence = "test.csv holds no rows that can be read, line 2: no item; it was read as csv"
    with pytest.raises(UserError, match=sentence):
        prepare(tmp_path, rows(ONE, "u1,i2,x,1420070400"), test_file=str(tmp_path / "test.csv"), skip_bad_rows=True)


def test_parquet_with_ids_in_bytes_and_whole_number_ids_and_datetimes(tmp_path):
    pl.DataFrame({"user": [b"\xc3\xa4"], "item": [b"7"], "title": [b"\xc3\xa4"]}).write_parquet(
        tmp_path / "log.parquet"
    )
    done = prepare(tmp_path / "run", tmp_path / "log.parquet", item_columns=("item=item",))
    assert done.pairs() == {("ä", "7")} and done.items[0]["title"] == "ä"
    as_category = pl.Series(["4.1", "5"], dtype=pl.Categorical)  # pandas' own, too
    for ratings in ([b"4.1", b" 5"], as_category, pl.Series([4.1, 5], dtype=pl.Float32)):
        pl.DataFrame({"user": ["u", "v"], "item": [b"7", b"8"], "rating": ratings}).write_parquet(tmp_path / "log")
        found = pl.concat(readers.frames(readers.sniff(tmp_path / "log"), readers.Bad()))
        assert found.select("item", "rating").rows() == [("7", 4.1), ("8", 5.0)]
    times = pl.Series(["2015-01-01 00:00:01", None, "2015-01-01"]).str.to_datetime(strict=False)
    frame = pl.DataFrame({"user": [10, 9, 10], "item": [7, 7, 8], "rating": [5.0, 4.0, 1.0], "time": times})
    frame.write_parquet(tmp_path / "log.parquet", row_group_size=1)
    with pytest.raises(UserError, match="line 2: no time"):
        prepare(tmp_path / "run", tmp_path / "log.parquet")
    for day in (pl.date(2015, 1, 1), pl.datetime(2015, 1, 1), pl.datetime(2015, 1, 1, 1, time_zone="Europe/Berlin")):
        frame.with_columns(time=day).write_parquet(tmp_path / "log.parquet")
        layout = readers.sniff(tmp_path / "log.parquet")
        assert pl.concat(readers.frames(layout, readers.Bad()))["time"].to_list() == [1420070400.0] * 3

    frame.with_columns(time=pl.lit(1420070401)).write_parquet(tmp_path / "log.parquet")
    done = prepare(tmp_path / "run", tmp_path / "log.parquet", min_rating=4)
    assert done.pairs() == {("10", "7"), ("9", "7")} and done.user_keys == ["10", "9"]


def test_parquet_with_lists_of_items_and_of_texts(tmp_path):
    pl.DataFrame({"user": ["v"], "item_id_list": [b"1 2"]}).write_parquet(tmp_path / "log")  # a text, held as bytes
    assert prepare(tmp_path / "run", tmp_path / "log").pairs() == {("v", "1"), ("v", "2")}
    pl.DataFrame({"user": ["v", "u"], "item_id_list": [["ä", "2"], ["3"]]}).write_parquet(tmp_path / "log")
    items = pl.DataFrame({"item": ["ä"], "title": [["T", 'U "1"']], "categories": [[["A", "B"]]]})
    items.write_parquet(tmp_path / "items")
    done = prepare(tmp_path / "run", tmp_path / "log", items=str(tmp_path / "items"))
    assert done.pairs() == {("v", "ä"), ("v", "2"), ("u", "3")} and not done.counts["rows with blanks around an id"]
    assert (done.items[2]["title"], done.items[2]["text"]) == ('T, U "1"', "A, B")


def test_nan_is_a_missing_value_in_json_and_parquet_and_a_text_in_quotes(tmp_path):
    """Cases A04, A05: Python's json and pandas write it where there is nothing."""
    log = '{"user": "u", "item": "a"}\n{"user": "NaN", "item": "b"}\n'
    items = [{"item": "a", "title": float("nan"), "brand": float("nan")}, {"item": "b", "title": "NaN", "brand": 1.5}]
    items[0]["categories"] = ["x", float("nan")]
    (tmp_path / "items").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    (tmp_path / "log.json").write_text(log, encoding="utf-8")
    done = prepare(tmp_path / "run", tmp_path / "log.json", items=str(tmp_path / "items"))
    assert [(i["key"], i["title"], i["text"]) for i in done.items] == [("a", "", "x"), ("b", "NaN", "1.5")]
    assert done.user_keys == ["NaN", "u"] and done.counts["items without title"] == 1
    pl.DataFrame({"item": ["a", "b"], "brand": [float("nan"), 1.5]}).write_parquet(tmp_path / "items")
    done = prepare(tmp_path / "run", tmp_path / "log.json", items=str(tmp_path / "items"))
    assert [i["text"] for i in done.items] == ["", "1.5"]
    (tmp_path / "log.json").write_text(log + '{"user": NaN, "item": "c"}\n', encoding="utf-8")
    pl.DataFrame({"user": [1.0, 2.0, float("nan")], "item": ["a"] * 3}).write_parquet(tmp_path / "log.parquet")
    for name in ("log.json", "log.parquet"):
        with pytest.raises(UserError, match="line 3: no user"):
            prepare(tmp_path / "run", tmp_path / name)


@pytest.mark.parametrize("bad", ["", '\n{"user": 9, "item": 9, "rating": "x"}\n'], ids=["as a block", "row by row"])
def test_a_whole_number_held_as_a_float_is_the_id_of_the_whole_number(tmp_path, bad):
    """pandas writes floats where a column has a gap; what stands in quotes is a text as it is."""
    log = '{"user": 1e17, "item": 3.0, "rating": 5.0}\n{"user": "7.0", "item": 3, "rating": 4.5}' + bad
    (tmp_path / "log.json").write_text(log, encoding="utf-8")
    pl.DataFrame({"user": [7.0, 8.0], "item": [3.0, 3.0]}).write_parquet(tmp_path / "log.parquet")
    for name, users, ratings in (
        ("log.json", ["1" + 17 * "0", "7.0"], [5.0, 4.5]),
        ("log.parquet", ["7", "8"], [None, None]),
    ):
        found = pl.concat(readers.frames(readers.sniff(tmp_path / name), readers.Bad(skip=True)))
        assert found.select("user", "item", "rating").to_dict(as_series=False) == {
            "user": users,
            "item": ["3", "3"],
            "rating": ratings,
        }
    pl.DataFrame({"item": [3.0], "price": [1.5], "categories": [["A"]]}).write_parquet(tmp_path / "items.parquet")
    layout = readers.sniff(tmp_path / "items.parquet", roles=readers.ITEM_ROLES)
    assert pl.concat(readers.frames(layout, readers.Bad())).rows() == [("3", '["A"]')]


@pytest.mark.parametrize(
    "text",
    [
        '{"user": "u", "item_id_list": [" a b ", null, " ", "it\\u0027s"], "item": "d e"}\n',
        'user,item_id_list,item\nu,"[\'a b\', ""it\'s""]",d e\n',
        'user,item_id_list,item\nu,"[\'a b\' ""it\'s""]",d e\n',
    ],
    ids=["json", "python", "numpy"],
)
def test_items_of_a_list_keep_their_blanks(tmp_path, text):
    (tmp_path / "log").write_text(text, encoding="utf-8")
    found = pl.concat(readers.frames(readers.sniff(tmp_path / "log"), readers.Bad()))
    assert found["item"].to_list() == ["a b", "it's", "d e"]


def test_a_column_and_a_quote_far_down_in_the_beginning_and_behind_it_are_seen(tmp_path, monkeypatch):
    rows = [json.dumps({"item": n}) for n in range(300)]
    (tmp_path / "items").write_text("\n".join([*rows, '{"item": "i", "title": "T"}']), encoding="utf-8")
    assert "title" in readers.sniff(tmp_path / "items", roles=readers.ITEM_ROLES).columns
    monkeypatch.setattr(readers, "HEAD", 16)
    monkeypatch.setattr(readers, "BLOCK", 63)  # the line with the quotes lies whole in a later block
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "log").write_text("user\titem\nu\ta\n" * 9 + 'u\t"12"" disc"\n', encoding=encoding)
        found = pl.concat(readers.frames(readers.sniff(tmp_path / "log"), readers.Bad()))
        assert found["item"][-1] == '12" disc'


@pytest.mark.parametrize("sep", ["||", "§", "\t\t", "::"])
def test_a_separator_may_have_several_bytes(tmp_path, sep):
    (tmp_path / "log").write_text(f"u{sep}a{sep}5\nv{sep}b{sep} 4\n", encoding="utf-8")
    found = pl.concat(readers.frames(readers.sniff(tmp_path / "log", sep=sep, header=False), readers.Bad()))
    assert found.select("user", "item", "rating").rows() == [("u", "a", 5.0), ("v", "b", 4.0)]


def test_a_row_of_empty_fields_is_no_blank_line(tmp_path):
    (tmp_path / "log.csv").write_text("user,item,time\nu,a,1\n \n,,\nv,b,2\n\n", encoding="utf-8")
    with pytest.raises(UserError, match="csv: line 4: no user"):
        list(readers.frames(readers.sniff(tmp_path / "log.csv"), readers.Bad()))


@pytest.mark.parametrize("size", [20, 64, 1 << 20])
def test_a_lone_quote_within_a_field_leaves_the_others_as_they_are(tmp_path, monkeypatch, size):
    """One at the end of a field looks like a closing one; Python's csv says what is right."""
    some = 'u,a,12" disc\nu,b,"two\nlines"\nu,c,5"\nu,d,"a ""b"", c\n"\nu,e,""\n'
    text = "user,item,text\n" + 40 * some
    (tmp_path / "log.csv").write_text(text, encoding="utf-8")
    layout, bad = readers.sniff(tmp_path / "log.csv"), readers.Bad()
    monkeypatch.setattr(readers, "BLOCK", size)
    found = pl.concat(readers.frames(layout, bad, text=True))
    expected = list(csv.reader(io.StringIO(text)))[1:]
    assert [list(row) for row in found.select("user", "item", pl.col("text").fill_null("")).rows()] == expected
    assert len(list(readers._blocks(layout, {}))) > (len(text) // 100 if size < 100 else 0)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.sampled_from(["a", '"x"', '"x\ny"', '"p ""q"" r\nz"', '5"', 'a"b', '""', '"a, b"', '"\n""\n"', "\n"])),
    st.integers(0, 40),
)
def test_the_quote_that_is_open_at_the_end_is_found_as_one_walks(fields, lost):
    data = ",".join(fields).encode()
    data = data[: len(data) - lost].rstrip(b'"')  # whether one at the very end closes a field is not known yet
    opened, at, begins = None, 0, True
    while at < len(data):
        letter, begun = data[at : at + 1], begins
        begins = opened is None and letter in b",\n"
        if letter == b'"' and opened is not None:
            if data[at + 1 : at + 2] == b'"':
                at += 1
            else:
                opened = None
        elif letter == b'"' and begun:
            opened = at
        at += 1
    assert readers._closed(data, ",") == (len(data) if opened is None else opened)


def test_a_spreadsheet_export_in_utf_16_and_quoted_line_breaks(tmp_path):
    text = 'user,item,text\nu1,i1,"two\nlines, ""quoted"""\nu2,i2,5" pipe\n'
    for content in (text.encode("utf-16"), ("\ufeff" + text).encode("utf-16-be")):
        (tmp_path / "log.csv").write_bytes(content)
        done = prepare(tmp_path / "run", tmp_path / "log.csv", review_chars=50)
        assert done.pairs() == {("u1", "i1"), ("u2", "i2")}
    texts = [r["text"] for r in load_jsonl(tmp_path / "run" / "reviews.jsonl")]
    assert texts == ['two\nlines, "quoted"', '5" pipe']


def test_half_a_character_is_replaced_and_two_halves_are_joined(tmp_path):
    """In JSON, where Polars would read NUL, in a Python literal, and in a list within a CSV field."""
    (tmp_path / "log.json").write_text(r'{"user": "u\ud83d", "item": "i1"}' "\n" '{"user": "v", "item": "i2"}', "utf-8")
    for items in (
        r'{"item": "i1", "title": ["T \ud83d"]}' + "\n" + r'{"item": "i2", "title": "\ud83d\ude00"}',
        r'{"item": "i1", "title": "T \udc3d"}' + "\n" + r"{'item': 'i2', 'title': '\ud83d\ude00'}",
        'item,title\ni1,"[""T \\udc3d""]"\ni2,"[""\\ud83d\\ude00""]"',
    ):
        (tmp_path / "items").write_text(items, encoding="utf-8")
        done = prepare(tmp_path / "run", tmp_path / "log.json", items=str(tmp_path / "items"))
        assert done.pairs() == {("u\ufffd", "i1"), ("v", "i2")}
        assert [item["title"] for item in done.items] == ["T \ufffd", "\U0001f600"]


def test_dates_of_every_form_are_utc_seconds(tmp_path):
    """2015-01-01T00:00:00Z is 1420070400; two hours are 7200 s."""
    dates = {
        "2015-01-01": 1420070400.0,
        "01 1, 2015": 1420070400.0,
        "2015-01-01 00:00:01.5": 1420070401.5,
        "2015-01-01T00:00:01": 1420070401.0,
        "2015-01-01T00:00:00Z": 1420070400.0,
        "2015-01-01T00:00:00+00:00": 1420070400.0,
        "2015-01-01T00:00:00.25+02:00": 1420070400.25 - 7200,
        "2015-01-01 00:00:00-02:00": 1420070400.0 + 7200,
    }
    (tmp_path / "log").write_text("user\titem\ttime\n" + "".join(f"u\ti\t{d}\n" for d in dates), encoding="utf-8")
    found = pl.concat(readers.frames(readers.sniff(tmp_path / "log"), readers.Bad()))
    assert found["time"].to_list() == list(dates.values())


def test_a_file_is_looked_at_in_whole_lines(tmp_path, monkeypatch):
    """Half of 11 would be an item out of order."""
    (tmp_path / "log").write_text("1 9\n2 9 10\n3 9 10 11\n", encoding="utf-8")
    monkeypatch.setattr(readers, "HEAD", len("1 9\n2 9 10\n3 9 10 1"))
    assert (readers.sniff(tmp_path / "log").format, readers.sniff(tmp_path / "log").unit) == ("sequence", None)
    assert readers.sniff(tmp_path / "log", time_unit="order").unit == "order"
    monkeypatch.setattr(readers, "HEAD", 3)
    for text in ("user,item\nu,i\n", "user,item"):
        (tmp_path / "log").write_text(text, encoding="utf-8")
        assert readers.sniff(tmp_path / "log").columns == {"user": "user", "item": "item"}


def test_a_log_of_no_known_format_and_without_names_is_user_item_rating_time(tmp_path):
    for text in ("1 2 5 1400000000\n", "1|2|5|1400000000\n", "1,2,5,1400000000\n"):
        (tmp_path / "log").write_text(text, encoding="utf-8")
        layout = readers.sniff(tmp_path / "log")
        assert layout.columns == {"user": "1", "item": "2", "rating": "3", "time": "4"} and layout.unit == "s"
    named = readers.sniff(tmp_path / "log", "amazon-2018-ratings")  # its ids tell the format, if they are Amazon's
    assert named.columns == {"item": "1", "user": "2", "rating": "3", "time": "4"}
    (tmp_path / "log").write_text("{u},{i}\n", encoding="utf-8")  # no JSON if a separator or a format is named
    for named in ({"sep": ","}, {"name": "csv"}):
        assert readers.sniff(tmp_path / "log", header=False, **named).columns == {"user": "1", "item": "2"}
    placed = readers.sniff(tmp_path / "log", sep=",", header=False, columns=("item=1", "user=2"))
    assert placed.columns == {"user": "2", "item": "1"}


@pytest.mark.parametrize("sep", [",", "\t", ";"])
def test_a_header_is_one_if_the_format_has_one_and_its_names_may_stand_in_quotes(tmp_path, sep):
    """As R writes them; pandas calls columns without names 0, 1, 2."""
    for names in (('"who"', '"what"', '"when"'), ("0", "1", "2")):
        (tmp_path / "log").write_text(f"{sep.join(names)}\nu{sep}i{sep}1420070400\n", encoding="utf-8")
        columns = [f"{role}=" + name.strip('"') for role, name in zip(("user", "item", "time"), names, strict=True)]
        layout = readers.sniff(tmp_path / "log", "csv", sep=sep, columns=columns)
        found = pl.concat(readers.frames(layout, readers.Bad())).select("user", "item", "time")
        assert found.rows() == [("u", "i", 1420070400.0)] and layout.unit == "s"


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        (["0"], "order"), (["99999999"], "order"), (["100000000"], "s"), (["-99999999999"], "s"),
        (["100000000000"], "ms"), (["99999999999999"], "ms"), (["1e14"], "us"), (["9.9e16"], "us"), (["1e17"], "ns"),
        (["soon", "1e400", " 1500000000.5 "], "s"), (["", "2015-01-01"], "date"), (["soon"], None),
    ],
)  # fmt: skip
def test_the_first_time_that_can_be_read_tells_the_unit(tmp_path, times, unit):
    (tmp_path / "log").write_text("user\titem\ttime\n" + "".join(f"u\ti\t{t}\n" for t in times), encoding="utf-8")
    assert readers.sniff(tmp_path / "log").unit == unit
    assert readers.sniff(tmp_path / "log", time_unit="us").unit == "us"
    found = pl.concat(readers.frames(readers.sniff(tmp_path / "log"), readers.Bad(skip=True)))
    assert len(found) == (unit is not None)  # before 1970 as well


@pytest.mark.parametrize(
    "text",
    [
        "u a b c\nv d\n",
        "user\titem_id_list\titem_id\nu\ta b\tc\nv\t\td\n",
        "user,item_id_list,item\nu,\"['a', 'b']\",c\nv,[],d\n",
        'user,item_id_list\nu,"[""a"",""b"",""c""]"\nv,[d]\n',
        '{"user":"u","item_id_list":["a","b"],"item":"c"}\n{"user":"v","item_id_list":null,"item":"d"}\n',
    ],
)
def test_a_history_is_its_list_then_its_target_and_numbered_through_all_blocks(tmp_path, monkeypatch, text):
    (tmp_path / "log").write_text(text, encoding="utf-8")
    layout = readers.sniff(tmp_path / "log", time_unit="order")
    for block in (readers.BLOCK, 8):
        monkeypatch.setattr(readers, "BLOCK", block)
        found = pl.concat(readers.frames(layout, readers.Bad())).select("user", "item", "time")
        assert found.rows() == [("u", "a", 0.0), ("u", "b", 1.0), ("u", "c", 2.0), ("v", "d", 3.0)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_blocks_cut_inside_a_quoted_field_are_put_together_again(tmp_path, monkeypatch, encoding):
    """Each record has two lines, after one of names: the row without item stands in line 602."""
    text = "user,item,text\n" + "".join(f'u{n},é{n},"a\nb, ""c"" {"d" * (n % 7)}"\n' for n in range(300)) + "u,,x\n"
    (tmp_path / "log.csv").write_text(text, encoding=encoding)
    monkeypatch.setattr(readers, "BLOCK", 63)
    bad = readers.Bad(skip=True)
    found = pl.concat(readers.frames(readers.sniff(tmp_path / "log.csv"), bad, text=True))
    assert found["user"].to_list() == [f"u{n}" for n in range(300)]
    assert (found["item"][13], found["text"][13]) == ("é13", 'a\nb, "c" dddddd')
    assert bad.rows == [{"file": "log.csv", "line": 602, "why": "no item"}]


ROWS = [
    "u,i,5,t",
    "u,i,x,t",
    '"a\nb",i,4,t',
    '"p ""q""",i,3,t',
    "",
    ",i,5,t",
    'u"v,i,5,t',
    "u,i,5,t,z",
    "u\0,i,5,t",
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(ROWS), min_size=1, max_size=60), st.sampled_from(["csv", "json"]))
def test_rows_are_the_same_read_one_by_one_and_in_a_block_with_wrong_ones(tmp_path, monkeypatch, rows, kind):
    head = ["user,item,rating,text", "u,i,5,t"]
    if kind == "json":  # the same rows, some of them no JSON
        told = [f'{{"user": "{r[:2]}", "item": "i", "rating": {r[-3:-2] or 1}, "text": "t"}}' for r in [*head, *rows]]
        head, rows = told[1:2], told[2:]
    text = "\n".join([*head, *rows, ""])
    (tmp_path / f"log.{kind}").write_text(text, encoding="utf-8")
    layout, found = readers.sniff(tmp_path / f"log.{kind}", kind), []
    for size in (1 << 20, 1):
        monkeypatch.setattr(readers, "BLOCK", size)
        bad = readers.Bad(skip=True)
        found.append(([frame.rows() for frame in readers.frames(layout, bad, text=True)], bad.rows))
    assert list(itertools.chain(*found[0][0])) == list(itertools.chain(*found[1][0]))
    assert found[0][1] == found[1][1]


# ---- broken files -------------------------------------------------------------------------------------------------

ONE = "u1,i1,5,1420070400"
BROKEN = {
    "empty": (b"", r"log is empty"),
    "blank": (b"\n \n", r"log is empty"),
    "only a header": (HEADER.encode(), r"holds no rows"),
    "missing column": (b"user_id,rating\nu1,5\n", r"no column for item among the 2 found \('user_id, rating'\)"),
    "header twice": (b"user_id,item_id,rating,rating\nu1,i1,5,5\n", r"line 1: the header names column 'rating' twice"),
    "quote never closed": (f'{HEADER}{ONE}\n"u2,i2,5,1420070400\n{ONE}\n'.encode(), r"line 3: a quote is not closed"),
    "NUL": (f"{HEADER}{ONE}\nu\0,i2,5,1420070400\n".encode(), r"line 3: it holds a NUL byte"),
    "NUL in a sequence": (b"u1 i1 i2\nu2 i\x00\n", r"line 2: it holds a NUL byte"),
    "not UTF-8": (f"{HEADER}{ONE}\n".encode() + b"\xe9,i1,5,1420070400\n", r"line 3: byte 0xE9 at place 1 .*latin-1"),
    "too many fields": (f"{HEADER}{ONE}\n{ONE},x\n".encode(), r"line 3: 5 fields where 4 are named"),
    "too few fields": (f"{HEADER}{ONE}\nu2,i2\n".encode(), r"line 3: no (rating|time)"),
    "no user": (f"{HEADER}{ONE}\n ,i2,5,1420070400\n".encode(), r"line 3: no user"),
    "history of no user": (b"user,item_id_list\nu1,i1 i2\n,i3\n", r"line 3: no user"),
    "no item": (f"{HEADER}{ONE}\nu2, ,5,1420070400\n".encode(), r"line 3: no item"),
    "mixed types": (f"{HEADER}{ONE}\nu2,i2,good,1420070400\n".encode(), r"line 3: rating 'good' is no number"),
    "many": (HEADER.encode() + b"u,i,x,1\n" * 12, r"10: .* number; line 11: rating 'x' is no number and 2 more; mend"),
    "after blank lines": (b"\n\nuser,item,rating\nu,i,5\nu,i,x\n", r"line 5: rating 'x' is no number"),
    "ten": (HEADER.encode() + b"u,i,x,1\n" * 10, r"line 11: rating 'x' is no number; mend"),
    "long rating": (f"{HEADER}{ONE}\nu2,i2,{'x' * 99},1\n".encode(), r"line 3: rating 'x{80}' is no number"),
    "blanks": (b"u1  i1 5\nu2 i2  five\n", r"line 2: rating 'five' is no number"),
    "NaN": (f"{HEADER}{ONE}\nu2,i2,nan,1420070400\n".encode(), r"line 3: rating 'nan' is no number"),
    "another date": (f"{HEADER}u,i,5,31/01/2015\n".encode(), r"time '31/01/2015' is no number or date like 2015-01-31"),
    "mixed dates": (f"{HEADER}u1,i1,5,2015-01-01\n{ONE}\n".encode(), r"line 3: time '1420070400' is no date"),
    "mixed units": (f"{HEADER}{ONE}\nu2,i2,5,1451606399000\n".encode(), r"line 3: time 1451606399000 cannot be in s"),
    "broken JSON": (b'{"user": "u", "item": "i"}\n{"user": \n', r"line 2: it is no JSON object"),
    "no JSON value": (b"{'user': 'u', 'item': {1}}\n", r"line 1: Object of type set is not JSON"),
    "JSON over several lines": (b'{\r\n  "user": "u",\r\n  "item": "i"\r\n}\r\n', r"is one JSON value"),
    "JSON list": (b'[{"user": "u"}]', r"is one JSON value"),
    "line breaks in a field": (f'{HEADER}"u\n1",i1,5,1\n\nu2,i2,x,1\n'.encode(), r"log: line 5: rating 'x' is no n"),
    "gzip cut short": (gzip.compress((HEADER + f"{ONE}\n" * 9999).encode())[:-20], r"gzip file is cut short"),
    "gzip with a wrong checksum": (gzip.compress(f"{HEADER}{ONE}\n".encode())[:-8] + bytes(8), r"damaged \(CRC check"),
    "gzip damaged": (gzip.compress(HEADER.encode())[:10] + b"\xff" * 20, r"cut short or damaged \(Error -3"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_sentence_with_its_line(tmp_path, name):
    content, sentence = BROKEN[name]
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        prepare(tmp_path / "run", tmp_path / "log")
    assert "\n" not in caught.value.message and str(tmp_path / "log") in caught.value.message
    assert list((tmp_path / "run").iterdir()) == []


def test_bad_rows_are_skipped_counted_and_listed_when_asked_for(tmp_path):
    lines = [
        ONE,
        '"u2,i2,5,1420070400',
        "u3,i3,x,1420070400",
        "u4,i4,5,1420070400",
        "u5,i5,5,1420070400,6",
        "u6,i6,,1420070400",
    ]
    done = prepare(tmp_path, rows(*lines), skip_bad_rows=True)
    assert done.pairs() == {("u1", "i1"), ("u4", "i4")} and done.counts["bad rows skipped"] == 4
    listed = load_jsonl(tmp_path / "skipped.jsonl")
    assert [(row["file"], row["line"]) for row in listed] == [("log.csv", n) for n in (3, 4, 6, 7)]


@pytest.mark.parametrize("bad", ["", "u3 i\0 5 1420070400\n"], ids=["as a block", "row by row"])
def test_a_no_break_space_is_a_part_of_an_id(tmp_path, bad):
    text = f"user_id item_id rating timestamp\nu1 a\u00a0b 5 1420070400\nu2  i2\t4 1420070400\n{bad}"
    done = prepare(tmp_path, text, skip_bad_rows=True)
    assert done.pairs() == {("u1", "a\u00a0b"), ("u2", "i2")} and done.counts["bad rows skipped"] == bool(bad)


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"format": "amazon-2015"}, r"no format 'amazon-2015'; did you mean 'amazon-2014|no format .*did you mean"),
        ({"columns": ("user=who",)}, r"no column 'who' for user; it has user_id, item_id, rating, timestamp"),
        ({"columns": ("usr=user_id",)}, r"write role=column; did you mean 'user'"),
        ({"columns": ("user=item_id",)}, r"'item_id' stands for item and user; drop one"),
        ({"encoding": "latin-99"}, r"unknown encoding: latin-99"),
        ({"encoding": "hex"}, r"log.csv: --encoding hex: .hex. is not a text encoding; .*; name another"),
        ({"encoding": "utf-16"}, r"log.csv: --encoding utf-16: UTF-16 stream does not start with BOM; name another"),
        ({"encoding": "cp1252"}, r"after line 1: .*can't decode byte 0x81 .*; name another --encoding"),
        ({"valid_file": "/dev/null"}, r"--valid-file /dev/null needs --test-file"),
        ({"items": "."}, r"\.: a folder, not a file"),
        ({"items": "~nobodyx/a.csv"}, r"^~nobodyx/a.csv: no such file"),
        ({"date_from": "yesterday"}, r"'yesterday' cannot be compared"),
        ({"date_to": ""}, r"'' cannot be compared"),
        (
            {"date_from": "2015-01", "time_unit": "order"},
            r"'2015-01' .* log; it has no dates \(unit of its times: order\)",
        ),
        ({"date_from": "5", "columns": ("time=",)}, r"'5' cannot be compared .* no dates \(unit of its times: None\)"),
        ({"date_from": "2015-01-31T10:00+02:00"}, r"cannot be compared .*; write a date like 2015-01-31"),
        ({"date_to": "nan"}, r"'nan' cannot be compared"),
        ({"split": "leave-one", "columns": ("time=",)}, r"--split leave-one needs times"),
        ({"split": "leave-two", "columns": ("time=",)}, r"--split leave-two needs times"),
        ({"split": "time", "columns": ("time=",)}, r"--split time needs times"),
        (
            {"split": "time", "valid_from": "2016", "test_from": "2015"},
            r"valid_from 2016 is not before the test begins",
        ),
        (
            {"split": "time", "valid_from": "2016", "test_from": "2016"},
            r"valid_from 2016 is not before the test begins",
        ),
        ({"item_columns": ("item=",)}, r"no column for item among the 4 found .*; try --item-columns item=NAME$"),
        ({"items": "nowhere.csv"}, r"nowhere.csv: no such file"),
        ({"sep": "\\t"}, r"no column for user and item among the 1 found .*try --sep ','"),
    ],
)
def test_a_wrong_knob_is_one_sentence(tmp_path, knobs, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare(tmp_path, rows(ONE, "\u0141,i1,5,1420070400"), **knobs)


def test_a_folder_in_place_of_a_file_and_a_file_that_is_not_there(tmp_path):
    for name in ("README.md", "train.txt", "valid.txt", ""):  # of a ready split the test part is wanted
        with pytest.raises(UserError, match="a folder in which no known log is found"):
            prepare(tmp_path / "run", tmp_path)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="no such file"):
        prepare(tmp_path / "run", tmp_path / "nothing.csv")
    with pytest.raises(UserError, match="/dev/null: no ordinary file"):
        prepare(tmp_path / "run", Path(os.devnull))


def test_big_things_are_no_trouble(tmp_path):
    """10 MB on one line, an item text of 1 MB, a user with 100,000 rows."""
    log = [json.dumps({"user": "u0", "item": "i0", "text": "x" * 10_000_000})]
    log += [json.dumps({"user": "u", "item": f"i{n}"}) for n in range(100_000)]
    (tmp_path / "log.json").write_text("\n".join(log), encoding="utf-8")
    (tmp_path / "items.csv").write_text(
        f"item,title,description\ni2,U,{'x' * 150_000}\ni1,T,{'word ' * 200_000}\n", encoding="utf-8"
    )
    done = prepare(tmp_path / "run", tmp_path / "log.json", items=str(tmp_path / "items.csv"))
    assert done.counts["pairs"] == 100_001 and done.counts["texts cut"] == 2
    assert done.csr["train"].degrees().max() == 70_000


def test_a_full_disk_and_a_folder_that_cannot_be_written_leave_nothing(cli, tmp_path):
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("mounting a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        log = tmp_path / "log.csv"
        log.write_text("user,item\n" + "".join(f"user{n},item{n}\n" for n in range(5000)), encoding="utf-8")
        done = cli("prep", "--interactions", log, "--run-dir", disk / "run")
        assert done.returncode == 1 and "No space left on device" in done.stderr and "Traceback" not in done.stderr
        assert not [path for path in disk.rglob("*") if path.is_file()]
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        done = cli("prep", "--interactions", log, "--run-dir", disk / "run")
        assert done.returncode == 1 and "Read-only file system" in done.stderr and "Traceback" not in done.stderr
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_parquet_file_without_rows_or_cut_short_and_a_zip_archive_are_refused(tmp_path):
    pl.DataFrame(schema={"user": pl.String, "item": pl.String}).write_parquet(tmp_path / "log")
    with pytest.raises(UserError, match="log holds no rows; it was read as parquet, utf-8, user=user item=item"):
        prepare(tmp_path / "run", tmp_path / "log")
    pl.DataFrame({"user": ["u"] * 99, "item": ["i"] * 99}).write_parquet(tmp_path / "whole")
    (tmp_path / "log").write_bytes((tmp_path / "whole").read_bytes()[:-30])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        prepare(tmp_path / "run", tmp_path / "log")

    for wrong in ({"item": [b"\xe9"]}, {"item": ["i"], "time": [timedelta(1)]}):
        pl.DataFrame({"user": ["u"], **wrong}).write_parquet(tmp_path / "log")
        with pytest.raises(UserError, match=r"log cannot be read as Parquet: [^\n]*$"):
            prepare(tmp_path / "run", tmp_path / "log")

    (tmp_path / "log").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UserError, match="is a zip archive; unpack it first"):
        prepare(tmp_path / "run", tmp_path / "log")
    with tarfile.open(tmp_path / "tar", "w") as archive:
        archive.add(tmp_path / "whole", "yelp.json")
    tar, text = (tmp_path / "tar").read_bytes(), b"user,item\nu,i\n"
    packed = {
        "a tar archive": (tar, gzip.compress(tar)),
        "packed by bzip2": [bz2.compress(text, 1), bz2.compress(text)],
    }
    packed |= {"packed by xz": [lzma.compress(text)], "packed by zstd": [bytes.fromhex("28b52ffd") + bytes(20)]}
    for what, files in packed.items():
        for content in files:
            (tmp_path / "log").write_bytes(content)
            with pytest.raises(UserError, match=f"log is {what}; unpack it first"):
                prepare(tmp_path / "run", tmp_path / "log")
    (tmp_path / "log").write_bytes(gzip.compress((tmp_path / "whole").read_bytes()))
    with pytest.raises(UserError, match="is a Parquet file in gzip; unpack it first"):
        prepare(tmp_path / "run", tmp_path / "log")


JUNK = st.sampled_from([b'"', b"\n", b"\r\n", b"\t", b"{", b"'", b"1e400", b"\x1f\x8b", b"nan", b"\0"])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(LAYOUTS)), skip=st.booleans(), gzipped=st.booleans(), lost=st.integers(0, 20),
    place=st.integers(0, 200), junk=st.binary(max_size=3) | JUNK,
)  # fmt: skip
def test_a_damaged_file_gives_rows_or_one_sentence(tmp_path, name, skip, gzipped, lost, place, junk):
    content = (LAYOUTS[name][0] + "\n").encode() * 2
    content = content[:place] + junk + content[place + lost :]
    (tmp_path / "log").write_bytes(gzip.compress(content)[: -lost or None] if gzipped else content)
    try:
        data.read_logs([readers.sniff(tmp_path / "log")], readers.Bad(skip))
    except UserError as error:
        assert "\n" not in error.message
