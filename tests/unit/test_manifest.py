"""The commit rule: whatever happens to a folder or its writer, a reader gets whole checkpoints or a clear refusal."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from simpo_megatron.checkpoint import manifest, retention, run_lock
from simpo_megatron.errors import CheckpointError

CONTENT = {"__0_0.distcp": b"a" * 1000, "__1_0.distcp": b"b" * 999, ".metadata": b"index", "empty": b""}


def save(folder, iteration, **facts):
    draft = manifest.create_draft(folder, iteration)
    for name, content in CONTENT.items():
        (draft / name).write_bytes(content + str(iteration).encode())
    digests = {name: manifest.digest_file(draft / name) for name in CONTENT}
    return manifest.commit_draft(draft, iteration, digests, {"metrics": {}, **facts})


def verified(folder):
    checkpoint = manifest.read(folder)
    manifest.check_hashes(checkpoint, checkpoint.files)
    return checkpoint


def resumed(folder, resume="latest"):
    return manifest.first_valid(manifest.list_resumable(folder, resume), resume, verified)


def steps(folder):
    return [manifest.read(entry).iteration for entry in manifest.committed(folder)]


def test_what_was_committed_is_read_back(tmp_path):
    written = save(tmp_path, 7, consumed_pairs=56)
    found, problems = resumed(tmp_path)
    assert problems == [] and found == written
    assert found.facts["consumed_pairs"] == 56 and found.num_bytes == sum(len(c) + 1 for c in CONTENT.values())
    assert found.folder.name == "iter_0000007"
    assert (tmp_path / manifest.LATEST_FILE).read_text() == "7\n"


def test_a_committed_folder_is_never_overwritten(tmp_path):
    before = save(tmp_path, 7)
    with pytest.raises(CheckpointError, match="never overwritten"):
        save(tmp_path, 7)
    assert verified(before.folder) == before


def test_a_draft_with_other_files_than_were_hashed_is_not_committed(tmp_path):
    draft = manifest.create_draft(tmp_path, 3)
    (draft / "a").write_bytes(b"1")
    (draft / "b").write_bytes(b"2")
    digests = {"a": manifest.digest_file(draft / "a")}
    with pytest.raises(CheckpointError, match="b: found a file that is not part of"):
        manifest.commit_draft(draft, 3, digests, {})
    with pytest.raises(CheckpointError, match="c: found no plain file"):
        manifest.commit_draft(draft, 3, {**digests, "b": digests["a"], "c": digests["a"]}, {})
    assert manifest.committed(tmp_path) == []


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def replace_by_link(path):
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "found 1000 bytes, expected 1001, as were committed"),
        (flip, "its bytes changed"),
        (lambda path: path.write_bytes(b""), "found 0 bytes, expected 1001"),
        (Path.unlink, "found no plain file"),
        (replace_by_link, "found no plain file"),
        (lambda path: path.with_name("extra").touch(), "extra: found a file that is not part of"),
        (lambda path: path.with_name("folder").mkdir(), "folder: found a file that is not part of"),
    ],
)
def test_damage_is_named_and_only_an_unnamed_step_falls_back(tmp_path, damage, reason):
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    older, newer = save(tmp_path, 4), save(tmp_path, 6)
    damage(newer.folder / "__0_0.distcp")
    for resume in ("latest", "required"):
        found, problems = resumed(tmp_path, resume)
        assert found == older
        (problem,) = problems
        assert reason in problem and "iter_0000006" in problem
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        resumed(tmp_path, "6")
    assert resumed(tmp_path, "4")[0] == older


def test_sizes_are_checked_without_reading_and_hashes_when_asked(tmp_path):
    checkpoint = save(tmp_path, 4)
    flip(checkpoint.folder / "__0_0.distcp")
    assert manifest.read(checkpoint.folder) == checkpoint
    with pytest.raises(CheckpointError, match="__0_0.distcp"):
        manifest.check_hashes(checkpoint, ["__0_0.distcp"])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"format": 1}',
        b'{"format": "1"}',
        b"[" * 200_000,
        b"\xff\xfe",
        b'{"format": 0, "iteration": 6, "facts": {}, "files": {}, "sha256": ""}',
    ],
)
def test_a_record_that_is_not_one_makes_the_checkpoint_invisible_or_refused(tmp_path, content):
    older, newer = save(tmp_path, 4), save(tmp_path, 6)
    (newer.folder / manifest.RECORD_FILE).write_bytes(content)
    found, problems = resumed(tmp_path)
    assert found == older and "iter_0000006" in problems[0]
    with pytest.raises(CheckpointError, match="iter_0000006"):
        resumed(tmp_path, "6")


def test_one_changed_digit_in_a_record_is_noticed(tmp_path):
    checkpoint = save(tmp_path, 6, consumed_pairs=48)
    path = checkpoint.folder / manifest.RECORD_FILE
    path.write_text(path.read_text().replace('"consumed_pairs": 48', '"consumed_pairs": 49'))
    with pytest.raises(CheckpointError, match="hash does not match"):
        manifest.read(checkpoint.folder)


def test_a_record_moved_to_another_step_is_refused(tmp_path):
    checkpoint = save(tmp_path, 6)
    checkpoint.folder.rename(tmp_path / "iter_0000009")
    with pytest.raises(CheckpointError, match="found the record of step 6"):
        manifest.read(tmp_path / "iter_0000009")


def test_a_checkpoint_of_a_newer_version_is_neither_read_nor_passed_over(tmp_path):
    save(tmp_path, 4)
    newer = save(tmp_path, 6)
    path = newer.folder / manifest.RECORD_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": manifest.FORMAT + 1}))
    for resume in ("latest", "6"):
        with pytest.raises(CheckpointError, match="newer version"):
            resumed(tmp_path, resume)


def test_a_checkpoint_of_another_format_is_passed_over_by_name(tmp_path):
    older, newer = save(tmp_path, 4), save(tmp_path, 6)
    path = newer.folder / manifest.RECORD_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))
    found, (problem,) = resumed(tmp_path)
    assert found == older and "its format is 0, this version reads 1" in problem


def test_a_missing_step_is_an_error_that_lists_what_there_is(tmp_path):
    save(tmp_path, 4)
    save(tmp_path, 6)
    with pytest.raises(CheckpointError, match="step 5 in .*, expected one of: 4, 6") as caught:
        resumed(tmp_path, "5")
    assert caught.value.exit_code == 4
    assert resumed(tmp_path, "0000006")[0].iteration == 6


def test_nothing_to_resume_is_an_error_only_when_required(tmp_path):
    for empty in (tmp_path, tmp_path / "absent"):
        assert resumed(empty) == (None, [])
        with pytest.raises(CheckpointError, match="required"):
            resumed(empty, "required")
    save(tmp_path, 4)
    assert resumed(tmp_path, "none") == (None, [])


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew_by_itself(tmp_path):
    for iteration in (2, 4):
        truncate(save(tmp_path, iteration).folder / ".metadata")
    with pytest.raises(CheckpointError, match="found every checkpoint damaged.*resume none"):
        resumed(tmp_path)


@pytest.mark.parametrize("pointer", [b"", b"abc", b" 7\n", "\uff14".encode(), b"999", None])
def test_the_pointer_of_megatron_is_a_hint_that_nothing_depends_on(tmp_path, pointer):
    checkpoint = save(tmp_path, 4)
    path = tmp_path / manifest.LATEST_FILE
    path.unlink() if pointer is None else path.write_bytes(pointer)
    assert resumed(tmp_path) == (checkpoint, [])
    assert manifest.stray_pointer(tmp_path) == (None if pointer is None else pointer.decode())
    save(tmp_path, 6)
    assert path.read_text() == "6\n" and manifest.stray_pointer(tmp_path) is None


def test_a_pointer_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / manifest.LATEST_FILE).mkdir(parents=True)
    assert resumed(tmp_path) == (None, [])
    checkpoint = save(tmp_path, 4)
    assert resumed(tmp_path) == (checkpoint, [])
    assert f"{manifest.LATEST_FILE}: could not be written (Is a directory)" in caplog.text


@pytest.mark.parametrize(
    "name",
    ["iter_000000\uff15", "iter_0000005\n", "old-iter_0000005-bak", "iter_0000005.bak", "iter_5", "iter_0000005.tmp-x"],
)
def test_only_exact_names_are_checkpoints_and_nothing_else_is_ever_removed(tmp_path, name):
    checkpoint = save(tmp_path, 5)
    checkpoint.folder.rename(tmp_path / name)
    kept = [save(tmp_path, iteration) for iteration in (8, 9)]
    assert steps(tmp_path) == [8, 9]
    assert retention.delete_old(tmp_path, 2) == [] and manifest.remove_drafts(tmp_path) == []
    assert (tmp_path / name / manifest.RECORD_FILE).exists() and resumed(tmp_path)[0] == kept[-1]


def test_links_are_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target = save(elsewhere, 1).folder
    run = tmp_path / "run"
    run.mkdir()
    (run / "iter_0000001").symlink_to(target)
    (run / f"iter_0000001.tmp-{'0' * 32}").symlink_to(target)
    save(run, 2)
    save(run, 3)
    assert steps(run) == [2, 3]
    retention.delete_old(run, 1)
    manifest.remove_drafts(run)
    assert verified(target).iteration == 1


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for iteration, accuracy in enumerate([0.5, 0.9, 0.6, None, 0.7, 0.8], start=1):
        save(tmp_path, iteration, metrics={} if accuracy is None else {retention.BEST_METRIC: accuracy})
    removed = retention.delete_old(tmp_path, 2)
    assert [folder.name for folder in removed] == ["iter_0000001", "iter_0000003", "iter_0000004"]
    assert steps(tmp_path) == [2, 5, 6]
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir()) == [
        f"iter_000000{step}" for step in (2, 5, 6)
    ]


def test_pruning_counts_and_removes_only_what_is_whole(tmp_path):
    for iteration in (1, 2, 3, 4):
        save(tmp_path, iteration)
    truncate(tmp_path / "iter_0000004" / ".metadata")
    (tmp_path / "iter_0000005").mkdir()
    retention.delete_old(tmp_path, 2)
    assert sorted(entry.name[-1] for entry in tmp_path.glob("iter_*")) == ["2", "3", "4", "5"]


def test_a_run_that_goes_back_puts_later_checkpoints_aside(tmp_path):
    for iteration in (2, 4, 6):
        save(tmp_path, iteration)
    moved = manifest.move_aside_newer(tmp_path, 2)
    assert {path.name.split(".aside-")[0] for path in moved} == {"iter_0000004", "iter_0000006"}
    assert all(path.is_dir() for path in moved) and steps(tmp_path) == [2]
    save(tmp_path, 4)
    assert steps(tmp_path) == [2, 4]


LOCKER = "import sys, pathlib; from simpo_megatron.checkpoint import run_lock; run_lock.lock(pathlib.Path(sys.argv[1]))"


def try_to_lock(folder):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, "-c", LOCKER, folder], env=environment, capture_output=True, text=True)


@pytest.mark.processes
def test_a_second_run_cannot_have_the_same_folder_and_a_later_one_can(tmp_path):
    held = run_lock.lock(tmp_path / "run")
    refused = try_to_lock(tmp_path / "run")
    assert refused.returncode and f"in use by another run (process {os.getpid()} on" in refused.stderr
    held.release()
    assert try_to_lock(tmp_path / "run").returncode == 0


def test_a_machine_that_sees_another_folder_is_refused(tmp_path):
    held = run_lock.lock(tmp_path / "run")
    nonce = held.nonce
    (tmp_path / "other").mkdir()
    for name in ("other", "absent"):
        with pytest.raises(CheckpointError, match="not the folder that rank 0 sees"):
            run_lock.check_same_folder(tmp_path / name, nonce)
    run_lock.check_same_folder(tmp_path / "run", nonce)
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == [".holder", ".lock"]


def test_a_machine_that_can_read_the_folder_alone_is_refused(tmp_path, monkeypatch):
    held = run_lock.lock(tmp_path / "run")
    nonce = held.nonce

    def refuse(dir):
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(CheckpointError, match="cannot write .*Read-only file system"):
        run_lock.check_same_folder(tmp_path / "run", nonce)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        run_lock.lock(tmp_path / "file")


def save_and_die(folder, iteration, num_operations):
    """Tidy, save and prune in a forked process, killed before file operation `num_operations`; True if not killed."""
    process = os.fork()
    if process == 0:
        code, count = 1, 0
        operations = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}

        def hook(event, arguments):
            nonlocal count
            if event in operations and str(folder) in str(arguments):
                count += 1
                if count > num_operations:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            tidy_save_and_prune(folder, iteration)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL)
    return code == 0


def tidy_save_and_prune(folder, iteration):
    manifest.remove_drafts(folder)
    save(folder, iteration)
    retention.delete_old(folder, 2)


@pytest.mark.processes
def test_killed_before_any_of_its_file_operations_a_save_leaves_two_whole_checkpoints(tmp_path):
    newest = []
    for num_operations in range(200):
        folder = tmp_path / str(num_operations)
        folder.mkdir()
        save(folder, 2)
        save(folder, 4)
        finished = save_and_die(folder, 6, num_operations)
        found, problems = resumed(folder)
        assert problems == [] and found.iteration in (4, 6)
        assert len([verified(entry) for entry in manifest.committed(folder)]) >= 2
        newest.append(found.iteration)
        # The next run clears up whatever this one left.
        tidy_save_and_prune(folder, found.iteration + 2)
        assert steps(folder) == [found.iteration, found.iteration + 2]
        assert not list(folder.glob("*.tmp*"))
        if finished:
            break
    # The walk went through the writing, the renaming and the pruning, and to the end.
    assert finished and newest.count(4) > 15 and newest.count(6) > 10
