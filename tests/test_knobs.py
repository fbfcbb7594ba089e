"""Knobs: where a value comes from, and what is said when it is wrong."""

import os
from dataclasses import dataclass, fields
from pathlib import Path

import click
import pytest

from hnlm_ref.artifacts import STAGES, Run
from hnlm_ref.cli import load_stage
from hnlm_ref.console import QUIET, UserError
from hnlm_ref.knobs import RunConfig, StageCommand, cast, check, knob, load_preset, method_layer, open_run, resolve
from hnlm_ref.profiles import AskConfig


@dataclass(frozen=True)
class Config:
    n_epochs: int = knob(3, "epochs", low=1)
    lr: float = knob(0.1, "learning rate")
    k: tuple[int, ...] = knob((10,), "lengths", low=1)
    mode: str = knob("text", "mode", choices=("text", "cf"))
    cut: float | None = knob(None, "cut", low=0, high=1)
    deep: bool = knob(False, "deep")


def test_the_last_layer_that_names_a_knob_wins():
    cfg = resolve(Config, ("preset", {"n_epochs": 5, "lr": 1}), ("command line", {"n_epochs": "7"}))
    assert (cfg.n_epochs, cfg.lr, cfg.k) == (7, 1.0, (10,))


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        (int, "5", 5),
        (float, 5, 5.0),
        (float, "1e-3", 0.001),
        (bool, "true", True),
        (bool, "False", False),
        (tuple[int, ...], "5, 10,", (5, 10)),
        (tuple[str, ...], ["a"], ("a",)),
        (tuple[str, ...], "a, b", ("a", "b")),
        (float | None, "none", None),
        (float | None, "2", 2.0),
    ],
)
def test_a_value_is_cast_to_the_type_of_its_knob(kind, value, wanted):
    assert cast(kind, value) == wanted and type(cast(kind, value)) is type(wanted)


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        ({"n_epoch": 5}, "preset: unknown key 'n_epoch'; did you mean 'n_epochs'?"),
        ({"n_epochs": 2.5}, "preset: n_epochs = 2.5: a whole number is wanted"),
        ({"n_epochs": True}, "preset: n_epochs = True: a whole number is wanted"),
        ({"n_epochs": 0}, "preset: n_epochs = 0: at least 1 is wanted"),
        ({"lr": "much"}, "preset: lr = 'much': a number is wanted"),
        ({"cut": -0.01}, "preset: cut = -0.01: at least 0 is wanted"),
        ({"cut": float("nan")}, "preset: cut = nan: at least 0 is wanted"),
        ({"lr": "nan"}, "preset: lr = 'nan': a number is wanted"),
        ({"cut": 1.01}, "preset: cut = 1.01: at most 1 is wanted"),
        ({"k": []}, "preset: k = []: at least one is wanted"),
        ({"k": 10}, "preset: k = 10: a list is wanted"),
        ({"k": [10, 0]}, "preset: k = [10, 0]: at least 1 is wanted"),
        ({"mode": ""}, "preset: mode = '': it is empty"),
        ({"mode": "tex"}, "preset: mode = 'tex': one of text, cf is wanted"),
        ({"deep": 1}, "preset: deep = 1: true or false is wanted"),
    ],
)
def test_a_wrong_value_is_one_sentence_with_place_and_value(layer, sentence):
    with pytest.raises(UserError) as error:
        resolve(Config, ("preset", layer))
    assert error.value.message == sentence


@pytest.mark.parametrize("stage", STAGES)
def test_every_default_could_be_named_as_well(stage):
    for field in fields(load_stage(stage).config):
        assert check(field, field.default) == field.default


def test_bounds_are_among_the_values_and_none_is_held_against_no_bound():
    cuts = [resolve(Config, ("preset", {"cut": value})).cut for value in (0, 1, "none")]
    assert cuts == [0.0, 1.0, None]


