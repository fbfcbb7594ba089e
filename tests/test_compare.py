"""`hnlm-ref compare`: grids, failures, and its table against the files it was made from."""

import dataclasses
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from hnlm_ref import compare
from hnlm_ref.artifacts import Run, load_json, load_npy, save_json, save_npy
from hnlm_ref.cli import load_stage
from hnlm_ref.compare import SHARED, run_stages, settings
from hnlm_ref.console import UserError
from hnlm_ref.view import View


def test_a_text_where_a_grid_wants_a_list_is_refused():  # case B16: never its single characters
    assert settings({"pool_size": [2, 4]}) == ["@pool_size=2", "@pool_size=4"]
    for wrong in ("24", 24, []):
        with pytest.raises(UserError, match=f"pool_size = {wrong!r}: a list of values".replace("[", r"\[")):
            settings({"pool_size": wrong})


def test_a_training_that_was_killed_names_the_number_of_jobs():
    killed = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    with pytest.raises(UserError, match="the system killed a stage, perhaps for want of memory"):
        run_stages([killed], 2)
    with pytest.raises(SystemExit, match="3"):
        run_stages([[sys.executable, "-c", "raise SystemExit(3)"]], 2)


def test_after_a_failure_what_runs_ends_and_nothing_else_begins(tmp_path):
    def python(text):
        return [sys.executable, "-c", f"import pathlib, time; {text}"]

    touch = [f"pathlib.Path({str(tmp_path / str(n))!r}).touch()" for n in range(6)]
    run_stages(map(python, touch[:3]), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]
    with pytest.raises(SystemExit):
        run_stages([python("raise SystemExit(1)"), *(python(f"time.sleep(1); {text}") for text in touch[3:])], 1)
    assert sorted(path.name for path in tmp_path.iterdir())[3:] in ([], ["3"])


def test_a_failure_is_seen_while_another_training_still_runs(tmp_path):
    touch = [["touch", str(tmp_path / str(n))] for n in range(100)]
    with pytest.raises(SystemExit):
        run_stages([["sleep", "3"], ["false"], *touch], 2)
    assert len(list(tmp_path.iterdir())) < 100


