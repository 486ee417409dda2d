"""The command line in the processes that torchrun starts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fomaml
import fomaml.app.launch as launching
from fomaml.app.cli import main
from fomaml.app.launch import Launch
from fomaml.errors import InputError
from started import started

FEW = [
    "sinusoid", "--iterations", "12", "--meta-batch-size", "7", "--test-tasks", "12", "--test-steps", "0", "2",
    "--no-baselines", "--checkpoint-every", "10",
]  # fmt: skip
ENVIRONMENT = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here",
    "MASTER_PORT": "29500",
}  # fmt: skip


def numbers(run):
    """What a run has found, without what its machine had to do with it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [
        {k: v for k, v in line.items() if k not in ("seconds", "crc32", "checksum", "digest")}
        for line in lines
    ]
    result = json.loads((run / "result.json").read_text())
    return load_file(run / "weights.safetensors"), [line.get("meta_loss") for line in lines], result["rows"]


def assert_same(run, other):
    (weights, lines, rows), (others, other_lines, other_rows) = numbers(run), numbers(other)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert (lines, rows) == (other_lines, other_rows)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of the same bits in one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    main(["train", *FEW, "--same-bits", "--out", str(run)])
    return run


def test_a_run_of_two_processes_is_that_of_one_bit_for_bit(alone, tmp_path):
    first, second = started(2, tmp_path, "train", *FEW, "--same-bits", "--out", "run")
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert_same(alone, tmp_path / "run")
    assert second.out == second.err == ""
    lines = first.out.splitlines()
    assert lines[0] == "2 processes of 1 thread each, by gloo"
    assert lines[1] == "the same bits for any number of processes, each with 1 thread"
    assert sorted(os.listdir(tmp_path / "run")) == sorted(os.listdir(alone))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["same_bits"], config["threads"]) == (True, 1)


def test_many_processes_evaluate_what_one_does(alone, tmp_path, capsys):
    words = ["evaluate", str(alone), "--tasks", "20", "--json"]
    main(words)
    expected = json.loads(capsys.readouterr().out)
    first, second = started(2, tmp_path, *words)
    assert (first.status, second.status, second.out, second.err) == (0, 0, "", "")
    assert json.loads(first.out) == expected


