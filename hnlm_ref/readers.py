"""Files of every format become frames of the columns user, item, rating, time and text; ids are text (case A06).

`locate` finds the files of a known folder, `sniff` finds out what a file is, `frames` reads it. A file is read in
blocks of whole records, so memory does not grow with it. Polars parses a block; only a block that holds something
wrong is walked through record by record, to name the lines.
"""

import ast
import codecs
import contextlib
import csv
import gzip
import json
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from hnlm_ref.artifacts import no_half_characters
from hnlm_ref.console import UserError, progress
from hnlm_ref.knobs import unknown

JSON = json.JSONDecoder(parse_constant=lambda _: None)  # NaN is nothing
BLOCK = 1 << 23  # bytes read at once
HEAD = 1 << 18  # bytes looked at to find out what a file is
PACKED = {rb"PK\x03\x04": "a zip archive", rb".{257}ustar": "a tar archive", rb"BZh\d1AY&SY": "packed by bzip2"}
PACKED |= {rb"\xfd7zXZ\0": "packed by xz", rb"\x28\xb5\x2f\xfd": "packed by zstd"}  # by how they begin; gzip is read
LOG_ROLES = ("user", "item", "history", "rating", "time", "text")  # history: several items in one field, oldest first
ITEM_ROLES = ("item", "title", "brand", "categories", "description", "features")

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
    "description": ("description",),
    "features": ("features", "feature"),
}


class Format(NamedTuple):
    """A format by name: `columns` prove it in a file with a header, and are the roles in order in one without."""

    kind: str  # json (one object a line), delimited, parquet
    sep: str = ""
    header: bool = True
    columns: tuple[str, ...] = ()


FORMATS = {
    "amazon-2018": Format("json", columns=("reviewerID", "asin", "overall", "unixReviewTime")),  # and 2014
    "amazon-2023": Format("json", columns=("user_id", "parent_asin", "rating", "timestamp")),
    "amazon-2023-ratings": Format("delimited", ",", columns=("user_id", "parent_asin", "rating", "timestamp")),
    "amazon-2018-ratings": Format("delimited", ",", False, ("item", "user", "rating", "time")),
    "yelp": Format("json", columns=("user_id", "stars", "date")),
    "movielens-100k": Format("delimited", "\t", False, ("user", "item", "rating", "time")),
    "movielens-1m": Format("delimited", "::", False, ("user", "item", "rating", "time")),  # and 10m
    "movielens": Format("delimited", ",", columns=("userId", "movieId", "rating", "timestamp")),  # 20m and later
    "selfrec": Format("delimited", " ", False, ("user", "item", "rating")),
    "sequence": Format("delimited", "\n", False, ("user", "history")),  # user item item ...: LightGCN, S3-Rec
    "recbole": Format("delimited", "\t"),  # typed header, user_id:token
    "json": Format("json"),
    "csv": Format("delimited"),
    "tsv": Format("delimited", "\t"),
    "parquet": Format("parquet"),
}
SEPARATORS = ("\t", "::", ",", ";", "|")  # looked for in this order; blanks last
QUOTED = ("\t", "|", ",", ";")  # separators beside which a field may stand in quotes
PART = "\x1f"  # between the items of a history, whose names may hold blanks
NO_HEADER = ("user", "item", "rating", "time")  # roles of columns without names, in a file of no format above

# Files of the folders that data sets come in: log, item texts, validation and test part of a ready split.
FOLDERS = (
    ("toy.csv", "toy_items.csv"),
    ("*.train.inter*", "*.item*", "*.valid.inter*", "*.test.inter*"),
    ("*.inter*", "*.item*"),
    ("u.data", "u.item"),
    ("ratings.dat", "movies.dat"),
    ("ratings.csv", "movies.csv"),
    ("[!m]*.json*", "meta_*.json*"),
    ("*review*.json*", "*business*.json*"),
    ("trainset.txt*", "", "", "testset.txt*"),
    ("train.txt*", "", "valid.txt*", "test.txt*"),
)

