"""The whole pipeline as a user runs it: help at once, the same result twice, killed and resumed, from a wheel."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from hnlm_ref import compare
from hnlm_ref.artifacts import STAGES, Run, load_json
from hnlm_ref.cli import load_stage, main, stage_file
from hnlm_ref.console import UserError


def start_all(run: Path, **how) -> subprocess.Popen:
    """`hnlm-ref all` on the toy, at work."""
    command = [sys.executable, "-m", "hnlm_ref.cli", "all", "--preset", "toy", "--run-dir", str(run)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **how)


def fingerprints(run: Path) -> dict[str, str]:
    manifests = sorted(path for path in run.rglob("manifest.json") if ".old" not in str(path))
    return {str(path.parent.relative_to(run)): load_json(path)["fingerprint"] for path in manifests}


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_every_knob_with_its_default_and_does_not_import_torch(stage):
    program = (
        "import sys, runpy; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'polars' not in sys.modules and 'transformers' not in sys.modules"
    )
    command = [sys.executable, "-c", program, str(stage_file(stage))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    for option in load_stage(stage).params:
        assert option.opts[0] in done.stdout
        assert option.name in ("preset", "quiet") or "[default: " in (option.help or "")


def test_help_of_all_shows_the_knobs_of_every_stage(cli):
    text = cli("all", "--help").stdout
    for stage in STAGES:
        for option in load_stage(stage).params:
            if option.name in load_stage(stage).config.__dataclass_fields__:
                assert f"-o {stage}.{option.name}=" in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("evl",), "no command 'evl': did you mean 'eval'?"),
        (("all", "--preset", "tay"), "no preset 'tay': did you mean 'toy'?"),
        (("all", "--preset", "toy", "-o", "train.n_epoch=5"), "-o: unknown key 'n_epoch'; did you mean 'n_epochs'?"),
        (("all", "--preset", "toy", "-o", "trian.n_epochs=5"), "no stage 'trian'; did you mean 'train'?"),
        (("all", "--preset", "toy", "-o", "n_epochs=5"), "-o n_epochs=5: STAGE.KEY=VALUE is wanted"),
        (("all", "--preset", "toy", "-o", "train.n_epochs=five"), "n_epochs = 'five': a whole number is wanted"),
        (("all", "--preset", "toy", "-o", "train.method=dns"), "name what to train with --methods"),
        (("all", "-o", "sft.rank_from=9", "-o", "sft.rank_to=9"), "rank_from 9 and rank_to 9 leave no rank"),
        (("all", "-o", "generate.min_similarity=0.5", "-o", "generate.max_similarity=0.2"), "0.5 is above max_similar"),
        (("all", "--methods", "hnlm_matched", "-o", "train.base_sampler=mixgcf"), "mixgcf makes vectors, not items"),
        (("all", "--methods", "dns_mn", "-o", "train.n_top=5"), "n_top 5 is above pool_size 4"),
        (("train", "--enhancer", "rlmrec_gen", "--backbone", "mf"), "which mf and 0 layers do not look at"),
        (("eval", "--preset", "toy", "--k", "0"), "'0': at least 1 is wanted"),
        (("eval", "--preset", "toy", "--k", ""), "'': at least one is wanted"),
        (("eval", "--preset", "toy", "--methods", ","), "',': at least one is wanted"),
        (("all", "--preset", "toy", "--methods", "dns/../dns"), "is a folder's name: no slash"),
        (("prep", "--run-dir", "x" * 300), "File name too long"),
        (("train", "--preset", "toy", "--run-dir", "empty"), "run: hnlm-ref prep --preset toy --run-dir empty"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_non_zero_exit(cli, tmp_path, words, sentence):
    done = cli(*words, cwd=tmp_path)
    assert done.returncode != 0 and sentence in done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_a_stage_file_too_tells_what_the_system_says(tmp_path):
    for words in (("--run-dir", "x" * 300), ("--preset", "x" * 300)):
        line = [sys.executable, str(stage_file("prep").resolve()), *words]
        done = subprocess.run(
            line, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert done.returncode == 1 and "File name too long" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "module", "told"),
    [  # cases R04, F04
        ("eval --help", "hnlm_ref._core", "evaluate only so many users"),
        ("eval --run-dir RUN --k 5", "hnlm_ref._core", "the Rust extension is missing; build it with: pip install"),
        ("show RUN", "hnlm_ref._core", "the Rust extension is missing; build it with: pip install --editable ."),
        ("report RUN", "hnlm_ref._core", "the Rust extension is missing; build it with: pip install --editable ."),
        (
            "sft --run-dir RUN",
            "accelerate",
            "import of accelerate halted; None in sys.modules; run: pip install 'hnlm-ref[llm]'",
        ),
    ],
)
def test_a_missing_module_is_one_sentence_with_its_cure(toy_run, tmp_path, words, module, told):
    run = shutil.copytree(toy_run, tmp_path / "run")
    script = f"import sys; sys.modules[{module!r}] = None; from hnlm_ref.cli import main; main()"
    line = [sys.executable, "-c", script, *words.replace("RUN", str(run)).split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert told in " ".join((done.stdout + done.stderr).split()) and "Traceback" not in done.stderr
    assert done.returncode == int("--help" not in words)


@pytest.mark.parametrize("side", ["users", "items"])
def test_a_copy_of_a_run_that_was_cut_short_between_two_lines_is_told(toy_run, tmp_path, side):
    run = Run(shutil.copytree(toy_run, tmp_path / "run"))
    file, whole = run.dir / "prep" / f"{side}.jsonl", {"users": 60, "items": 80}[side]
    file.write_text("".join(file.read_text(encoding="utf-8").splitlines(True)[:-1]), encoding="utf-8")
    with pytest.raises(UserError, match=rf"{side}\.jsonl holds {whole - 1} of {whole} lines; get the whole file again"):
        run.prep()


def test_the_losses_told_of_a_training_are_those_of_one_thread(cli, toy_run, tmp_path):
    """The toy was trained with all cores; its mixture has more numbers in a sum than torch leaves to one thread."""
    folder = shutil.copytree(toy_run, tmp_path / "run") / "train" / "hnlm" / "seed0"
    shutil.rmtree(folder)
    done = cli("train", "--preset", "toy", "--method", "hnlm", "--run-dir", tmp_path / "run", "--n-threads", 1)
    assert done.returncode == 0, done.stderr
    manifests = [load_json(run / "train" / "hnlm" / "seed0" / "manifest.json") for run in (toy_run, tmp_path / "run")]
    assert manifests[0]["files"] == manifests[1]["files"]


def test_dense_layers_and_tuning_in_float32_are_the_same_for_any_number_of_threads(cli, toy_run, tmp_path):
    """Of 8 threads: with MKL on processors that are not Intel's products depend on them."""
    found = []
    for n_threads in (1, 8):
        run = shutil.copytree(toy_run, tmp_path / str(n_threads))
        words = ("--preset", "toy", "--run-dir", run, "--n-threads", n_threads)
        for line in (
            ("train", "--method", "dns@enhancer=kar", "--n-epochs", 2),
            ("sft", "--n-users", 12, "--pairs-per-user", 2, "--held-out-users", 4, "--grad-accum", 2),
        ):
            done = cli(*line, *words)
            assert done.returncode == 0, done.stderr
        found.append(
            [load_json(run / name / "manifest.json")["files"] for name in ("train/dns@enhancer=kar/seed0", "sft")]
        )
    assert found[0] == found[1]