@pytest.mark.parametrize(
    ("given", "of_rank", "message"),
    [
        (["--shots", "0"], {}, "fomaml: error: --shots must be a whole number of 1 or more, got 0\n"),
        ([], {0: ["--ways", "x"]}, "fomaml: error: --ways takes a whole number, got 'x'; see fomaml train --help\n"),
        ([], {1: ["--clip", "0"]}, "fomaml: error: --clip must be a positive finite number, got 0.0 (rank 1 of 2)\n"),
        (["--threads", "2"], {}, "fomaml: error: --threads is of --same-bits, whose bits depend on it: give both, or "
         "OMP_NUM_THREADS\n"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_of_the_first_process(tmp_path, given, of_rank, message):
    if 0 in of_rank:
        of_rank = {**of_rank, 1: of_rank[0]}
    ended = started(2, tmp_path, "train", *FEW, *given, "--out", "run", of_rank=of_rank)
    assert [each.status for each in ended] == [2, 2]
    assert (ended[0].err, ended[1].err) == (message, "")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_an_error_of_all(alone, tmp_path):
    ended = started(2, tmp_path, "train", *FEW, "--out", str(alone))
    assert [each.status for each in ended] == [2, 2]
    assert ended[0].err.startswith(f"fomaml: error: {alone} already holds a run")


def test_a_command_for_one_process_says_so(tmp_path):
    ended = started(2, tmp_path, "presets")
    assert [each.status for each in ended] == [2, 2]
    assert ended[0].err == (
        "fomaml: error: fomaml presets runs in one process, and 2 were started: train, evaluate and compare take many\n"
    )


def test_a_signal_to_one_process_stops_all_at_the_same_step_and_others_go_on(tmp_path):
    few = [*FEW, "--same-bits"]
    few[few.index("--iterations") + 1] = "18"
    main(["train", *few, "--out", str(tmp_path / "whole")])
    ended = started(2, tmp_path, "train", *few, "--out", "run", signals={1: (signal.SIGTERM, 13)})
    assert [each.status for each in ended] == [143, 143]
    assert ended[0].err.splitlines()[-1] == "resume with: fomaml train --resume run"
    assert ended[1].err == ""
    # torchrun has started three in their place: the same command goes on
    again = started(3, tmp_path, "train", *few, "--out", "run", environ={"TORCHELASTIC_RESTART_COUNT": "1"})
    assert [each.status for each in again] == [0, 0, 0], again[0].err
    # the first process hears of the signal in a step of its own: one step more, or none
    assert re.search("resuming after iteration 1[34] of 18", again[0].out), again[0].out
    assert_same(tmp_path / "whole", tmp_path / "run")
    # and once more, after the end: it is told, and nothing is computed
    told = started(2, tmp_path, "train", *few, "--out", "run", environ={"TORCHELASTIC_RESTART_COUNT": "2"})
    assert [each.status for each in told] == [0, 0]
    assert "run directory: run" in told[0].out and "iteration" not in told[0].out


@pytest.mark.long
def test_validated_runs_and_comparisons_are_the_same_too(images, tmp_path):
    few = [
        "--ways",
        "2",
        "--query-shots",
        "2",
        "--channels",
        "4",
        "--iterations",
        "6",
        "--meta-batch-size",
        "7",
    ]
    few += ["--test-tasks", "6", "--same-bits", "--image-size", "16", "16", "--norm-policy", "running"]
    validated = ["--validate-every", "2", "--validation-tasks", "9", "--no-baselines"]
    words = ["train", f"folder:{images / 'even'}", *few, *validated]
    main([*words, "--out", str(tmp_path / "alone")])
    ended = started(3, tmp_path, *words, "--out", "run")
    assert [each.status for each in ended] == [0, 0, 0], ended[0].err
    assert_same(tmp_path / "alone", tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run")) == sorted(os.listdir(tmp_path / "alone"))
    words = ["compare", "sinusoid", "--algorithms", "reptile", "--iterations", "6", "--meta-batch-size", "7"]
    words += ["--test-tasks", "6", "--same-bits"]
    main([*words, "--out", str(tmp_path / "one")])
    ended = started(2, tmp_path, *words, "--out", "two")
    assert [each.status for each in ended] == [0, 0], ended[0].err
    assert ended[1].out == ended[1].err == ""
    for algorithm in ("fomaml", "reptile"):
        assert_same(tmp_path / "one" / algorithm, tmp_path / "two" / algorithm)
    restart = {"TORCHELASTIC_RESTART_COUNT": "1"}
    told = started(2, tmp_path, *words, "--out", "two", environ=restart)
    assert [each.status for each in told] == [0, 0] and "FOMAML" in told[0].out
    (tmp_path / "two" / "compare.json").unlink()  # as of one that died before its end
    shutil.rmtree(tmp_path / "two" / "reptile")
    again = started(3, tmp_path, *words, "--out", "two", environ=restart)
    assert [each.status for each in again] == [0, 0, 0], again[0].err
    assert "FOMAML (1/2): finished before" in again[0].out
    assert_same(tmp_path / "one" / "reptile", tmp_path / "two" / "reptile")


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_of_torchrun_comes_back_and_ends_the_same(alone, tmp_path, rank):
    few = [*FEW, "--same-bits"]
    few[few.index("--iterations") + 1] = "30"
    main(["train", *few, "--out", str(tmp_path / "whole")])
    worker = tmp_path / "worker.py"
    worker.write_text(KILLED_ONCE.format(rank=rank))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "3", str(worker), "train", *few, "--out", "run"]
    paths = [Path(fomaml.__file__).parents[1], Path(__file__).parents[1]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0 and "resuming after iteration" in done.stdout, done.stdout
    assert_same(tmp_path / "whole", tmp_path / "run")


KILLED_ONCE = """
import os, signal
from fomaml.app import session
from fomaml.app.cli import main
from moments import sending
if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("{rank}", "0"):
    session.train = sending(session.train, signal.SIGKILL, 17)
main()
"""


# --- how a process was started --------------------------------------------------------------------


def test_what_torchrun_says():
    launch = Launch(ENVIRONMENT | {"TORCHELASTIC_RESTART_COUNT": "2"})
    assert (launch.rank, launch.local_rank, launch.size, launch.local_size, launch.restarts) == (
        3,
        1,
        4,
        2,
        2,
    )
    assert launch.many and not launch.first
    for missing in ENVIRONMENT:
        alone = Launch({name: value for name, value in ENVIRONMENT.items() if name != missing})
        assert alone.first and not alone.many


def test_an_environment_that_is_not_torchruns_is_an_error():
    with pytest.raises(InputError, match=r"^the environment is not that of torchrun: RANK=first"):
        Launch(ENVIRONMENT | {"RANK": "first"}).check_command("train")


@pytest.mark.parametrize(
    ("environ", "before", "expected"),
    [
        ({"OMP_NUM_THREADS": "1"}, b"PATH=/bin\0", 4),
        ({"OMP_NUM_THREADS": "1"}, b"PATH=/bin\0OMP_NUM_THREADS=1\0", None),
        ({"OMP_NUM_THREADS": "3"}, b"PATH=/bin\0", None),
        ({}, b"PATH=/bin\0", None),
        ({"OMP_NUM_THREADS": "1", "WORLD_SIZE": "1"}, b"PATH=/bin\0", None),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "20"}, b"PATH=/bin\0", 1),
    ],
)
def test_threads_are_the_share_of_the_cores_where_torchrun_has_set_one(
    monkeypatch, environ, before, expected
):
    monkeypatch.setattr(launching, "cores", lambda: 9)
    monkeypatch.setattr(launching.Path, "read_bytes", lambda path: before)
    assert Launch(ENVIRONMENT | environ).threads() == expected


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    launch = Launch(ENVIRONMENT)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (launch.device("cpu"), launch.device("cuda"), launch.device("cuda:0")) == (
        "cpu",
        "cuda:1",
        "cuda:1",
    )
    with pytest.raises(InputError, match=r"^4 processes take a GPU each: give --device cuda, got cuda:3$"):
        launch.device("cuda:3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"^2 processes on a machine with 1 CUDA devices: start 1 there$"):
        launch.device("cuda")