# Where the size of a time betrays its unit: seconds reach 1e11 in the year 5138, milliseconds did in 1973.
UNITS = {"order": (0, 1e8), "s": (1e8, 1e11), "ms": (1e11, 1e14), "us": (1e14, 1e17), "ns": (1e17, float("inf"))}
DATES = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d", "%+", "%Y-%m-%dT%H:%M:%S%.f", "%m %d, %Y")  # %+: with Z or an offset


@dataclass(frozen=True)
class Layout:
    """What a file is: enough to read it, and to tell the user what was found."""

    path: Path
    format: str
    kind: str
    columns: dict[str, str]  # role -> column
    sep: str
    quote: bool  # whether a field may stand in quotes
    header: bool
    names: tuple[str, ...]
    encoding: str
    gzipped: bool
    unit: str | None  # of the times: one of UNITS or "date"; None: the file has none
    guessed: bool  # whether the unit was; then every time is held against it

    def __str__(self) -> str:
        sep = {"\t": "tab", " ": "blanks", "\n": "blanks"}.get(self.sep, repr(self.sep))
        columns = " ".join(f"{role}={column}" for role, column in self.columns.items())
        parts = [self.format, "gzip" * self.gzipped, f"separator {sep}" if self.sep else "", self.encoding]
        parts += [f"time in {self.unit}" if self.unit else "", "user item item ..." if self.sep == "\n" else columns]
        return ", ".join(filter(None, parts))


@dataclass
class Bad:
    """Rows that cannot be read: refused in one sentence, or collected under --skip-bad-rows (case A18)."""

    skip: bool = False
    rows: list[dict] = field(default_factory=list)  # file, line, what is wrong
    n_trimmed: int = 0  # rows whose id had blanks around it

    def add(self, path: Path, found: list[tuple[int, str]]) -> None:
        self.rows += [{"file": path.name, "line": line, "why": why} for line, why in found]
        if found and not self.skip:
            shown = "; ".join(f"line {line}: {why}" for line, why in found[:10])
            more = f" and {len(found) - 10} more" if len(found) > 10 else ""
            raise UserError(f"{path}: {shown}{more}; mend the file or pass --skip-bad-rows")


# ---- what a file is ---------------------------------------------------------------------------------------------


def locate(path: Path) -> tuple[Path, *tuple[Path | None, ...]]:
    """Log, item texts, validation and test part of a folder with the file names of FOLDERS; a file is the log."""
    if not path.is_dir():
        return path, None, None, None
    for patterns in FOLDERS:
        log, *others = (sorted(path.glob(pattern)) if pattern else [] for pattern in patterns)
        if len(log) == 1 and (len(others) == 1 or others[2]):
            return log[0], *(files[0] if files else None for files in [*others, [], []][:3])
    raise UserError(f"{path} is a folder in which no known log is found; name the file")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The file's bytes, unpacked."""
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "no ordinary file" if path.exists() else "no such file"
        raise UserError(f"{path}: {what}; stages/DATA.md tells what is read, and where the data of the presets goes")
    with path.open("rb") as packed:
        gzipped = packed.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if gzipped else path.open("rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the gzip file is cut short or damaged ({error}); fetch it again") from error


