"""Files of every format become frames with the columns user, item, rating, time (and text), ids as text.

A file is read in blocks of whole records, so memory does not grow with it: Polars parses a block, and only a block
that holds something wrong is walked through line by line, to name the lines. `sniff` finds out what a file is.
Times are float64 in the file's own unit: seconds (s), milliseconds (ms), us, ns, or "order" (a plain running number).
"""

import ast
import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from hnlm_ref.console import UserError
from hnlm_ref.knobs import unknown

BLOCK = 1 << 25  # bytes read at once
UNITS = {"order": 0, "s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}  # ticks per second
DATES = ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d", "%Y-%m-%dT%H:%M:%S%.fZ", "%Y-%m-%dT%H:%M:%S%.f", "%m %d, %Y")

# What columns are called, by role, in order of preference; compared in lower case without marks (userId = user_id).
ALIASES = {
    "user": ("userid", "reviewerid", "user", "uid", "customerid"),
    "item": ("parentasin", "itemasin", "asin", "itemid", "businessid", "movieid", "item", "iid", "productid"),
    "history": ("itemidlist",),
    "rating": ("rating", "overall", "stars", "score"),
    "time": ("timestamp", "unixreviewtime", "time", "date", "reviewtime"),
    "text": ("reviewtext", "text", "review"),
    "title": ("itemtitle", "title", "movietitle", "name"),
    "brand": ("brand", "store"),
    "categories": ("categories", "category", "genres", "genre", "class", "maincategory"),
    "description": ("description", "features", "feature"),
}
LOG_ROLES = ("user", "item", "history", "rating", "time", "text")
ITEM_ROLES = ("item", "title", "brand", "categories", "description")


class Format(NamedTuple):
    """A named format. `columns` gives the role of each column of a file that has no header."""

    kind: str  # json, delimited, sequence, parquet
    sep: str = ""
    header: bool = True
    columns: tuple[str, ...] = ()  # no header: roles in order; otherwise: columns that prove the format
    encoding: str = "utf-8"


_AMAZON = ("reviewerID", "asin", "overall", "unixReviewTime")
FORMATS = {
    "amazon-2018": Format("json", columns=_AMAZON),  # and 2014, whose lines may be Python literals
    "amazon-2023": Format("json", columns=("user_id", "parent_asin", "rating", "timestamp")),
    "amazon-2023-ratings": Format("delimited", ",", columns=("user_id", "parent_asin", "rating", "timestamp")),
    "amazon-2018-ratings": Format("delimited", ",", False, ("item", "user", "rating", "time")),
    "yelp": Format("json", columns=("user_id", "stars", "date")),
    "movielens-100k": Format("delimited", "\t", False, ("user", "item", "rating", "time"), "latin-1"),
    "movielens-1m": Format("delimited", "::", False, ("user", "item", "rating", "time"), "latin-1"),
    "movielens": Format("delimited", ",", columns=("userId", "movieId", "rating", "timestamp")),
    "recbole": Format("delimited", "\t"),
    "selfrec": Format("delimited", " ", False, ("user", "item", "rating")),
    "sequence": Format("sequence", " ", False),  # LightGCN train.txt, S3-Rec
    "json": Format("json"),
    "csv": Format("delimited", ","),
    "tsv": Format("delimited", "\t"),
    "parquet": Format("parquet"),
}


@dataclass(frozen=True)
class Layout:
    """What a file is: enough to read it, and to tell the user what was found."""

    path: Path
    format: str
    kind: str
    sep: str
    header: bool
    names: tuple[str, ...]
    columns: dict[str, str]
    encoding: str
    gzipped: bool

    @property
    def quote(self) -> str | None:
        """Choice: RecBole and bar-separated MovieLens files know no quoting; others quote as spreadsheets do."""
        return None if self.format == "recbole" or self.sep in ("|", " ", "::") or self.kind != "delimited" else '"'

    def __str__(self) -> str:
        sep = {"\t": "tab", " ": "blanks", "": ""}.get(self.sep, repr(self.sep))
        parts = [self.format, "gzip" if self.gzipped else "", f"separator {sep}" if sep else "", self.encoding]
        return ", ".join(p for p in parts if p) + "; " + " ".join(f"{r}={c}" for r, c in self.columns.items())


@dataclass
class Bad:
    """Rows that cannot be read: collected, then refused in one sentence or, with --skip-bad-rows, counted."""

    skip: bool = False
    rows: list[tuple[str, int, str]] = field(default_factory=list)  # file name, line, what is wrong

    def add(self, path: Path, found: list[tuple[int, str]]) -> None:
        self.rows += [(path.name, line, why) for line, why in found]
        if found and not self.skip:
            shown = "; ".join(f"line {line}: {why}" for line, why in found[:10])
            more = f" and {len(found) - 10} more" if len(found) > 10 else ""
            raise UserError(f"{path}: {shown}{more}; mend the file or pass --skip-bad-rows")


# ---- looking at a file ------------------------------------------------------------------------------------------


def _open(path: Path) -> Any:
    if path.is_dir():
        raise UserError(f"{path} is a folder without files of a known layout; name a file")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if gzipped else path.open("rb")


def _read(file: Any, path: Path, size: int) -> bytes:
    try:
        return file.read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the gzip file is cut short or damaged ({error}); fetch it again") from error


def sniff(
    path: Path,
    name: str = "auto",
    sep: str | None = None,
    header: bool | None = None,
    encoding: str | None = None,
    columns: Iterable[str] = (),
    roles: tuple[str, ...] = LOG_ROLES,
) -> Layout:
    """Find out what `path` is.

    name     one of FORMATS, or "auto"
    columns  "role=column" each; the column by name, or by place from 1 in a file without header
    Raises UserError when the file is empty, or when no column can be user or item.
    """
    if name not in ("auto", *FORMATS):
        raise UserError(f"no format {name!r}; {unknown(name, ('auto', *FORMATS))}")
    with _open(path) as file:
        head = _read(file, path, 1 << 18)
    if not head.strip():
        raise UserError(f"{path} is empty")
    gzipped = path.open("rb").read(2) == b"\x1f\x8b"
    if head[:4] == b"PAR1":
        names = tuple(pl.read_parquet_schema(path))
        found = _roles(names, columns, roles, path)
        return Layout(path, "parquet", "parquet", "", True, names, found, "utf-8", False)
    wanted = FORMATS.get(name)
    if encoding is None:
        encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else wanted.encoding if wanted else "utf-8"
    text = head.decode(encoding, errors="replace").removeprefix("\ufeff")
    lines = [line for line in text.splitlines() if line.strip()][: 1000 if len(head) == 1 << 18 else None]
    kind = wanted.kind if wanted else "json" if lines[0].startswith("{") and not sep else "delimited"
    if kind == "json":
        names = tuple(dict.fromkeys(key for line in lines[:200] for key in _record(line)))
        header, sep = True, ""
    else:
        sep = sep.replace("\\t", "\t") if sep else wanted.sep if wanted and wanted.sep else _separator(lines)
        fields = [_fields(line, sep) for line in lines[:1000]]
        if kind == "delimited" and not wanted and sep == " " and len({len(f) for f in fields}) > 1:
            kind = "sequence"
        if header is None:
            header = wanted.header if wanted else kind != "sequence" and not any(_number(f) for f in fields[0])
            header = header and (wanted is not None or bool(_match(fields[0], "user")) or not _number(fields[-1][-1]))
        names = tuple(f.strip() for f in fields[0]) if header else tuple(str(i + 1) for i in range(len(fields[0])))
    if kind == "sequence":
        found = {"user": "1", "history": "2 ..."}
        return Layout(path, name if wanted else "sequence", kind, " ", False, names, found, encoding, gzipped)
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UserError(f"{path}: line 1: the header names column {twice!r} twice; rename one")
    format = name if wanted else _recognise(kind, sep, header, names, lines)
    given = FORMATS[format].columns
    if not header and not columns:
        order = given if given else ("user", "item", "rating", "time") if roles is LOG_ROLES else ITEM_ROLES[:2]
        columns = [f"{role}={i + 1}" for i, role in enumerate(order[: len(names)])]
    found = _roles(names, columns, roles, path, sep if kind == "delimited" else "")
    return Layout(path, format, kind, sep, header, names, found, encoding, gzipped)


def _record(line: str) -> dict:
    """One line as a record: JSON, or the Python literal that Amazon's 2014 files hold. ValueError if it is neither."""
    try:
        record = json.loads(line)
    except ValueError:
        try:
            record = ast.literal_eval(line)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError("not a JSON object") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def _fields(line: str, sep: str) -> list[str]:
    if sep == " ":
        return line.split()
    return line.split(sep) if len(sep) > 1 else next(csv.reader([line], delimiter=sep), [])


def _number(text: str) -> bool:
    return bool(re.fullmatch(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?", text.strip()))


def _separator(lines: list[str]) -> str:
    """The separator that cuts the first lines into the same number of fields, two at least; blanks otherwise."""
    sample = lines[:50]
    for sep in ("\t", "::", ",", ";", "|"):
        sizes = {len(_fields(line, sep)) for line in sample}
        if min(sizes) >= 2 and (len(sizes) == 1 or (sep in (",", "\t") and not _number(lines[0].split(sep)[0]))):
            return sep
    return " " if min(len(line.split()) for line in sample) >= 2 else ","


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.partition(":")[0].lower())


def _match(names: Iterable[str], role: str) -> str | None:
    plain = {_plain(name): name for name in reversed(list(names))}
    return next((plain[alias] for alias in ALIASES[role] if alias in plain), None)


def _roles(names: tuple[str, ...], columns: Iterable[str], roles: tuple[str, ...], path: Path, sep: str = "") -> dict:
    """Role -> column name, from `columns` first and the usual names otherwise."""
    found = {role: match for role in roles if (match := _match(names, role))}
    for pair in columns:
        role, _, column = pair.partition("=")
        if role not in ALIASES:
            raise UserError(f"--columns {pair}: {unknown(role, ALIASES)}")
        if column and column not in names:
            raise UserError(f"{path} has no column {column!r} for {role}: it has {', '.join(names)}")
        found = {**{r: c for r, c in found.items() if r != role}, **({role: column} if column else {})}
    if lacking := [role for role in ("user", "item") if role in roles and role not in found]:
        hint = " if the separator is another, name it, as in --sep '\\t';" if len(names) == 1 and sep else ""
        raise UserError(
            f"{path}: no column for {' and '.join(lacking)} among the {len(names)} found ({', '.join(names)[:200]});"
            f"{hint} name them, as in --columns user=NAME,item=NAME"
        )
    return found


def _recognise(kind: str, sep: str, header: bool, names: tuple[str, ...], lines: list[str]) -> str:
    if kind == "delimited" and header and all(":" in name for name in names):
        return "recbole"
    for name, format in FORMATS.items():
        if (format.kind, format.header) != (kind, header) or (kind == "delimited" and format.sep != sep):
            continue
        if name == "amazon-2018-ratings" and not re.match(r"[B\d][\dA-Z]{9},A[\dA-Z]{9,},", lines[0]):
            continue
        if (header and set(format.columns) <= set(names)) or (not header and len(format.columns) >= len(names)):
            return name
    return {"json": "json", "\t": "tsv"}.get(kind if kind == "json" else sep, "csv")


# ---- reading ----------------------------------------------------------------------------------------------------


def _blocks(layout: Layout) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, UTF-8 bytes of whole records); the header line and a byte order mark are left out."""
    line, rest = 1, b""
    utf8 = layout.encoding.lower().replace("-", "") == "utf8"
    decode = None if utf8 else codecs.getincrementaldecoder(layout.encoding)()
    with _open(layout.path) as file:
        while True:
            chunk = _read(file, layout.path, BLOCK)
            try:
                data = rest + (chunk if decode is None else decode.decode(chunk, final=not chunk).encode())
            except UnicodeDecodeError as error:
                raise UserError(f"{layout.path}: after line {line}: {error}; name the right --encoding") from error
            if line == 1:
                data = data.removeprefix(b"\xef\xbb\xbf").removeprefix("\ufeff".encode())
            cut = data.rfind(b"\n") + 1 if chunk else len(data)
            if chunk and layout.quote and data.count(b'"', 0, cut) % 2:  # the cut lies inside a quoted field
                cut = data.rfind(b"\n", 0, data.rfind(b'"', 0, cut)) + 1
            block, rest = data[:cut], data[cut:]
            n_lines = block.count(b"\n")
            if line == 1 and layout.header and layout.kind == "delimited" and block:
                block = block.partition(b"\n")[2]
                yield 2, block
            elif block.strip():
                yield line, block
            line += n_lines
            if not chunk:
                return


def _parse(data: bytes, layout: Layout, columns: list[str]) -> pl.DataFrame:
    """The wanted columns of a block as text, by Polars. Raises PolarsError where the block needs a closer look."""
    if layout.kind == "json":
        return pl.read_ndjson(data, schema={name: pl.String for name in columns})
    if b"\0" in data:
        raise pl.exceptions.ComputeError("NUL byte")
    sep = "\t" if layout.sep in (" ", "::") else layout.sep
    if layout.sep == " ":
        data = b"\n".join(b"\t".join(line.split()) for line in data.split(b"\n"))
    elif layout.sep == "::":
        data = data.replace(b"::", b"\t")
    schema = {name: pl.String for name in layout.names}
    if not data.strip():
        return pl.DataFrame(schema={name: pl.String for name in columns})
    return pl.read_csv(data, separator=sep, quote_char=layout.quote, has_header=False, schema=schema).select(columns)


def _walk(data: bytes, layout: Layout, columns: list[str], line: int) -> tuple[pl.DataFrame, list[int], list]:
    """The same, record by record, in Python: frame, the line of each row, and (line, reason) of the bad ones."""
    rows, lines, bad = [], [], []
    raw = data.split(b"\n")
    i = 0
    while i < len(raw):
        first, record = i, raw[i]
        i += 1
        if layout.quote and record.count(b'"') % 2:  # a quoted line break: at most 1,000 lines belong to a field
            for j in range(i, min(i + 1000, len(raw))):
                record += b"\n" + raw[j]
                if raw[j].count(b'"') % 2:
                    i = j + 1
                    break
            else:
                bad.append((line + first, "a quote is never closed"))
                continue
        if not record.strip():
            continue
        try:
            if b"\0" in record:
                raise ValueError("it holds a NUL byte")
            text = record.rstrip(b"\r").decode()
            if layout.kind == "json":
                found = _record(text)
                row = [v if v is None or isinstance(v, str) else json.dumps(v) for v in map(found.get, columns)]
            else:
                fields = (
                    _fields(text, layout.sep) if layout.quote else text.split(None if layout.sep == " " else layout.sep)
                )
                if len(fields) > len(layout.names):
                    raise ValueError(f"{len(fields)} fields where {len(layout.names)} are named")
                by_name = dict(zip(layout.names, fields, strict=False))
                row = [by_name.get(name) for name in columns]
            rows.append(row)
            lines.append(line + first)
        except UnicodeDecodeError as error:
            byte = record[error.start]
            where = f"byte 0x{byte:02X} at place {error.start + 1} is not UTF-8; try --encoding latin-1"
            bad.append((line + first, where))
        except (ValueError, csv.Error) as error:
            bad.append((line + first, str(error)))
    return pl.DataFrame(rows, schema={name: pl.String for name in columns}, orient="row"), lines, bad


def _chain(frame: pl.DataFrame, offset: int) -> pl.DataFrame:
    """Lists of items in order, one row per item; the running number is the time."""
    frame = frame.filter(pl.col("history").list.len() > 0).explode("history").rename({"history": "item"})
    return frame.with_columns(time=pl.int_range(offset, offset + pl.len()).cast(pl.Float64))


def frames(layout: Layout, bad: Bad, time_unit: str = "auto", text: bool = False) -> Iterator[pl.DataFrame]:
    """Frames with user, item (text), rating, time (float64, all null where the file has none) and, if asked, text."""
    columns = {r: c for r, c in layout.columns.items() if r in LOG_ROLES and (text or r != "text")}
    n_rows = 0
    guess = time_unit == "auto"
    unit = None if guess else time_unit
    for line, data in _parquet(layout, columns) if layout.kind == "parquet" else _blocks(layout):
        lines: list[int] = []
        if isinstance(data, pl.DataFrame):
            frame = data
        elif layout.kind == "sequence":
            tokens = pl.DataFrame({"t": data.decode(errors="replace").split("\n")}).select(
                pl.col("t").str.extract_all(r"[^\s\x00]+")
            )
            frame = tokens.select(user=pl.col("t").list.first(), history=pl.col("t").list.slice(1))
        else:
            names = list(columns.values())
            try:
                frame = _parse(data, layout, names)
            except pl.exceptions.PolarsError:
                frame, lines, found = _walk(data, layout, names, line)
                bad.add(layout.path, found)
            frame = frame.rename({c: r for r, c in columns.items()})
        if "history" in columns:
            if "item" in frame.columns:  # RecBole: the list, then the target
                both = pl.concat_str("history", "item", separator=" ", ignore_nulls=True)
                frame = frame.with_columns(history=both.str.extract_all(r"\S+")).drop("item")
            frame = _chain(frame, n_rows)
        frame = frame.filter(~pl.all_horizontal(pl.all().is_null())) if not lines else frame
        checked, unit = _check(frame, unit, guess)
        if checked["why"].null_count() < len(checked):
            if not lines and isinstance(data, bytes):
                frame, lines, found = _walk(data, layout, names, line)
                bad.add(layout.path, found)
                checked, unit = _check(frame.rename({c: r for r, c in columns.items()}), unit, guess)
            numbers = lines or range(line, line + len(checked))
            whys = checked["why"].to_list()
            bad.add(layout.path, [(n, why) for n, why in zip(numbers, whys, strict=True) if why])
            checked = checked.filter(pl.col("why").is_null())
        n_rows += len(checked)
        yield checked.drop("why")


def item_frames(layout: Layout, bad: Bad) -> Iterator[pl.DataFrame]:
    """Frames with item, title, brand, categories, description as text, those of them that the file has."""
    columns = {r: c for r, c in layout.columns.items() if r in ITEM_ROLES}
    names = list(columns.values())
    for line, data in _parquet(layout, columns) if layout.kind == "parquet" else _blocks(layout):
        if isinstance(data, pl.DataFrame):
            yield data.cast(pl.String)
            continue
        try:
            frame = _parse(data, layout, names)
        except pl.exceptions.PolarsError:
            frame, _, found = _walk(data, layout, names, line)
            bad.add(layout.path, found)
        yield frame.rename({c: r for r, c in columns.items()}).with_columns(pl.col("item").str.strip_chars())


def locate(path: Path) -> tuple[Path, Path | None]:
    """The log and the item file of a folder whose file names are those of a known data set; a file is itself."""
    if not path.is_dir():
        return path, None
    pairs = (("*.inter", "*.item"), ("u.data", "u.item"), ("ratings.dat", "movies.dat"), ("ratings.csv", "movies.csv"))
    for log, items in pairs:
        if found := sorted(path.glob(log)):
            return found[0], next(iter(sorted(path.glob(items))), None)
    return path, None


def _parquet(layout: Layout, columns: dict[str, str]) -> Iterator[tuple[int, pl.DataFrame]]:
    row = 1
    for batch in pl.scan_parquet(layout.path).select(**columns).collect_batches(maintain_order=True):
        yield row, batch
        row += len(batch)


def unit_of(time: pl.Expr) -> pl.Expr:
    """Guess the unit of a time by its size: seconds reach 1e11 in the year 5138, milliseconds do in 1973."""
    size = time.abs()
    return (
        pl.when(size < 1e8).then(pl.lit("order")).when(size < 1e11).then(pl.lit("s"))
        .when(size < 1e14).then(pl.lit("ms")).when(size < 1e17).then(pl.lit("us")).otherwise(pl.lit("ns"))
    )  # fmt: skip


def _check(frame: pl.DataFrame, unit: str | None, guess: bool) -> tuple[pl.DataFrame, str | None]:
    """Ids trimmed, numbers and dates parsed, and a column `why` that says what is wrong with a row."""
    raw = {role: pl.col(role).cast(pl.String) for role in frame.columns}
    whys = []
    frame = frame.with_columns(raw[role].str.strip_chars() for role in ("user", "item"))
    for role in ("user", "item"):
        whys.append(pl.when(pl.col(role).fill_null("") == "").then(pl.lit(f"no {role}")))
    parsed: dict[str, pl.Expr] = {name: pl.lit(None, pl.Float64) for name in ("rating", "time")}
    if "rating" in frame.columns:
        parsed["rating"] = pl.col("rating").cast(pl.Float64, strict=False)
        whys.append(_not_a("rating", parsed["rating"]))
    if "time" in frame.columns:
        kind = frame["time"].dtype
        time = pl.col("time").cast(pl.Float64, strict=False)
        if kind.is_temporal():
            time = pl.col("time").cast(pl.Datetime("us")).dt.timestamp("us") / 1e6
        elif kind == pl.String and frame.select(time.is_null().any()).item():
            tried = [pl.col("time").str.strip_chars().str.to_datetime(f, strict=False) for f in DATES]
            dates = pl.coalesce(tried).dt.timestamp("us") / 1e6
            time = pl.coalesce(time, dates)
        parsed["time"] = time
        whys.append(_not_a("time", time))
        frame = frame.with_columns(__time=time)
        if unit is None:
            first = frame.filter(pl.col("__time").is_not_null()).head(1)
            unit = first.select(unit_of(pl.col("__time"))).item() if len(first) else None
        if guess:
            mixed = unit_of(time) != pl.lit(unit)
            note = pl.format(
                "time {} is in {} where the first row's is in {}", raw["time"], unit_of(time), pl.lit(unit)
            )
            whys.append(pl.when(mixed).then(note))
    keep = [c for c in ("user", "item", "text") if c in frame.columns]
    return frame.select(*keep, **parsed, why=pl.coalesce(whys)), unit


def _not_a(role: str, value: pl.Expr) -> pl.Expr:
    raw = pl.col(role).cast(pl.String)
    blank = raw.fill_null("").str.strip_chars() == ""
    return (
        pl.when(blank).then(pl.lit(f"no {role}"))
        .when(~value.is_finite().fill_null(False)).then(pl.format(role + " '{}' is no number", raw))
    )  # fmt: skip