NAMES = ("uniform", "dns@pool_size=2", "dns@pool_size=4", "hnlm")


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run of which everything is there, and the commands that compare asks for, in batches."""
    monkeypatch.setattr(compare, "run_stages", lambda commands, n_jobs: batches.append((list(commands), n_jobs)))
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(View, "prep", SimpleNamespace(users=[{"key": str(n)} for n in range(40)]))
    batches: list = []
    run = Run(tmp_path, seed=5, n_seeds=2, methods=("uniform", "dns", "hnlm"), n_threads=5)
    stages = {"prep": {"valid": 9, "test": 9}, "generate": {}, "eval": {}}
    scores = dict(zip(NAMES, (0.1, 0.4, 0.2, 0.3), strict=True))
    for variant, score in scores.items():
        for seed in (5, 6):
            stages[f"train/{variant}/seed{seed}"] = {"valid ndcg@20": score, "best epoch": 10 * seed}
            save_npy(tmp_path / f"{variant}-seed{seed}.npy", score * (1 + (seed - 5) * np.eye(2, 40)))
    for stage, counts in stages.items():
        (tmp_path / stage).mkdir(parents=True)
        timing = {"seconds_per_epoch": 1.5 if stage.endswith("5") else 2.0}
        manifest = {
            "counts": counts,
            "timing": timing,
            "inputs": {},
            "fingerprint": "",
            "knobs": {name: "hnlm" in stage or stage[-5:] for name in SHARED},
        }
        save_json(tmp_path / stage / "manifest.json", manifest)
    (tmp_path / "eval" / "per_user").mkdir()
    for path in tmp_path.glob("*.npy"):
        path.rename(tmp_path / "eval" / "per_user" / path.name)
    told = {v: {f"seed{s}": {"recall@20": x + s / 100, "ndcg@20": x} for s in (5, 6)} for v, x in scores.items()}
    metrics = {"k": [20, 10], "columns": ["recall@20", "ndcg@20"], "methods": told}
    save_json(tmp_path / "eval" / "metrics.json", metrics)
    return run, batches


def python_of(stage, run, **words):
    return load_stage(stage).line({"run_dir": run.dir, **words})


def test_compare_trains_every_setting_once_and_the_best_with_all_seeds(finished, capsys):
    run, batches = finished
    tables, stages = {"grid": {"dns": {"pool_size": [2, 4]}}}, {name: load_stage(name) for name in ("train", "eval")}
    tables["run"] = {"methods": ["dns", "mixgcf@dim=8"]}
    for name in ("ahns", "mixgcf@dim=8"):  # of a preset that is extended, and of its list: not asked for here
        tables["grid"][name] = {"pool_size": [3, 5]}
    text = compare.compare(run, tables, stages, (), 2)
    assert "budgets differ: uniform 1 settings, dns 2 settings, hnlm 1 settings" in capsys.readouterr().err
    tuned, trained = (
        [python_of("train", run, device="auto", method=v, seed=s, n_threads=2) for v in some for s in seeds]
        for some, seeds in ((NAMES, [5]), ((*NAMES[:2], NAMES[3]), [5, 6]))
    )
    words = {"methods": "uniform,dns@pool_size=2,hnlm", "n_seeds": 2, "seed": 5}
    assert batches == [(tuned, 2), (trained, 2), ([python_of("eval", run, device="auto", **words)], 1)]
    told = load_json(run.dir / "compare.json")
    assert told["grid"]["dns"] == {"dns@pool_size=2": 0.4, "dns@pool_size=4": 0.2}
    assert [row["best other"] for row in told["rows"]] == ["dns", "hnlm", "dns"]
    assert [row["settings tried"] for row in told["rows"]] == [1, 2, 1]
    assert [row["paired"]["difference"] for row in told["rows"]] == pytest.approx(
        [d * (1 + 1 / 2 / 40) for d in (-0.3, 0.1, -0.1)]  # one of 40 users has twice as much by one of two seeds
    )
    line = "| dns@pool_size=2 | 0.4550 ± 0.0071 | 0.4000 ± 0.0000 | 1.75 | 55 | 2 | +0.1013 to hnlm, p = "
    assert line in text and text.count("\n") == 8 and (run.dir / "compare.md").read_text(encoding="utf-8") == text
    below = [f"* {m}: {', '.join(f'{k} {v}' for k in SHARED)}" for m, v in (("uniform, dns", "seed5"), ("hnlm", True))]
    assert text.splitlines()[6:] == below


def test_compare_crosses_methods_and_backbones_and_shares_out_the_threads(finished, capsys):
    run, batches = finished
    stages = {name: load_stage(name) for name in ("train", "eval")}
    run = dataclasses.replace(run, methods=("dns",), n_threads=0, preset="toy", device_knob="cpu")
    with pytest.raises(UserError, match="is not finished"):
        compare.compare(run, {}, stages, ("lightgcn", "mf"), 3)
    names = "dns@backbone=lightgcn", "dns@backbone=mf"
    words = {"preset": "toy", "device": "cpu", "seed": 5, "n_threads": 2}
    assert batches == [([python_of("train", run, method=name, **words) for name in names], 3)]
    save_json(run.dir / "prep" / "manifest.json", {"counts": {"valid": 0, "test": 9}})  # nothing is chosen on it
    alone = dataclasses.replace(run, n_seeds=1, methods=("uniform",))
    assert "| - |" in compare.compare(alone, {}, stages, (), 9)
    assert {command[-1] for command in batches[1][0]} == {"1"}  # never none
    save_json(run.dir / "prep" / "manifest.json", {"counts": {"valid": 0, "test": 0}})
    with pytest.raises(UserError, match="holds no test items to evaluate"):
        compare.compare(alone, {}, stages, (), 9)
    assert len(batches) == 4  # nothing was trained for it
    assert capsys.readouterr().err == ""


def test_what_a_setting_reads_is_there_before_anything_is_trained(finished):
    run, batches = finished
    (run.dir / "generate" / "manifest.json").unlink()
    stages = {name: load_stage(name) for name in ("train", "eval")}
    with pytest.raises(UserError, match="generate is not finished; run: hnlm-ref generate"):
        compare.compare(run, {}, stages, (), 1)
    assert batches == []


def test_compare_tunes_on_validation_and_tests_the_choice(tmp_path, cli):  # case E16
    run_dir = tmp_path / "run"
    assert cli("prep", "--interactions", "toy", "--run-dir", run_dir).returncode == 0
    preset = tmp_path / "compare.toml"
    preset.write_text(
        "[run]\nn_seeds = 2\nmethods = ['uniform', 'dns']\n[train]\nn_epochs = 2\ndim = 8\nbatch_size = 64\n"
        "[grid.uniform]\nlr = [1e-4, 1e-2]\n[grid.dns]\npool_size = [2, 3]\n",
        encoding="utf-8",
    )
    done = cli("compare", "--preset", preset, "--run-dir", run_dir, "--n-jobs", 2)
    assert done.returncode == 0 and "taken as it is" not in done.stderr, done.stderr
    told = load_json(run_dir / "compare.json")
    for row in told["rows"]:
        tried = told["grid"][row["method"]]
        assert len(tried) == 2 and tried[row["chosen"]] == max(tried.values())
        values = []
        for seed in (0, 1):
            per_user = load_npy(run_dir / "eval" / "per_user" / f"{row['chosen']}-seed{seed}.npy")
            values.append(np.nanmean(per_user[3]))  # recall@10, recall@20, ndcg@10, ndcg@20, ...
        assert row["ndcg@20"] == pytest.approx(np.mean(values))
        assert row["ndcg@20 spread"] == pytest.approx(np.std(values, ddof=1))
        assert row["chosen"] in done.stdout
    a, b = (row["ndcg@20"] for row in told["rows"])
    assert told["rows"][0]["paired"]["difference"] == pytest.approx(a - b)
    with preset.open("a", encoding="utf-8") as file:
        file.write("[prep]\nk_core = 5\ncolumns = ['user=user_id']\n")
    alone = cli(
        "compare", "--preset", preset, "--run-dir", run_dir, "--methods", "dns"
    )  # the other grid is not asked for
    assert "prep was made with other knobs (columns, k_core) and is taken as it is" in alone.stderr
    assert alone.returncode == 0 and alone.stdout.count("| dns@") == 1 and "| uniform@" not in alone.stdout
    before = sorted(path.name for path in (run_dir / "train").iterdir())
    for grid, sentence in (
        ("lr = [1e-3, 0.001]", "uniform@lr=0.001 is there twice"),
        ("lrr = [1e-3]", "did you mean 'lr'?"),
        ("lr = [1e-3, 'much']", "lr = 'much': a number is wanted"),
    ):
        preset.write_text(f"[grid.uniform]\n{grid}\n", encoding="utf-8")
        wrong = cli("compare", "--preset", preset, "--run-dir", run_dir)
        assert wrong.returncode == 1 and sentence in wrong.stderr and "Traceback" not in wrong.stderr
    assert sorted(path.name for path in (run_dir / "train").iterdir()) == before  # refused before anything is trained
    preset.write_text("[grid.dns]\npool_size = [2, 3]\n", encoding="utf-8")
    cli("prep", "--interactions", "toy", "--valid-ratio", 0, "--run-dir", tmp_path / "without")
    wrong = cli("compare", "--preset", preset, "--run-dir", tmp_path / "without")
    assert wrong.returncode == 1 and "has no validation part to choose settings on" in wrong.stderr
    trained = cli("train", "--n-epochs", 1, "--run-dir", tmp_path / "without")
    counts = load_json(tmp_path / "without" / "train" / "uniform" / "seed0" / "manifest.json")["counts"]
    assert "nothing to validate on" in trained.stderr and counts["valid ndcg@20"] is None
    preset.write_text("[grid.dnss]\npool_size = [2]\n", encoding="utf-8")
    wrong = cli("compare", "--preset", preset, "--run-dir", run_dir)
    assert wrong.returncode == 1
    assert "did you mean 'dns'" in wrong.stderr
