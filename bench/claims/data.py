"""Lay the files that the claim's presets read into data/, from the data sets as they were published.

python bench/claims/data.py FOLDER      # holds amazon-toys-2014-5core, amazon-cds-2018-titles, yelp-2019-5core-named

Toys is copied. CDs: every target with the history before it becomes rows of one log. Yelp: item n of the names is item
n + 1 of the log.
"""

import ast
import csv
import gzip
import json
import shutil
import sys
from pathlib import Path


def save(path: Path, *rows) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def main(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    toys, cds, yelp = (
        source / name for name in ("amazon-toys-2014-5core", "amazon-cds-2018-titles", "yelp-2019-5core-named")
    )
    shutil.copyfile(toys / "Toys_and_Games.txt", target / "toys.txt")
    shutil.copyfile(toys / "derived" / "items.tsv.gz", target / "toys_items.tsv.gz")

    rows, titles = [], {}
    for path in sorted(cds.glob("*.csv.gz")):
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                columns = ("item_asins", "history_item_title", "history_rating", "history_timestamp")
                events = list(zip(*(ast.literal_eval(row[name]) for name in columns), strict=True))
                events.append(tuple(row[name] for name in ("item_asin", "item_title", "rating", "timestamp")))
                rows += [(row["user_id"], item, rating, time) for item, _, rating, time in events]
                titles |= {item: title for item, title, _, _ in events}
    save(target / "cds.csv", ("user_id", "item_id", "rating", "timestamp"), *rows)
    save(target / "cds_items.csv", ("item_id", "title"), *titles.items())

    with gzip.open(yelp / "Yelp.txt.gz", "rb") as packed, (target / "yelp.txt").open("wb") as plain:
        shutil.copyfileobj(packed, plain)
    with gzip.open(yelp / "Yelp.item.json.gz", "rt", encoding="utf-8") as file:
        names = json.load(file)
    shifted = ((int(item) + 1, about["title"], about["description"]) for item, about in names.items())
    save(target / "yelp_items.csv", ("item_id", "title", "categories"), *shifted)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path("data"))
