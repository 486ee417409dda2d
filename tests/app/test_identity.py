"""Whose run a directory holds: its settings and its data, and what may be another when it goes on."""

import json
import shutil

import numpy as np
import pytest

import fomaml
from commands import refused
from fomaml.app import data_identity, session
from fomaml.app.cli import main
from fomaml.app.rundir import load_settings
from fomaml.sealed import unsealed

Image = pytest.importorskip("PIL.Image", reason="pictures are read by Pillow, of the extra images")

TRAIN = (
    "train sinusoid --iterations 4 --checkpoint-every 1 --meta-batch-size 2 --test-tasks 3 --test-steps 0 1 "
    "--no-baselines --schedule constant"
)
PICTURES = (
    "--channels 4 --ways 2 --shots 1 --query-shots 1 --inner-steps 1 --test-steps 0 1 --meta-batch-size 2 "
    "--iterations 2 --test-tasks 2 --validate-every 0 --shares 0.5 0 0.5 --no-baselines"
)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / "pictures" / f"c{number}"
        folder.mkdir(parents=True)
        for each in range(3):
            Image.fromarray(random.integers(0, 255, (16, 16), np.uint8)).save(folder / f"{each}.png")
    return tmp_path / "pictures"


def stopped(words, out, monkeypatch, at):
    """A run that is stopped after an iteration."""
    real = session.train

    def stopping(*arguments, **options):
        for record in real(*arguments, **options):
            yield record
            if record.iteration == at:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "train", stopping)
        with pytest.raises(SystemExit) as stop:
            main([*words, "--out", str(out)])
    assert stop.value.code == 130


def test_another_runs_state_is_not_adopted(tmp_path, monkeypatch, capsys):
    stopped(TRAIN.split(), tmp_path / "one", monkeypatch, 3)
    stopped([*TRAIN.split(), "--seed", "1"], tmp_path / "other", monkeypatch, 3)
    (tmp_path / "left").mkdir()
    shutil.copy(tmp_path / "one" / "state.safetensors", tmp_path / "left")
    said = refused(capsys, [*TRAIN.split(), "--out", tmp_path / "left"])
    assert said.startswith(
        f"{tmp_path / 'left'} already holds what is left of a run, state.safetensors; give another"
    )
    for name in ("state.safetensors", "before.safetensors"):
        shutil.copy(tmp_path / "one" / name, tmp_path / "other")
    said = refused(capsys, ["train", "--resume", tmp_path / "other"])
    assert "state.safetensors was written for other settings than those given" in said


def test_other_data_are_refused_to_train_on_and_told_to_judge_by(pictures, tmp_path, monkeypatch, capsys):
    out, words = tmp_path / "run", ["train", f"folder:{pictures}", *PICTURES.split()]
    stopped(words, out, monkeypatch, 1)
    shutil.copytree(out, tmp_path / "again")
    record = load_settings(out).data
    assert (record["files"], len(record["sha256"])) == (18, 64) and str(tmp_path) not in json.dumps(record)
    one = pictures / "c1" / "1.png"
    whole = one.read_bytes()
    Image.new("L", (16, 16)).save(one)
    said = refused(capsys, ["train", "--resume", out])
    assert "holds other data than those that the run began with" in said
    one.write_bytes(whole)
    main(["train", "--resume", str(out)])
    capsys.readouterr()
    main(["evaluate", str(out), "--json"])
    assert "other_data" not in json.loads(capsys.readouterr().out)
    Image.new("L", (16, 16)).save(pictures / "c2" / "more.png")
    main(["evaluate", str(out), "--json"])
    said = json.loads(capsys.readouterr().out)["other_data"]
    assert said.endswith("other data than those that the run was trained with (19 files, before 18)")


def test_data_that_have_moved_are_named_again(pictures, tmp_path, monkeypatch, capsys):
    words = ["train", f"folder:{pictures}", *PICTURES.split()]
    main([*words, "--out", str(tmp_path / "whole")])
    stopped(words, tmp_path / "run", monkeypatch, 1)
    moved = pictures.rename(tmp_path / "elsewhere")
    resume = ["train", "--resume", str(tmp_path / "run")]
    gone = refused(capsys, resume)
    assert "--data-root" in gone and str(pictures) in gone
    main([*resume, "--data-root", str(moved)])
    weights = [(tmp_path / run / "weights.safetensors").read_bytes() for run in ("whole", "run")]
    assert weights[0] == weights[1]
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "run"), "--json"])  # the run has it recorded
    assert "--data-root" in refused(capsys, ["evaluate", tmp_path / "whole"])
    main(["evaluate", str(tmp_path / "whole"), "--json", "--data-root", str(moved)])
    assert "no --data-root" in refused(capsys, [*words, "--data-root", moved, "--out", tmp_path / "new"])