def test_a_run_without_test_items_is_refused_before_anything_is_trained(cli, tmp_path):
    done = cli("all", "--preset", "toy", "--run-dir", tmp_path / "run", "-o", "prep.test_ratio=0")
    assert done.returncode == 1 and "holds no test items to evaluate" in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["prep"]


def test_a_second_call_finds_the_finished_stages_and_prints_the_table_again(cli, toy_run):
    before = fingerprints(toy_run)
    done = cli("all", "--preset", "toy", "--run-dir", toy_run)
    assert done.returncode == 0 and done.stderr.count("# done: ") == 7 and "$ " not in done.stderr
    assert re.search(r"uniform +0\.\d{4}", done.stdout) and str(toy_run) in done.stdout
    assert fingerprints(toy_run) == before


def test_a_changed_knob_runs_its_stage_and_what_depends_on_it_again(cli, toy_run, tmp_path):
    shutil.copytree(toy_run, tmp_path / "run")
    done = cli("all", "--preset", "toy", "--run-dir", tmp_path / "run", "-o", "eval.k=5")
    assert done.returncode == 0 and done.stderr.count("# done: ") == 6
    assert "recall@5" in done.stdout


def test_all_trains_every_method_with_every_seed_and_hands_on_what_was_typed(toy_run, tmp_path, monkeypatch):
    run, asked = shutil.copytree(toy_run, tmp_path / "run"), []
    for method, seed in (trainings := [(m, s) for m in ("dns", "uniform") for s in "34"]):
        shutil.copytree(run / "train" / method / "seed0", run / "train" / method / f"seed{seed}")  # for eval to read
    monkeypatch.setattr(compare, "run_stages", lambda lines, _: asked.extend(lines))
    words = f"all --preset toy --run-dir {run} --seed 3 --n-seeds 2 --methods dns,uniform -o train.n_epochs=9"
    main(words.split(), standalone_mode=False)
    told = [dict(zip(line[2::2], line[3::2], strict=True)) for line in asked]
    assert [(t["--seed"], t["--run-dir"], t["--preset"]) for t in told] == [
        (seed, str(run), "toy") for seed in ("3", "3", "3", *(seed for _, seed in trainings), "3")
    ]
    assert [(t["--method"], t["--n-epochs"]) for t in told[3:-1]] == [(method, "9") for method, _ in trainings]
    assert told[-1]["--n-seeds"] == "2" and told[-1]["--methods"] == "dns,uniform"