def sniff(
    path: Path,
    name: str = "auto",
    sep: str | None = None,
    header: bool | None = None,
    encoding: str | None = None,
    columns: Iterable[str] = (),
    time_unit: str = "auto",
    roles: tuple[str, ...] = LOG_ROLES,
) -> Layout:
    """Find out what the file is; what is given is not guessed.

    name     one of FORMATS, or "auto"
    columns  "role=column" each: the column's name, or its place from 1 where there is no header; "role=" drops a role
    Raises UserError when the file is empty, a name is unknown, or no column can be user or item.
    """
    if name not in ("auto", *FORMATS):
        raise UserError(f"no format {name!r}; {unknown(name, ('auto', *FORMATS))}")
    if time_unit not in (units := ("auto", "date", *UNITS)):
        raise UserError(f"no time unit {time_unit!r}; {unknown(time_unit, units)}")
    kind, wanted_sep, wanted_header, _ = FORMATS.get(name, (None, None, None, None))
    with _open(path) as file:
        head, gzipped = file.read(HEAD), isinstance(file, gzip.GzipFile)
        while b"\n" not in head and (more := file.read(HEAD)):
            head += more
    if not head.strip():
        raise UserError(f"{path} is empty")
    for start, what in PACKED.items():
        if re.match(start, head, re.S):
            raise UserError(f"{path} is {what}; unpack it first")
    if gzipped and head.startswith(b"PAR1"):
        raise UserError(f"{path} is a Parquet file in gzip; unpack it first")
    given, encoding = encoding, encoding or ("utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    try:
        "a".encode(encoding)  # not hex, zip, rot13 ...
        text = codecs.getincrementaldecoder(encoding)("replace").decode(head).removeprefix("\ufeff")
    except (LookupError, ValueError) as error:
        raise UserError(f"{path}: --encoding {encoding}: {error}; name another, such as latin-1") from error
    if not given and "\ufffd" in text and path.name in ("u.item", "movies.dat"):  # MovieLens 100K and 1M
        encoding, text = "latin-1", head.decode("latin-1")
    lines = text.replace("\r", " ").split("\n")
    lines = [line for line in lines[: -1 if len(head) >= HEAD else None] if line.strip()] or [text]
    if lines[0].strip() == "{" or lines[0].startswith("["):
        raise UserError(f"{path} is one JSON value; write one object a line, as `jq -c '.[]'` does for a list")
    looks_like = "json" if lines[0].lstrip().startswith("{") and not sep else "delimited"
    kind = "parquet" if head.startswith(b"PAR1") else kind or looks_like
    if kind == "parquet":
        try:
            first = pl.scan_parquet(path).head(1000).collect()
        except pl.exceptions.PolarsError as error:
            raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
        names, records, header, sep, encoding = tuple(first.columns), first.to_dicts(), True, "", "utf-8"
    elif kind == "json":
        records = [record for line in lines if isinstance(record := value_of(line), dict)]
        names, header, sep = tuple(dict.fromkeys(key for record in records for key in record)), True, ""
    else:
        sep = sep.replace("\\t", "\t") if sep else wanted_sep or _separator(lines[:1000])
        fields = list(_fields(lines[:1000], sep, sep in QUOTED))
        if header is None:  # names are no numbers; a file cut by blanks has a header only if it names the user
            known = roles[0] in _aliases(fields[0], roles)
            plain = sep not in (" ", "\n") and not any(map(_is_number, fields[0]))
            header = (known or plain) if wanted_header is None else wanted_header
        places = range(1, 1 + max(map(len, fields)))
        names = tuple(f.strip() for f in fields[0]) if header else tuple(map(str, places))
        records = [dict(zip(names, row, strict=False)) for row in fields[int(header) :]]
    if twice := [n for n in names if names.count(n) > 1]:
        raise UserError(f"{path}: line 1: the header names column {twice[0]!r} twice; rename one")
    format = name if name != "auto" else _recognise(kind, sep, header, names, lines[0])
    if not header and not columns:
        told = ("item", "title") if sep == "|" else ("item", "title", "categories")  # | in u.item: dates come third
        order = FORMATS[format].columns or NO_HEADER if roles is LOG_ROLES else told
        columns = [f"{role}={place}" for role, place in zip(order, names, strict=False)]
    found = _roles(names, columns, roles, path)
    quote = format != "recbole" and (sep in (",", ";") or (sep in QUOTED and _has_quotes(path, encoding, sep)))
    guessed = time_unit == "auto"
    unit = _unit([str(r.get(found["time"], "")) for r in records], time_unit) if "time" in found else None
    if "history" in found:
        unit = "order"
    if sep == "\n" and guessed:  # lines that are all sorted by item, as text or number, tell no order in time
        chains = [line.split()[1:] for line in lines]
        in_order = (c in (sorted(c), sorted(c, key=lambda item: (len(item), item))) for c in chains)
        unit = None if all(in_order) else "order"
    return Layout(path, format, kind, found, sep, quote, header, names, encoding, gzipped, unit, guessed)


def _has_quotes(path: Path, encoding: str, sep: str) -> bool:
    """Whether a field between tabs or bars stands in quotes, anywhere in the file: pandas quotes only where it must."""
    sep = re.escape(sep)
    field = re.compile(rf'(^|{sep})"[^{sep}\n]*"({sep}|\r?$)', re.M)
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    with _open(path) as file:
        texts = map(decoder.decode, iter(lambda: file.read(BLOCK), b""))
        return any('"' in text and field.search(text) for text in texts)


def value_of(text: str, literals: bool = True) -> Any:
    """What JSON says, NaN as null, or else a Python literal, as in Amazon's 2014 files; None if it is neither."""
    for parse in (JSON.decode, ast.literal_eval)[: 1 + literals]:
        with contextlib.suppress(ValueError, TypeError, SyntaxError), warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of text that is no Python
            return parse(text)
    return None


def _text(value: Any) -> str | None:
    """A value of a record as Polars tells it: whole numbers in full, without a fraction, lists in JSON."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    text = value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text and no_half_characters(text)


def _members(text: str) -> str:
    """The items of a list, parted by PART: one in JSON or Python, or as numpy prints it, without commas."""
    items = value_of(text, literals=not re.search(r"""['"]\s+['"]""", text))  # Python would join 'a' 'b'
    if not isinstance(items, list):
        items = ["".join(found) for found in re.findall(r"""'([^']*)'|"([^"]*)"|([^\s,\[\]'"]+)""", text)]
    return PART.join(str(_text(item)) for item in items if item is not None)