def test_files_are_digested_again_when_they_have_changed(pictures, monkeypatch):
    found = [data_identity._of_folder(pictures)]
    monkeypatch.setattr(data_identity, "_file_digest", lambda *_: pytest.fail("read again"))
    found.append(data_identity._of_folder(pictures))
    moved = pictures.rename(pictures.with_name("moved"))
    monkeypatch.undo()
    found.append(data_identity._of_folder(moved))
    assert found[0] == found[1] == found[2]
    (moved / "c0" / "0.png").rename(moved / "c0" / "9.png")
    assert data_identity._of_folder(moved)["sha256"] != found[0]["sha256"]


def test_of_a_large_file_blocks_are_digested(tmp_path, monkeypatch):
    monkeypatch.setattr(data_identity, "WHOLE", 10**4)
    monkeypatch.setattr(data_identity, "BLOCK", 100)
    path, data = tmp_path / "own.csv", bytearray(np.random.default_rng(0).bytes(20_000))
    path.write_bytes(data)
    before = data_identity._of_file(path)
    for place, same in ((0, False), (len(data) - 1, False), (200, True)):
        data[place] ^= 1
        path.write_bytes(data)
        assert (data_identity._of_file(path) == before) == same, place
        data[place] ^= 1
    path.write_bytes(data + b"x")
    assert data_identity._of_file(path)["bytes"] == before["bytes"] + 1


def test_a_run_goes_on_for_longer_and_records_it(tmp_path, monkeypatch, capsys):
    stopped(TRAIN.split(), tmp_path / "run", monkeypatch, 3)
    main(["train", "--resume", str(tmp_path / "run"), "--iterations", "6", "--test-tasks", "2"])
    main([*TRAIN.replace("4", "6", 1).split(), "--out", str(tmp_path / "whole")])
    first, second = (
        fomaml.checkpoint.load_tensors(tmp_path / name / "weights.safetensors")[0]
        for name in ("run", "whole")
    )
    assert all(first[name].equal(second[name]) for name in second)
    changed = [
        {"iteration": 3, "setting": "iterations", "from": 4, "to": 6},
        {"iteration": 3, "setting": "test_tasks", "from": 3, "to": 2},
    ]
    assert unsealed((tmp_path / "run" / "config.json").read_text())["changed"] == changed
    assert unsealed((tmp_path / "run" / "result.json").read_text())["changed"] == changed
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "run"), "--json"])  # the weights are still of these settings
    assert json.loads(capsys.readouterr().out)["tasks"] == 2


def test_fewer_iterations_than_there_are_and_other_settings_are_refused(tmp_path, monkeypatch, capsys):
    stopped(TRAIN.split(), tmp_path / "run", monkeypatch, 3)
    resume = ["train", "--resume", tmp_path / "run"]
    assert "has 3 iterations: give no fewer --iterations" in refused(capsys, [*resume, "--iterations", "2"])
    assert "and no --meta-lr; what may be another is" in refused(capsys, [*resume, "--meta-lr", "1"])
    assert "--iterations must be" in refused(capsys, [*resume, "--iterations", "0"])


@pytest.mark.parametrize("options", [("--meta-lr", "1e30"), ("--meta-lr", "3e38"), ("--inner-lr", "1e30")])
def test_nothing_that_is_not_finite_is_written(options, tmp_path, capsys):
    said = refused(capsys, [*TRAIN.split(), *options, "--out", tmp_path / "run"])
    assert "try a smaller --meta-lr" in said or "try a smaller --inner-lr" in said
    for path in (tmp_path / "run").glob("*.safetensors"):
        for name, tensor in fomaml.checkpoint.load_tensors(path)[0].items():
            assert not tensor.is_floating_point() or tensor.isfinite().all(), (path, name)
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_files_have_the_folders_ordinary_permissions(tmp_path):
    main([*TRAIN.split(), "--out", str(tmp_path / "run")])
    (tmp_path / "own").touch()
    ordinary = (tmp_path / "own").stat().st_mode
    for path in (tmp_path / "run").iterdir():
        assert path.stat().st_mode == ordinary, path
