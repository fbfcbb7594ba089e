"""Artifacts: whole or absent, skipped when nothing changed, resumed when killed, refused when mixed."""

import dataclasses
import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hnlm_ref import artifacts
from hnlm_ref.artifacts import (
    Csr,
    Prep,
    Run,
    load_json,
    load_npy,
    resolve_path,
    run_stage,
    save_json,
    save_jsonl,
    save_npy,
)
from hnlm_ref.console import UserError


def stage(run: Run, name: str, value: int, calls: list, reads=(), crash_after: str | None = None):
    """Run a stage of two steps that resumes from its first step's file."""

    def main(run):
        step = run.out / "step.npy"
        calls.append("resumed" if step.exists() else "fresh")
        save_npy(step, np.array([value]))
        if crash_after == "step":
            raise KeyboardInterrupt
        save_npy(run.out / "result.npy", load_npy(step) * 2)
        step.unlink()
        return {"counts": {"value": value}}

    inputs = run.inputs(reads)
    run_stage(name, run, {"value": value}, inputs, f"{value}{inputs}", main)


def test_a_finished_stage_is_skipped_until_its_key_changes(tmp_path, capsys):
    run, calls = Run(tmp_path), []
    stage(run, "prep", 1, calls)
    stage(run, "prep", 1, calls)
    assert calls == ["fresh"]
    assert "replaced" not in capsys.readouterr().err
    stage(run, "prep", 2, calls)
    assert "prep was made with other knobs, inputs or code; it will be replaced" in capsys.readouterr().err
    assert calls == ["fresh", "fresh"] and load_npy(tmp_path / "prep" / "result.npy") == [4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prep"]


def test_an_interrupted_stage_resumes_and_the_old_result_stays_until_then(tmp_path):
    run, calls = Run(tmp_path), []
    stage(run, "prep", 1, calls)
    with pytest.raises(KeyboardInterrupt):
        stage(run, "prep", 2, calls, crash_after="step")
    assert load_npy(tmp_path / "prep" / "result.npy") == [2]
    stage(run, "prep", 2, calls)
    assert calls == ["fresh", "fresh", "resumed"] and load_npy(tmp_path / "prep" / "result.npy") == [4]


def test_a_link_to_the_folder_of_another_run_goes_without_what_it_points_at(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    here, there = Run(tmp_path / "here"), Run(tmp_path / "there")
    stage(there, "prep", 1, [])
    (here.dir / "prep").symlink_to(there.dir / "prep")
    for value in (2, 3):
        stage(here, "prep", value, [])
        assert load_npy(here.dir / "prep" / "result.npy") == [2 * value]
        assert [path.name for path in here.dir.iterdir()] == ["prep"]
    assert load_npy(there.dir / "prep" / "result.npy") == [2]


def test_a_folder_that_no_stage_wrote_is_left_alone(tmp_path):
    (tmp_path / "prep").mkdir()
    (tmp_path / "prep" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"prep holds no manifest\.json, so no stage wrote it; move it"):
        stage(Run(tmp_path), "prep", 1, [])
    assert (tmp_path / "prep" / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["prep"]


def test_work_in_progress_of_other_knobs_is_not_resumed(tmp_path):
    run, calls = Run(tmp_path), []
    with pytest.raises(KeyboardInterrupt):
        stage(run, "prep", 1, calls, crash_after="step")
    (tmp_path / ".prep.partial" / "answers.part").touch()  # it tells by its name what it is of
    (tmp_path / ".prep.partial" / "half.adapter").mkdir()

    def main(run):
        assert [path.name for path in run.out.glob("*.*")] == ["answers.part"]
        for name in ("checkpoint.safetensors", "warm_up.safetensors", "shard0.npy"):
            (run.out / name).touch()
        return {}

    run_stage("prep", run, {}, {}, "other", main)
    assert [path.name for path in (tmp_path / "prep").iterdir()] == ["manifest.json"]
    assert calls == ["fresh"]


def test_a_key_covers_the_stage_and_all_of_the_package_behind_it(tmp_path, monkeypatch):
    package = tmp_path / "hnlm_ref"
    package.mkdir()
    monkeypatch.setattr(artifacts, "__file__", str(package / "artifacts.py"))
    files = {
        tmp_path / "stage.py": "import numpy\n\n\ndef main():\n    from hnlm_ref import __version__, _core, near\n",
        package / "near.py": "from hnlm_ref import (\n    _core,\n    far,\n)\n",
        package / "far.py": "from hnlm_ref.near import ring\nfrom other.apart import it\n",
        package / "apart.py": "",
    }

    def key():
        return artifacts.stage_key({}, 0, {}, (), tmp_path / "stage.py")

    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    before = key()
    assert [path.name for path in artifacts.sources(tmp_path / "stage.py")] == ["far.py", "near.py", "stage.py"]
    for path, text in files.items():
        path.write_text(text + "x = 1\n", encoding="utf-8")
        assert (key() != before) is (path.name != "apart.py")
        path.write_text(text, encoding="utf-8")
    assert key() == before


def test_a_key_covers_knobs_seed_the_order_of_what_is_read_and_the_version(tmp_path, monkeypatch):
    source, a, b = tmp_path / "stage.py", {"train/a": "1"}, {"train/b": "2"}
    source.touch()
    told = [({"k": k}, seed, inputs, (), source) for k in (1, 2) for seed in (1, 2) for inputs in (a | b, b | a)]
    keys = {artifacts.stage_key(*some) for some in told}
    monkeypatch.setattr(artifacts, "__version__", "other")
    assert len(keys) == 8 and artifacts.stage_key(*told[0]) not in keys


def test_a_key_covers_what_stands_in_the_files_that_are_read(tmp_path):
    keys = [artifacts.stage_key({}, 0, {}, (str(tmp_path / "log"),), Path(__file__))]
    for text in ("a", "b", "a"):
        (tmp_path / "log").write_text(text, encoding="utf-8")
        keys.append(artifacts.stage_key({}, 0, {}, (str(tmp_path / "log"),), Path(__file__)))
    assert len(set(keys)) == 3 and keys[1] == keys[3]


def test_two_commands_do_not_work_in_one_folder(tmp_path):
    def main(run):
        save_npy(run.out / "mine.npy", np.zeros(1))
        with pytest.raises(UserError, match=r"another command is at work in .*\.prep\.partial"):
            run_stage("prep", Run(tmp_path), {}, {}, "other key", main)
        return {}

    run_stage("prep", Run(tmp_path), {}, {}, "key", main)
    assert load_json(tmp_path / "prep" / "manifest.json")["key"] == "key" and (tmp_path / "prep" / "mine.npy").exists()


def test_death_between_manifest_and_rename_begins_anew_and_leaves_nothing_behind(tmp_path):
    run, calls = Run(tmp_path), []
    final, partial, old = (tmp_path / name for name in ("prep", ".prep.partial", ".prep.old"))
    stage(run, "prep", 1, calls)
    shutil.copytree(final, old)  # died before the replaced folder was gone
    final.rename(partial)
    stage(run, "prep", 1, calls)
    final.rename(partial)
    (partial / "key").write_text("1{}", encoding="utf-8")  # died before the key was gone
    stage(run, "prep", 1, calls)
    assert calls == ["fresh"] * 3 and list(load_json(final / "manifest.json")["files"]) == ["result.npy"]
    shutil.copytree(final, old)  # died when the new folder had taken its place
    stage(run, "prep", 2, calls)
    assert load_npy(final / "result.npy") == [4] and [p.name for p in tmp_path.iterdir()] == ["prep"]


def test_a_folder_has_no_manifest_in_its_final_place_before_it_is_whole(tmp_path, monkeypatch):
    def killed(path, value):
        assert path == tmp_path / ".prep.partial" / "manifest.json"
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "save_json", killed)
    with pytest.raises(KeyboardInterrupt):
        stage(Run(tmp_path), "prep", 1, [])
    assert [path.name for path in tmp_path.iterdir()] == [".prep.partial"]


def test_the_trainings_of_a_run_are_methods_times_seeds_from_its_own_seed_on(tmp_path):
    run = Run(tmp_path, seed=5, n_seeds=2, methods=("dns", "a"))
    assert run.trained() == ["train/dns/seed5", "train/dns/seed6", "train/a/seed5", "train/a/seed6"]


def test_a_history_runs_from_the_oldest_item_to_the_newest():
    train = Csr.from_pairs([0, 1, 1, 1], [2, 0, 1, 3], 2, 4)
    prep = Prep([], [], train, train, np.array([0, 2, 3, 1]))  # of user 1 item 1 came first, then 3, then 0
    assert [prep.history(user).tolist() for user in (0, 1)] == [[2], [1, 3, 0]]


def test_what_the_first_of_several_processes_moves_and_deletes_no_other_looks_at(tmp_path, monkeypatch):
    (tmp_path / "sft" / "adapter").mkdir(parents=True)  # half of an old folder
    (tmp_path / ".sft.partial" / "key").mkdir(parents=True)  # no file: reading it fails
    team = SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: None, destroy_process_group=lambda: None)
    monkeypatch.setattr(artifacts, "_team", lambda *_: team)
    calls: list[Run] = []
    run_stage("sft", Run(tmp_path), {}, {}, "key", calls.append)
    assert [run.out for run in calls] == [tmp_path / ".sft.partial"]


def test_every_process_gets_as_many_pieces_and_a_repeated_one_does_not_count():
    shares = [
        list(artifacts.own_share(["a", "b", "c"], SimpleNamespace(num_processes=2, process_index=n))) for n in (0, 1)
    ]
    assert shares == [[(0, "a", True), (2, "c", True)], [(1, "b", True), (3, "a", False)]]


def test_a_stage_that_fails_at_once_leaves_nothing_behind(tmp_path):
    def main(run):
        raise UserError("no such file")

    with pytest.raises(UserError):
        run_stage("prep", Run(tmp_path), {}, {}, "key", main)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_full_at_the_first_file_leaves_no_folder(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        run_stage("prep", Run(tmp_path), {}, {}, "key", lambda run: {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError("Unable to allocate 8.00 EiB for an array"),
    ],
)
def test_out_of_memory_names_the_knobs_and_keeps_what_is_finished(tmp_path, error):  # case D21
    def main(run):
        save_npy(run.out / "shard.npy", np.zeros(1))
        raise error

    with pytest.raises(UserError, match=r"--batch-size.*--grad-accum.*--checkpointing.*--n-threads"):
        run_stage("sft", Run(tmp_path), {}, {}, "key", main)
    assert (tmp_path / ".sft.partial" / "shard.npy").exists()

    def broken(run):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run_stage("sft", Run(tmp_path), {}, {}, "key", broken)


def test_what_fails_on_an_input_that_is_not_as_its_stage_wrote_it_is_told_as_that(tmp_path):
    run, calls = Run(tmp_path), []
    stage(run, "prep", 1, calls)
    (file,) = (tmp_path / "prep" / name for name in run.manifest("prep")["files"])

    def failing(run):
        raise ValueError("zip() argument 2 is longer")

    inputs = run.inputs(["prep"])
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer"):  # it is whole, so the fault is another
        run_stage("sft", run, {}, inputs, "key", failing)
    file.write_bytes(b"other")
    with pytest.raises(UserError, match=rf"{file} is not what hnlm-ref prep wrote: .*; delete {tmp_path / 'prep'} and"):
        run_stage("sft", run, {}, inputs, "key", failing)


def test_folders_made_from_different_inputs_are_refused_with_both_fingerprints(tmp_path):
    run, calls = Run(tmp_path), []
    stage(run, "prep", 1, calls)
    old = run.fingerprint("prep")
    stage(run, "sft", 1, calls, reads=("prep",))
    stage(run, "prep", 2, calls)
    new = run.fingerprint("prep")
    with pytest.raises(UserError) as error:
        run.inputs(("prep", "sft"))
    assert old != new and old in error.value.message and new in error.value.message


def test_a_missing_input_names_the_command_that_makes_it(tmp_path):
    run = Run(tmp_path, preset="toy")
    with pytest.raises(UserError, match="run: hnlm-ref train --preset toy --method dns --seed 0 --run-dir"):
        run.folder("train/dns/seed0")
    with pytest.raises(UserError, match=rf"is not finished; run: hnlm-ref sft --run-dir {tmp_path}$"):
        Run(tmp_path).folder("sft")
    with pytest.raises(UserError, match=r"--preset 'a b.toml' --method '\$x' --seed 0 --run-dir '.* c'$"):
        Run(tmp_path / "b c", preset="a b.toml").folder("train/$x/seed0")


def test_the_manifest_repeats_knobs_counts_and_the_bytes_of_every_file(tmp_path):
    run = Run(tmp_path, seed=3)
    stage(run, "prep", 1, [])
    manifest = load_json(tmp_path / "prep" / "manifest.json")
    assert manifest["knobs"] == {"value": 1} and manifest["counts"] == {"value": 1} and manifest["seed"] == 3
    assert list(manifest["files"]) == ["result.npy"]
    assert manifest["files"]["result.npy"] == artifacts._sha256(tmp_path / "prep" / "result.npy")


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    save_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        save_jsonl(tmp_path / "a.json", [{"a": 1}, {"a": object()}])
    with pytest.raises(ValueError, match="allow_pickle"):
        save_npy(tmp_path / "a.json", np.array([{"a": 1}]))
    assert load_json(tmp_path / "a.json") == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_damaged_file_is_one_sentence_that_names_it(tmp_path):
    whole = io.BytesIO()
    np.save(whole, np.arange(9))
    damaged = {artifacts.load_npy: [b"", b"x", whole.getvalue()[:-1]], load_json: [b"", b"\xff"]}
    for load, contents in (damaged | {artifacts.load_jsonl: [b"{}\n{", b"\xff"]}).items():
        for content in contents:
            (tmp_path / "file").write_bytes(content)
            with pytest.raises(UserError, match=r"file is damaged .*; delete its folder and run the stage again"):
                load(tmp_path / "file")


def test_a_set_of_pairs_is_sorted_unique_and_keeps_empty_rows():
    csr = Csr.from_pairs(np.array([2, 0, 2, 2]), np.array([1, 3, 0, 1]), 4, 5)
    assert csr.indptr.tolist() == [0, 1, 1, 3, 3] and csr.indices.tolist() == [3, 0, 1]
    assert csr.pairs().dtype == np.int32 and csr.pairs().tolist() == [[0, 3], [2, 0], [2, 1]]
    assert csr.degrees().tolist() == [1, 0, 2, 0]
    both = csr.union(Csr.from_pairs(np.array([1, 2]), np.array([4, 1]), 4, 5))
    assert both.pairs().tolist() == [[0, 3], [1, 4], [2, 0], [2, 1]]


def test_a_package_that_is_not_installed_is_named_with_its_pip_line():
    with pytest.raises(UserError, match="pip install --no-deps no-such-thing"):
        resolve_path("package:no_such_thing/file")
    with pytest.raises(UserError, match=r"holds no 'nothing\.txt'"):
        resolve_path("package:numpy/nothing.txt")
    assert resolve_path("package:numpy/__init__.py").name == "__init__.py"


def test_an_input_is_known_by_content_a_folder_by_its_files_and_a_large_file_by_size_and_time(tmp_path, monkeypatch):
    file, twin, folder = (tmp_path / name for name in ("file", "twin", "folder"))
    for path in (file, twin):
        path.write_bytes(b"1234")
    folder.mkdir()
    (folder / "a").write_bytes(b"1234")
    known = artifacts.file_fingerprint
    before, inside = known(file), known(folder)
    assert known(tmp_path / "none") == "absent" and before == known(twin) == "03ac674216f3e15c"  # sha256sum
    (folder / "below").mkdir()
    assert known(folder) == inside != before
    for change in (lambda: (folder / "a").write_bytes(b"1235"), lambda: (folder / "a").rename(folder / "b")):
        change()
        assert known(folder) != inside
        inside = known(folder)
    monkeypatch.setattr(artifacts, "LARGE", 4)
    assert known(file) == before
    monkeypatch.setattr(artifacts, "LARGE", 3)
    os.utime(file, ns=(0, 5))
    assert known(file) == "4@5"


def test_a_run_directory_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"\[prep\] .*file"):
        stage(dataclasses.replace(Run(tmp_path), dir=tmp_path / "file"), "prep", 1, [])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device", "a.npy"), "a.npy: No space left on device"),
        (OSError(28, "No space left on device"), "{partial}: No space left on device"),
        (OSError("8 requested and 0 written"), "{partial}: 8 requested and 0 written"),  # NumPy of a full disk
    ],
)
def test_a_full_disk_is_one_sentence_with_the_place(tmp_path, error, told):
    def main(run):
        raise error

    with pytest.raises(UserError) as found:
        run_stage("prep", Run(tmp_path), {}, {}, "key", main)
    assert found.value.message == "[prep] " + told.format(partial=tmp_path / ".prep.partial")


def test_several_processes_where_they_cannot_help_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process"):
        run_stage("train/dns/seed0", Run(tmp_path), {}, {}, "key", lambda run: {})
    assert not list(tmp_path.iterdir())