def _fields(lines: Iterable[str], sep: str, quote: bool, strict: bool = False) -> Any:
    """Records of a delimited text as lists; runs of blanks count as one (case A02). Raises csv.Error if strict."""
    csv.field_size_limit(1 << 30)  # a text of any length; Python's own limit is 128 KB
    if sep == " ":  # ASCII alone, as `bytes.split` cuts: a no-break space is a part of an id
        return (re.findall(r"\S+", line, re.ASCII) for line in lines)
    if sep == "\n":
        return (line.split(None, 1) for line in lines)
    if not quote:
        return (line.rstrip().split(sep) for line in lines)
    return csv.reader(lines, delimiter=sep, strict=strict)


def _separator(lines: list[str]) -> str:
    """The separator that cuts most lines into the same number of fields, two at least; "\n" for a ragged sequence."""

    def agreement(sep: str) -> tuple[float, int]:
        n_fields, n_lines = Counter(map(len, _fields(lines, sep, sep in QUOTED))).most_common(1)[0]
        return (n_lines / len(lines) if n_fields > 1 else 0, n_fields)

    best = max(SEPARATORS, key=agreement)
    if agreement(best)[0] > 0.5:
        return best
    share, n_fields = agreement(" ")  # more fields than a log has, and no names: a sequence for users of like length
    told = n_fields <= len(NO_HEADER) or _aliases(lines[0].split(), ("item",))
    return " " if share == 1 and told else "\n" if len(lines[0].split()) > 1 else ","


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"\s*[+-]?\d+(\.\d+)?([eE][+-]?\d+)?\s*", text))


def _aliases(names: Iterable[str], roles: tuple[str, ...]) -> dict[str, str]:
    plain = {re.sub(r"[\W_]", "", name.partition(":")[0].lower()): name for name in reversed(list(names))}
    return {role: plain[a] for role in roles for a in reversed(ALIASES[role]) if a in plain}


def _roles(names: tuple[str, ...], columns: Iterable[str], roles: tuple[str, ...], path: Path) -> dict[str, str]:
    """Role -> column: the usual names, unless `columns` says otherwise."""
    found = _aliases(names, roles)
    for pair in columns:
        role, _, column = pair.partition("=")
        if role not in roles:
            raise UserError(f"columns {pair!r}: write role=column; {unknown(role, roles)}")
        if column and column not in names:
            raise UserError(f"{path} has no column {column!r} for {role}; it has {', '.join(names)[:300]}")
        found = {r: c for r, c in found.items() if r != role} | ({role: column} if column else {})
    if twice := [r for r, c in found.items() if list(found.values()).count(c) > 1]:
        raise UserError(f"{path}: {found[twice[0]]!r} stands for {' and '.join(twice)}; drop one, as in {twice[-1]}=")
    there = {*found, "item" if "history" in found else ""}
    if lacking := [role for role in ("user", "item") if role in roles and role not in there]:
        other = next((f"--sep {sep!r}, " for sep in SEPARATORS if len(names) == 1 and sep in names[0]), "")
        cure = f"{other}--columns user=NAME,item=NAME or --header false"
        told = f"no column for {' and '.join(lacking)} among the {len(names)} found ({', '.join(names)[:300]!r})"
        raise UserError(f"{path}: {told}; try {cure if 'user' in roles else '--item-columns item=NAME'}")
    return found


