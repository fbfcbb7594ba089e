"""Knobs: a stage's dataclass becomes its command line, a preset's TOML table its defaults.

Order, strongest first: command line, `[methods.NAME]` of the preset (training only), the stage's table in the preset,
the dataclass. An unknown key or a value of the wrong kind stops the run with one sentence.
"""

import dataclasses
import difflib
import inspect
import os
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from hnlm_ref.artifacts import STAGES, Run, resolve_path, run_stage, stage_key
from hnlm_ref.console import QUIET, UserError, system_errors_told

PRESETS = Path(__file__).parent / "presets"
TABLES = ("run", *STAGES, "methods", "grid")  # of a preset


def knob(default: Any, help: str, choices: Iterable[str] = (), **bounds: float) -> Any:
    """A dataclass field with its one-line help, and perhaps its allowed words, or bounds low and high (inclusive)."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, **bounds})


@dataclass(frozen=True)
class RunConfig:
    """Knobs that every stage shares: the preset's [run] table."""

    run_dir: str = knob("runs/{preset}", "folder of the run; {preset} stands for the preset's name")
    seed: int = knob(0, "seed of every random choice", low=0)
    n_seeds: int = knob(1, "train and evaluate with this many seeds: seed, seed + 1, ...", low=1)
    methods: tuple[str, ...] = knob(("uniform", "dns", "hnlm"), "what to train: [methods.NAME] tables, or samplers")
    device: str = knob("auto", "where torch computes: auto takes the GPU if there is one", ("auto", "cpu", "cuda"))
    n_threads: int = knob(0, "threads, 0 for all cores; no result depends on it", low=0, high=1024)


def cast(kind: Any, value: Any) -> Any:
    """Turn a TOML value or a command-line word into `kind`. Raises ValueError saying what was wanted."""
    if isinstance(kind, types.UnionType):  # ... | None
        return None if value in (None, "none") else cast(typing.get_args(kind)[0], value)
    if typing.get_origin(kind) is tuple:
        values = value.split(",") if isinstance(value, str) else value
        if not isinstance(values, list | tuple):
            raise ValueError("a list is wanted")
        return tuple(cast(typing.get_args(kind)[0], v.strip() if isinstance(v, str) else v) for v in values if v != "")
    try:
        return {"true": True, "false": False}[str(value).lower()] if kind is bool else kind(str(value))
    except (KeyError, ValueError):
        words = {bool: "true or false", int: "a whole number", float: "a number"}
        raise ValueError(f"{words[kind]} is wanted") from None


def check(field: dataclasses.Field, value: Any) -> Any:
    """Cast `value` to the field's type and hold it against its words and bounds. Raises ValueError."""
    value = cast(field.type, value)
    choices, low, high = (field.metadata.get(name) for name in ("choices", "low", "high"))
    if value == "":  # perhaps that of a shell's variable which is not set
        raise ValueError("it is empty")
    if value == () and field.default:
        raise ValueError("at least one is wanted")
    for v in value if isinstance(value, tuple) else (value,):
        if choices and v not in choices:
            raise ValueError(f"one of {', '.join(choices)} is wanted")
        if v is not None and low is not None and not v >= low:  # nor is nan
            raise ValueError(f"at least {low} is wanted")
        if v is not None and high is not None and not v <= high:
            raise ValueError(f"at most {high} is wanted")
        if v != v:  # nan, which no comparison would find
            raise ValueError("a number is wanted")
    return value


def unknown(name: str, known: Collection[str]) -> str:
    """End of the sentence on a name that does not exist: the nearest one that does, or all of them."""
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"


# ---- presets ----------------------------------------------------------------------------------------------------