def test_killed_in_every_stage_the_result_is_that_of_an_undisturbed_run(cli, toy_run, tmp_path):
    for stage in (".prep", ".sft", ".generate", "train/hnlm/.seed0", ".eval"):
        partial = tmp_path / "run" / f"{stage}.partial"
        nothing = subprocess.DEVNULL
        process = start_all(tmp_path / "run", stderr=nothing, stdout=nothing, start_new_session=True)
        while process.poll() is None and not partial.exists():
            time.sleep(0.01)
        time.sleep(0.5 if stage in (".sft", ".generate", "train/hnlm/.seed0") else 0)  # into its work
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert cli("all", "--preset", "toy", "--run-dir", tmp_path / "run").returncode == 0
    assert fingerprints(tmp_path / "run") == fingerprints(toy_run)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.endswith((".partial", ".old", ".tmp"))]


def test_told_to_end_all_ends_the_stage_that_runs(tmp_path):
    process = start_all(tmp_path / "run", stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "run" / ".sft.partial").exists():
        time.sleep(0.01)
    process.terminate()
    _, told = process.communicate()  # to its last line, and that of every process that can write there
    assert process.returncode == 1 and told.endswith("Aborted!\n")
    assert not (tmp_path / "run" / "sft").exists()


def test_an_installed_wheel_works_in_an_empty_folder(tmp_path):
    if shutil.which("cargo") is None:
        pytest.skip("cargo is not on the PATH, so no wheel can be built")
    build = ["maturin", "build", "--release", "--quiet", "--out", str(tmp_path / "dist")]
    subprocess.run([sys.executable, "-m", *build], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert "cp311-abi3" in wheel.name
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert {p.name for p in (tmp_path / "site" / "hnlm_ref" / "stages").glob("0*.py")} == {
        stage_file(stage).name for stage in STAGES
    }
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "hnlm_ref.cli", "prep", "--preset", "toy"],
        cwd=tmp_path / "empty",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "empty" / "runs" / "toy" / "prep" / "manifest.json").exists()


def test_a_run_needs_no_posix_and_no_encoding_of_the_system(tmp_path):
    """Case F05, as far as one system can tell: no fcntl, a narrow terminal, files whose encoding is always named."""
    (tmp_path / "fcntl.py").write_text("raise ImportError('not on this system')", encoding="utf-8")
    where = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    env = {**os.environ, **where, "PYTHONWARNDEFAULTENCODING": "1"}
    for words in (("prep",), ("train", "--n-epochs", "1"), ("eval", "--methods", "uniform"), ("show", "run")):
        line = [*words, *(("--preset", "toy", "--run-dir", "run") if words[0] != "show" else ())]
        command = [sys.executable, "-m", "hnlm_ref.cli", *line]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, encoding="cp1252")
        assert done.returncode == 0, done.stderr
        ours = re.findall(r"\b(?:hnlm_ref|stages)\S+: EncodingWarning.*", done.stderr)
        assert ours == []
    assert "ndcg@20" in done.stdout