def _recognise(kind: str, sep: str, header: bool, names: tuple[str, ...], line: str) -> str:
    """Name of the first format whose kind, separator and columns are the file's."""
    if kind == "delimited" and all(":" in name for name in names):
        return "recbole"
    for name, f in FORMATS.items():
        if f.columns and (f.kind, f.header, f.sep) == (kind, header, sep):
            asin_first = sep != "," or re.match(r"[B\d][\dA-Z]{9},A[\dA-Z]{9,},", line)
            if set(f.columns) <= set(names) if header else len(names) == len(f.columns) and asin_first:
                return name
    return kind if kind != "delimited" else "tsv" if sep == "\t" else "csv"


def _unit(samples: list[str], time_unit: str) -> str | None:
    """Unit of the first time that can be read (case A13)."""
    if time_unit != "auto":
        return time_unit
    for text in samples:
        if _is_number(text) and float(text) < float("inf"):
            return next(unit for unit, (low, high) in UNITS.items() if low <= abs(float(text)) < high)
        if pl.select(_date(pl.lit(text))).item() is not None:
            return "date"
    return None


# ---- reading ----------------------------------------------------------------------------------------------------


def _date(text: pl.Expr) -> pl.Expr:
    """Dates of any of the forms DATES, as seconds."""
    parsed = [text.str.strip_chars().str.to_datetime(form, strict=False) for form in DATES]
    return pl.coalesce(p.dt.replace_time_zone(None) for p in parsed).dt.timestamp("us") / 1e6


def _closed(data: bytes, sep: str) -> int:
    """Bytes before the quote that opens a field and is not closed. A quote within a field stands for itself."""
    field = re.compile(rb'(?<![^\n%b])"[^"]*(?:""[^"]*)*("(?!"))?' % sep.encode())
    return next((found.start() for found in field.finditer(data) if not found[1]), len(data))


def _blocks(layout: Layout, columns: dict[str, str]) -> Iterator[tuple[int, Any]]:
    """(number of the first line, UTF-8 bytes of whole records without mark and header); of Parquet frames."""
    line, rest, path = 1, b"", layout.path
    if layout.kind == "parquet":
        for frame in pl.scan_parquet(path).select(**columns).collect_batches(maintain_order=True):
            if nested := [name for name, kind in frame.schema.items() if kind.is_nested()]:
                lists = frame.select(nested).write_ndjson().encode()  # told as the JSON formats tell them
                frame = frame.with_columns(pl.read_ndjson(lists, schema=dict.fromkeys(nested, pl.String)))
            yield line, frame.fill_nan(None)  # as pandas marks what is missing
            line += len(frame)
        return
    decoder = None if layout.encoding.lower() in ("utf-8", "utf8") else codecs.getincrementaldecoder(layout.encoding)()
    size = path.stat().st_size >> 20
    with _open(path) as file, progress(total=size, desc=f"reading {path.name}", unit="MB") as bar:
        while True:
            chunk = file.read(BLOCK)
            bar.update((getattr(file, "fileobj", file).tell() >> 20) - bar.n)  # in the packed file, of a gzip file
            try:
                data = rest + (decoder.decode(chunk, not chunk).encode() if decoder else chunk)
            except UnicodeError as error:
                raise UserError(f"{path}: after line {line}: {error}; name another --encoding") from error
            data = data.removeprefix(b"\xef\xbb\xbf") if line == 1 else data
            cut = data.rfind(b"\n") + 1 if chunk else len(data)
            if chunk and layout.quote:  # the last line may end inside a quoted field
                cut = data.rfind(b"\n", 0, _closed(data[:cut], layout.sep)) + 1
            block, rest = data[:cut], data[cut:]
            first, line = line, line + block.count(b"\n")
            if first == 1 and layout.kind == "delimited" and layout.header:
                rows = block.lstrip().partition(b"\n")[2]  # blank lines may stand before the header
                first, block = 1 + block.count(b"\n", 0, len(block) - len(rows)), rows
            if block := block.rstrip(b"\r\n"):
                yield first, block
            if not chunk:
                return


