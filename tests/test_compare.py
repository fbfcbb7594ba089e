"""`hnlm-ref compare`: grids, failures, and its table against the files it was made from."""

import sys

import numpy as np
import pytest

from hnlm_ref.artifacts import load_json, load_npy
from hnlm_ref.compare import run_stages, settings
from hnlm_ref.console import UserError


def test_a_text_where_a_grid_wants_a_list_is_refused():  # case B16: never its single characters
    assert settings({"pool_size": [2, 4]}) == ["@pool_size=2", "@pool_size=4"]
    for wrong in ("24", 24, []):
        with pytest.raises(UserError, match=f"pool_size = {wrong!r}: a list of values".replace("[", r"\[")):
            settings({"pool_size": wrong})


def test_a_training_that_was_killed_names_the_number_of_jobs():
    killed = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    with pytest.raises(UserError, match="killed, perhaps for want of memory; lower --n-jobs, now 2"):
        run_stages([killed], 2)
    with pytest.raises(SystemExit, match="3"):
        run_stages([[sys.executable, "-c", "raise SystemExit(3)"]], 2)


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
    assert done.returncode == 0, done.stderr
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
    alone = cli(
        "compare", "--preset", preset, "--run-dir", run_dir, "--methods", "dns"
    )  # the other grid is not asked for
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