def load_preset(name: str | None, beside: Path = Path(), above: tuple[Path, ...] = ()) -> dict[str, dict]:
    """The tables of a preset, by name or by path to a .toml file; no preset has no tables.

    `extends = NAME` in its first lines lays them over those of another preset; a path there is relative to the file.
    """
    if name is None:
        return {}
    path = beside / resolve_path(name) if name.endswith(".toml") else PRESETS / f"{name}.toml"
    if not path.is_file():
        raise UserError(f"no preset {name!r}: {unknown(name, sorted(p.stem for p in PRESETS.glob('*.toml')))}")
    if path.resolve() in above:
        raise UserError(f"preset {path} extends itself, by way of {len(above)} file(s); leave out one `extends`")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"preset {path}: {error}") from error
    below = load_preset(cast(str | None, tables.pop("extends", None)), path.parent, (*above, path.resolve()))
    for table, content in tables.items():
        if table not in TABLES:
            raise UserError(f"preset {path}: unknown table [{table}]; {unknown(table, TABLES)}")
        inner = content.values() if isinstance(content, dict) and table in ("methods", "grid") else [content]
        if not all(isinstance(part, dict) for part in inner):
            raise UserError(f"preset {path}: {table} = {content!r}: a table of knobs is wanted")
    return _lay_over(below, tables)


def _lay_over(below: dict, above: dict) -> dict:
    """Both, `above` winning, table by table to the bottom."""
    both = {k: _lay_over(below[k], v) for k, v in above.items() if isinstance(v, dict) and k in below}
    return below | above | both


def resolve(config: type, *layers: tuple[str, dict]) -> Any:
    """Build `config` from its defaults and (where it was said, values) layers, the last one winning."""
    fields = {f.name: f for f in dataclasses.fields(config)}
    values: dict[str, Any] = {}
    for where, layer in layers:
        for name, value in layer.items():
            if name not in fields:
                raise UserError(f"{where}: unknown key {name!r}; {unknown(name, fields)}")
            try:
                values[name] = check(fields[name], value)
            except ValueError as error:
                raise UserError(f"{where}: {name} = {value!r}: {error}") from error
    return config(**values)


def method_layer(tables: dict[str, dict], method: str, samplers: Collection[str]) -> tuple[str, dict]:
    """What a method sets: its table in the preset, and the changes in its name, as in "dns@pool_size=8".

    One without a table is the sampler of that name; a table under the name of a sampler is of that sampler.
    """
    if "/" in method or method.startswith(".") or method in ("", "generated"):
        raise UserError(f"method {method!r} is a folder's name: no slash, no dot at first, nor 'generated' (stage 3's)")
    name, *changes = method.split("@")
    table = tables.get("methods", {}).get(name)
    where = f"method {method!r}, which has no table in a preset" if table is None else f"preset [methods.{method}]"
    own = {"sampler": name} if table is None or name in samplers else {}
    knobs = own | (table or {}) | dict(change.partition("=")[::2] for change in changes)
    if "method" in knobs:
        raise UserError(f"{where} sets method = {knobs['method']!r}, but its name is its method; sampler may be meant")
    return where, knobs


# ---- command lines ----------------------------------------------------------------------------------------------


def options(fields: Iterable[dataclasses.Field]) -> list[click.Option]:
    """One click option per field; its value stays as typed, for `resolve` to check, its default unset, for a preset."""
    found = []
    for field in fields:
        flag, switch = field.name.replace("_", "-"), field.type is bool
        names = [f"--{flag}/--no-{flag}" if switch else f"--{flag}", field.name]
        default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
        help = f"{field.metadata['help']}  [default: {default}]"
        kind = getattr(field.type, "__name__", str(field.type).removesuffix(" | None"))
        kind = {"tuple": "list", "str": "text"}.get(kind, kind).upper()
        choices = field.metadata["choices"]
        metavar = "[" + "|".join(choices) + "]" if choices else kind
        found.append(click.Option(names, default=None, help=help, metavar=None if switch else metavar))
    return found


COMMON = (
    click.Option(["--preset"], help="named settings: " + ", ".join(sorted(p.stem for p in PRESETS.glob("*.toml")))),
    click.Option(["--quiet"], is_flag=True, help="no progress and no remarks on stderr"),
)