def _parse(data: Any, layout: Layout, columns: dict[str, str]) -> pl.DataFrame:
    """The roles of a block as text, by Polars. Raises PolarsError where the block needs a closer look."""
    if layout.kind == "parquet":
        return data
    if layout.kind == "json":
        if re.search(rb"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])", data):  # Polars reads the first half alone as NUL
            raise pl.exceptions.ComputeError("half a character")
        return pl.read_ndjson(data, schema=dict.fromkeys(columns.values(), pl.String)).select(**columns)
    if b"\0" in data:
        raise pl.exceptions.ComputeError("NUL")
    sep = layout.sep
    if sep == " ":
        data, sep = b"\n".join(b"\t".join(line.split()) for line in data.split(b"\n")), "\t"
    elif sep == "\n":
        data, sep = re.sub(rb"(?m)^[ \t]*(\S+)[ \t]+", rb"\1\0", data), "\0"
    elif len(sep.encode()) > 1:
        data, sep = data.replace(sep.encode(), b"\t"), "\t"
    schema, quote = dict.fromkeys(layout.names, pl.String), '"' if layout.quote else None
    return pl.read_csv(data, has_header=False, schema=schema, separator=sep, quote_char=quote).select(**columns)


def _walk(data: Any, layout: Layout, columns: dict, line: int, wrong: list) -> tuple[pl.DataFrame, list[int]]:
    """The same in Python, record by record: frame and line of each row. What is no record goes to `wrong`."""
    if layout.kind == "parquet":
        return data, list(range(line, line + len(data)))
    raw, at = data.split(b"\n"), 0
    rows: list[list[str | None]] = []
    lines: list[int] = []
    while at < len(raw):
        first, at = at, at + 1
        texts = (part.decode() + "\n" for part in raw[first : first + 1000])  # Choice: no field has more lines
        try:
            if not raw[first].strip():
                continue
            if b"\0" in raw[first]:
                raise ValueError("it holds a NUL byte")
            if layout.kind == "json":
                found = value_of(next(texts))
                if not isinstance(found, dict):
                    raise ValueError("it is no JSON object")
            else:
                reader = _fields(texts, layout.sep, layout.quote, strict=True)
                fields = next(reader)
                at = first + getattr(reader, "line_num", 1)
                if len(fields) > len(layout.names):
                    raise ValueError(f"{len(fields)} fields where {len(layout.names)} are named")
                found = dict(zip(layout.names, fields, strict=False))
            rows.append([_text(found.get(column)) for column in columns.values()])
            lines.append(line + first)
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02X} at place {error.start + 1} is no UTF-8"
            wrong.append((line + first, f"{byte}; try --encoding latin-1"))
        except (ValueError, TypeError, csv.Error) as error:
            wrong.append((line + first, "a quote is not closed" if "end of data" in str(error) else str(error)))
    return pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row"), lines