@pytest.mark.parametrize(
    ("config", "name", "value", "sentence"),
    [
        (RunConfig, "seed", -1, "at least 0"),
        (RunConfig, "n_seeds", 0, "at least 1"),
        (RunConfig, "n_threads", -1, "at least 0"),
        (RunConfig, "n_threads", 1025, "at most 1024"),
        (RunConfig, "device", "gpu", "one of auto, cpu, cuda"),
        (AskConfig, "concurrency", 0, "at least 1"),
        (AskConfig, "timeout_s", 0, "at least 0.1"),
        (AskConfig, "n_retries", -1, "at least 0"),
        (AskConfig, "max_new_tokens", 0, "at least 1"),
        (AskConfig, "ask_batch_size", 0, "at least 1"),
    ],
)
def test_what_several_stages_share_has_bounds(config, name, value, sentence):
    with pytest.raises(UserError, match=f"{name} = {value!r}: {sentence} is wanted"):
        resolve(config, ("preset", {name: value}))


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="no preset 'tay': did you mean 'toy'"):
        load_preset("tay")


def test_a_preset_with_an_unknown_table_or_broken_toml_is_refused(tmp_path):
    (tmp_path / "a.toml").write_text("[trian]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"unknown table \[trian\]; did you mean 'train'"):
        load_preset(str(tmp_path / "a.toml"))
    for text in (
        "methods = ['dns']\n",
        "[methods]\nsoft.lr = 1\nhard = 'dns'\n",
        "[grid]\ndns = [2, 4]\n",
        "prep = 'log.csv'\n",
    ):
        (tmp_path / "a.toml").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"a\.toml: (methods|grid|prep) = .*: a table of knobs is wanted"):
            load_preset(str(tmp_path / "a.toml"))
    (tmp_path / "a.toml").write_text("extends = ['toy', 'ml-100k']\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"no preset .*toy.*: known are"):
        load_preset(str(tmp_path / "a.toml"))
    (tmp_path / "c.toml").write_text("\ufeff[train]\r\nn_epochs = 7\r\n", encoding="utf-8")  # as Windows writes it
    assert load_preset(str(tmp_path / "c.toml")) == {"train": {"n_epochs": 7}}
    (tmp_path / "b.toml").write_text("[train\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"b\.toml"):
        load_preset(str(tmp_path / "b.toml"))


def test_a_stage_gets_what_the_command_line_its_preset_and_the_defaults_say(tmp_path, monkeypatch):
    monkeypatch.setenv(QUIET, "")
    preset, seen = tmp_path / "mine.toml", []
    shared = f"run_dir = '{tmp_path}/x/{{preset}}'\nseed = 3\nn_seeds = 2\nmethods = ['b', 'a', 'b']\nn_threads = 2\n"
    preset.write_text(f"[run]\n{shared}[prep]\nn_epochs = 5\nlr = 0.5\n", encoding="utf-8")
    command = StageCommand("prep", Config, lambda cfg, run: seen.append((cfg, run)) or {})
    command.main(["--preset", str(preset), "--lr", "0.2", "--deep", "--device", "cpu"], standalone_mode=False)
    folder = tmp_path / "x" / "mine"
    run = Run(folder, 3, "cpu", 2, str(preset), ("b", "a"), 2, folder / ".prep.partial")
    assert seen == [(Config(n_epochs=5, lr=0.2, deep=True), run)]
    assert os.environ[QUIET] == ""
    monkeypatch.chdir(tmp_path)
    command.main(["--quiet"], standalone_mode=False)
    folder = Path("runs/custom")
    run = Run(folder, methods=("uniform", "dns", "hnlm"), out=folder / ".prep.partial")
    assert seen[1] == (Config(), run) and os.environ[QUIET] == "1"


@dataclass(frozen=True)
class Train:
    method: str = knob("uniform", "method")
    sampler: str = knob("uniform", "sampler", choices=("uniform", "dns"))
    lr: float = knob(0.1, "learning rate")


def test_a_training_reads_the_table_of_its_method_between_the_stage_s_and_the_command_line():
    configure = StageCommand("train", Train, lambda cfg, run: {}).configure
    tables = {"train": {"method": "hard", "lr": 0.5}, "methods": {"hard": {"sampler": "dns", "lr": 0.25}}}
    for words, wanted in (
        ({}, Train("hard", "dns", 0.25)),
        ({"lr": 1.0}, Train("hard", "dns", 1.0)),
        ({"method": "uniform"}, Train("uniform", "uniform", 0.5)),
        ({"method": "hard@lr=2@sampler=uniform"}, Train("hard@lr=2@sampler=uniform", "uniform", 2.0)),
        ({"method": "mine", "sampler": "dns"}, Train("mine", "dns", 0.5)),  # no sampler is called mine
    ):
        assert configure(tables, ("", words)) == wanted
    assert configure({}, ("", {})) == Train() and configure({"train": {"lr": 2}}, ("", {})).lr == 2
    for method, sentence in (
        ("hard@lrr=2", "preset [methods.hard@lrr=2]: unknown key 'lrr'; did you mean 'lr'?"),
        (
            "hard@method=b",
            "preset [methods.hard@method=b] sets method = 'b', but its name is its method; sampler may be meant",
        ),
        ("dnn", "method 'dnn', which has no table in a preset: sampler = 'dnn': one of uniform, dns is wanted"),
    ):
        with pytest.raises(UserError) as error:
            configure(tables, ("", {"method": method}))
        assert error.value.message == sentence


def test_help_gives_each_knob_the_kind_of_its_value_and_its_default():
    command = StageCommand("prep", Config, lambda cfg, run: {})
    text = " ".join(command.get_help(click.Context(command)).split())
    for line in (
        "Knobs: where a value comes from, and what is said when it is wrong. Options:",
        "--n-epochs INT epochs [default: 3]",
        "--k LIST lengths [default: 10]",
        "--mode [text|cf] mode [default: text]",
        "--cut FLOAT cut [default: None]",
        "--deep / --no-deep deep [default: False]",
        "--run-dir TEXT folder of the run",
    ):
        assert line in text
    assert "--n-seeds" not in text and "--methods" not in text


def test_the_line_of_a_stage_names_the_options_that_it_has():
    line = StageCommand("prep", Config, lambda cfg, run: {}).line
    assert line({"n_seeds": 2, "preset": None})[1:] == [__file__.removeprefix(f"{Path.cwd()}/")]
    words = {"seed": 3, "deep": "true", "n_epochs": 5, "preset": "toy", "method": "dns"}
    assert line(words)[2:] == ["--preset", "toy", "--n-epochs", "5", "--deep", "--seed", "3"]
    assert line({"deep": "false"})[2:] == ["--no-deep"]


def test_a_preset_lies_over_the_one_it_extends(tmp_path, monkeypatch):
    (tmp_path / "low.toml").write_text("[run]\nseed = 1\nn_seeds = 2\n[methods.a]\nlr = 0.1\ndim = 8\n")
    (tmp_path / "high.toml").write_text(
        'extends = "low.toml"\n[run]\nseed = 3\n[methods.a]\ndim = 9\n[prep]\nk_core = 2\n'
    )
    expected = {"run": {"seed": 3, "n_seeds": 2}, "methods": {"a": {"lr": 0.1, "dim": 9}}, "prep": {"k_core": 2}}
    assert load_preset(str(tmp_path / "high.toml")) == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_preset("~/high.toml") == expected
    (tmp_path / "lost.toml").write_text('extends = "toyz"\n')
    with pytest.raises(UserError, match=r"no preset 'toyz': did you mean 'toy'"):
        load_preset(str(tmp_path / "lost.toml"))


def test_presets_that_extend_each_other_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text('extends = "a.toml"\n')
    for name in ("a.toml", str(tmp_path / "a.toml")):
        with pytest.raises(UserError, match=r"a\.toml extends itself, by way of 2 file"):
            load_preset(name)


def test_a_table_under_the_name_of_a_sampler_is_of_that_sampler():
    tables = {"methods": {"dns": {"pool_size": 8}, "mine": {"lr": 0.1}, "ahns": {"sampler": "mixgcf"}}}
    made = {m: load_stage("train").configure(tables, ("", {"method": m})) for m in ("dns", "dns@lr=1", "mine", "ahns")}
    assert [cfg.sampler for cfg in made.values()] == ["dns", "dns", "uniform", "mixgcf"]
    assert [cfg.pool_size for cfg in made.values()] == [8, 8, 4, 4]


def test_the_run_folder_may_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.toml").write_text('[run]\nrun_dir = "~/runs/{preset}"\n', encoding="utf-8")
    assert open_run(str(tmp_path / "p.toml"), False, {})[1].dir == tmp_path / "runs" / "p"


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", ".x", "..", "", "generated"])
def test_a_method_cannot_leave_the_folder_of_the_run(name):
    with pytest.raises(UserError, match="no slash, no dot at first"):
        method_layer({}, name, ())
