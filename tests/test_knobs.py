"""Knobs: where a value comes from, and what is said when it is wrong."""

from dataclasses import dataclass, fields

import pytest

from hnlm_ref.artifacts import STAGES
from hnlm_ref.cli import load_stage
from hnlm_ref.console import UserError
from hnlm_ref.knobs import cast, check, knob, load_preset, method_knobs, resolve


@dataclass(frozen=True)
class Config:
    n_epochs: int = knob(3, "epochs", low=1)
    lr: float = knob(0.1, "learning rate")
    k: tuple[int, ...] = knob((10,), "lengths", low=1)
    mode: str = knob("text", "mode", choices=("text", "cf"))
    cut: float | None = knob(None, "cut")
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
        (tuple[int, ...], "5, 10", (5, 10)),
        (tuple[str, ...], ["a"], ("a",)),
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
        ({"n_epochs": 2**31}, "preset: n_epochs = 2147483648: a whole number below 2^31 is wanted"),
        ({"lr": float("nan")}, "preset: lr = nan: a number is wanted"),
        ({"lr": "inf"}, "preset: lr = 'inf': a number is wanted"),
        ({"k": []}, "preset: k = []: at least one is wanted"),
        ({"k": 10}, "preset: k = 10: a list is wanted"),
        ({"k": [10, 0]}, "preset: k = [10, 0]: at least 1 is wanted"),
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


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="no preset 'tay': did you mean 'toy'"):
        load_preset("tay")


def test_a_preset_with_an_unknown_table_or_broken_toml_is_refused(tmp_path):
    (tmp_path / "a.toml").write_text("[trian]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"unknown table \[trian\]; did you mean 'train'"):
        load_preset(str(tmp_path / "a.toml"))
    (tmp_path / "b.toml").write_text("[train\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"b\.toml"):
        load_preset(str(tmp_path / "b.toml"))
    for text, sentence in (
        ("run = 3", "run = 3: a table of knobs"),
        ("[methods]\na = 'dns'", "methods = {'a': 'dns'}: a table of knobs"),
        ("[grid]\na = 3", "grid = {'a': 3}: a table of knobs"),
        ("extends = 3", "extends = 3: the name of another preset"),
        ("extends = 'c.toml'", r"extends = 'c\.toml': the name of another preset"),  # itself
    ):
        (tmp_path / "c.toml").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=sentence):
            load_preset(str(tmp_path / "c.toml"))


def test_a_method_without_a_table_is_the_sampler_of_that_name():
    tables = {"methods": {"hard": {"sampler": "dns"}}}
    assert method_knobs(tables, "hard") == {"sampler": "dns"}
    assert method_knobs(tables, "uniform") == {"sampler": "uniform"}


def test_every_field_carries_a_help_text():
    assert all(field.metadata["help"] for field in fields(Config))


def test_a_preset_lies_over_the_one_it_extends(tmp_path):
    (tmp_path / "low.toml").write_text("[run]\nseed = 1\nn_seeds = 2\n[methods.a]\nlr = 0.1\ndim = 8\n")
    (tmp_path / "high.toml").write_text(
        'extends = "low.toml"\n[run]\nseed = 3\n[methods.a]\ndim = 9\n[prep]\nk_core = 2\n'
    )
    expected = {"run": {"seed": 3, "n_seeds": 2}, "methods": {"a": {"lr": 0.1, "dim": 9}}, "prep": {"k_core": 2}}
    assert load_preset(str(tmp_path / "high.toml")) == expected
    (tmp_path / "lost.toml").write_text('extends = "toyz"\n')
    with pytest.raises(UserError, match=r"no preset 'toyz': did you mean 'toy'"):
        load_preset(str(tmp_path / "lost.toml"))


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", ".x", "..", ""])
def test_a_method_cannot_leave_the_folder_of_the_run(name):
    with pytest.raises(UserError, match="it may hold no slash and not begin with a dot"):
        method_knobs({}, name)