def given(config: type, params: dict) -> tuple[str, dict]:
    """The layer of what was typed on the command line."""
    names = {f.name for f in dataclasses.fields(config)}
    return "command line", {k: v for k, v in params.items() if k in names and v is not None}


def open_run(preset: str | None, quiet: bool, params: dict) -> tuple[dict[str, dict], Run]:
    """The preset's tables, and the run that they and the command line ask for."""
    if quiet:
        os.environ[QUIET] = "1"
    tables = load_preset(preset)
    shared = resolve(RunConfig, ("preset [run]", tables.get("run", {})), given(RunConfig, params))
    name = Path(preset).stem if preset else "custom"
    folder = resolve_path(shared.run_dir.replace("{preset}", name))
    methods = tuple(dict.fromkeys(shared.methods))
    return tables, Run(folder, shared.seed, shared.device, shared.n_threads, preset, methods, shared.n_seeds)


class StageCommand(click.Command):
    """The command of one stage: its dataclass as options, its `main` behind skip, resume and manifest.

    main    (config, Run) -> {"counts": ..., "timing": ...}
    reads   names of the stages it reads, or a function of (config, Run) giving them
    files   function of the config giving names of outside files that go into the result
    """

    def __init__(self, stage: str, config: type, main: Callable, reads: Any = (), files: Any = lambda cfg: ()):
        self.stage, self.config, self.main_function, self.reads, self.files = stage, config, main, reads, files
        self.source = Path(main.__code__.co_filename)
        help = inspect.cleandoc(main.__globals__["__doc__"] or "").partition("\n\n")[0]
        several = () if stage == "eval" else ("n_seeds", "methods")  # only eval looks at more than one training
        shared = [f for f in dataclasses.fields(RunConfig) if f.name not in several]
        params: list[click.Parameter] = [*COMMON, *options(dataclasses.fields(config)), *options(shared)]
        super().__init__(stage, params=params, callback=self._call, help=help)

    def configure(self, tables: dict[str, dict], typed: tuple[str, dict]) -> Any:
        """The stage's knobs from all layers. Training reads its method's table too."""
        layers = [(f"preset [{self.stage}]", tables.get(self.stage, {}))]
        if self.stage == "train":
            method = (layers[0][1] | typed[1]).get("method", "uniform")
            where, knobs = method_layer(tables, method, self.samplers)
            layers.append((where, {k: v for k, v in knobs.items() if k not in typed[1]}))
        return resolve(self.config, *layers, typed)

    @property
    def samplers(self) -> tuple[str, ...]:
        """The words of training's knob `sampler`."""
        return next(f.metadata["choices"] for f in dataclasses.fields(self.config) if f.name == "sampler")

    def line(self, words: dict[str, Any]) -> list[str]:
        """What to type for this stage with these options; those that it does not have are left out."""
        here = Path.cwd()
        line = [sys.executable, str(self.source.relative_to(here) if self.source.is_relative_to(here) else self.source)]
        for option in self.params:
            value = words.get(option.name or "")
            if value is not None and option.secondary_opts:
                line += option.opts if cast(bool, value) else option.secondary_opts
            elif value is not None:
                line += [option.opts[0], str(value)]
        return line

    def plan(self, cfg: Any, run: Run) -> tuple[str, dict, dict, str]:
        """Folder, knobs, input fingerprints and key of this stage."""
        knobs = dataclasses.asdict(cfg)
        inputs = run.inputs(self.reads(cfg, run) if callable(self.reads) else self.reads)
        folder = f"train/{cfg.method}/seed{run.seed}" if self.stage == "train" else self.stage
        return folder, knobs, inputs, stage_key(knobs, run.seed, inputs, self.files(cfg), self.source)

    def _call(self, preset: str | None, quiet: bool, **params: Any) -> None:
        with system_errors_told():
            tables, run = open_run(preset, quiet, params)
            cfg = self.configure(tables, given(self.config, params))
            folder, knobs, inputs, key = self.plan(cfg, run)
            run_stage(folder, run, knobs, inputs, key, lambda run: self.main_function(cfg, run))