def frames(layout: Layout, bad: Bad, text: bool = False) -> Iterator[pl.DataFrame]:
    """Rows of a log: user, item as trimmed text; rating, time float64, null if it has none; text if asked for.

    A time stays in the file's unit (dates become seconds); in a history it is a running number.
    Of an item file: the columns of ITEM_ROLES it has, as text; lists stand as JSON.
    Raises UserError naming the lines that cannot be read, unless `bad` skips them.
    """
    n_rows = 0
    columns = {role: column for role, column in layout.columns.items() if text or role != "text"}
    for line, data in _blocks(layout, columns):
        try:
            frame = _check(_parse(data, layout, columns), layout)
            if frame["why"].null_count() < len(frame):
                raise pl.exceptions.ComputeError("bad rows")
        except (pl.exceptions.PolarsError, OSError):  # OSError: Polars takes a block that begins like gzip for gzip
            wrong: list[tuple[int, str]] = []
            frame, lines = _walk(data, layout, columns, line, wrong)
            try:
                frame = _check(frame, layout)
            except pl.exceptions.PolarsError as error:  # in Parquet: bytes that are no UTF-8, or a length of time
                raise UserError(f"{layout.path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
            wrong += [(n, why) for n, why in zip(lines, frame["why"], strict=True) if why]
            bad.add(layout.path, sorted(wrong))
        frame = frame.filter(pl.col("why").is_null())
        bad.n_trimmed += int(frame["trimmed"].sum())
        frame = frame.drop("why", "trimmed")
        if "history" in columns:
            frame = frame.with_columns(pl.col("item").str.split(PART)).explode("item")
            frame = frame.with_columns(pl.col("item").str.strip_chars()).filter(pl.col("item") != "")
            if layout.unit:
                frame = frame.with_columns(time=pl.int_range(n_rows, n_rows + pl.len()).cast(pl.Float64))
        n_rows += len(frame)
        yield frame


def _id(frame: pl.DataFrame, role: str) -> pl.Expr:
    """An id as text: a whole number held as a float (pandas does so beside a gap) without its fraction, as in JSON."""
    text = pl.col(role).cast(pl.String)
    return text.str.replace(r"\.0$", "") if frame[role].dtype.is_float() else text


def _check(frame: pl.DataFrame, layout: Layout) -> pl.DataFrame:
    """Ids trimmed, numbers and dates parsed; `trimmed`: an id had blanks; `why`: what is wrong with a row, or null."""
    if "user" not in layout.columns:  # an item file
        item, fine = _id(frame, "item").str.strip_chars(), pl.lit(None, pl.String)
        return frame.with_columns(item).cast(pl.String).with_columns(trimmed=False, why=fine)
    if "history" in frame.columns:  # the list (RecBole's "a b", or a Python list), then the target; ratings are its
        # Not in an expression: Python's parser (3.11) fails when it is at work in several threads, as Polars has them.
        told = frame["history"].cast(pl.String).str.strip_chars()
        past = pl.Series([t and (_members(t) if t[0] == "[" else PART.join(t.split())) for t in told])
        target = [pl.col("item")] if "item" in frame.columns else []
        frame = frame.select("user", item=pl.concat_str(past, *target, separator=PART, ignore_nulls=True))
    whys: list[Any] = []
    ids = {role: _id(frame, role) for role in ("user", "item")}
    values = {role: raw.str.strip_chars() for role, raw in ids.items()}
    trimmed = pl.any_horizontal(values[role] != raw for role, raw in ids.items())
    for role in ("user",) if "history" in layout.columns else ("user", "item"):
        whys.append(pl.when(values[role].fill_null("") == "").then(pl.lit(f"no {role}")))
    for role in ("rating", "time"):
        if role not in frame.columns:
            values[role] = pl.lit(None, pl.Float64)
            continue
        raw = pl.col(role).cast(pl.String).str.strip_chars()
        by_text = (pl.String, pl.Binary, pl.Categorical, pl.Enum, pl.Float32)  # 4.1 in float32 is 4.0999999
        value = (raw if frame[role].dtype in by_text else pl.col(role)).cast(pl.Float64, strict=False)
        wanted = "number" if role == "rating" or layout.unit else "number or date like 2015-01-31"
        if role == "time" and layout.unit == "date":
            wanted = "date"
            value = pl.col("time").dt.timestamp("us") / 1e6 if frame["time"].dtype.is_temporal() else _date(raw)
        whys.append(pl.when(raw.fill_null("") == "").then(pl.lit(f"no {role}")))
        fault = pl.format(f"{role} '{{}}' is no {wanted}", raw.str.slice(0, 80))
        whys.append(pl.when(~value.is_finite().fill_null(False)).then(fault))
        if role == "time" and layout.guessed and layout.unit in UNITS:
            low, high = UNITS[layout.unit]
            fault = pl.format(f"time {{}} cannot be in {layout.unit} as the first one is (or name --time-unit)", raw)
            whys.append(pl.when(~value.abs().is_between(low, high, "left")).then(fault))
        values[role] = value
    if "text" in frame.columns:
        values["text"] = pl.col("text")
    return frame.select(**values, trimmed=trimmed, why=pl.coalesce(whys))
