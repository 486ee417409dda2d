"""A folder of one's own images on the command line: how it is split, what is short, and what would do."""

import json
import re
import shutil

import pytest

from commands import refused
from fomaml.app.cli import main
from fomaml.app.rundir import load_settings
from fomaml.app.settle import settle
from fomaml.app.sources import source_of

OPTIONS = "--iterations 1 --meta-batch-size 1 --test-tasks 2 --channels 4 --test-steps 0 1 --no-baselines"
QUICK = OPTIONS.split()
MANY = ["--query-shots", "2", "--ways", "2"]


@pytest.mark.parametrize(
    ("folder", "options", "expected"),
    [
        ("even", "--ways 5", "10 classes were split 6 / 2 / 2; validation and test need 5 each: "
         "give --shares 0.5 0 0.5 (without validation) or --ways 2, or add classes"),
        ("even", "--ways 3", "10 classes were split 6 / 2 / 2; validation and test need 3 each: "
         "give --shares 0.4 0.3 0.3 or --ways 2, or add classes"),
        ("even", "--ways 3 --shares 0.2 0.4 0.4", "10 classes were split 2 / 4 / 4; training needs 3: "
         "give --shares 0.4 0.3 0.3 or --ways 2, or add classes"),
        ("even", "--ways 6", "10 classes were split 6 / 2 / 2; validation and test need 6 each: "
         "give --ways 2, or add classes"),
        ("parts", "--ways 3", "its directories for training and test hold 3 / 2 classes; test needs 3: "
         "give --ways 2, or add classes"),
        ("uneven", "--ways 2", "4 of 10 classes have fewer images than a task takes, 3 with the query shots "
         "(class6 1, class7 1, class8 1, class9 1): train with --skip-small-classes, which leaves them out, or fewer"),
        ("uneven", "--ways 2 --skip-small-classes", "6 classes were split 4 / 1 / 1 (4 with too few images were left "
         "out); validation and test need 2 each: give --shares 0.4 0.3 0.3, or add classes"),
    ],
)  # fmt: skip
def test_a_folder_that_is_too_small_says_what_is_short(folder, options, expected, images, tmp_path, capsys):
    base = ["train", f"folder:{images / folder}", "--query-shots", "2", *QUICK, "--out", tmp_path / "out"]
    said = refused(capsys, [*base, *options.split()])
    assert expected in said
    if offered := re.search(r"give --shares ([\d.]+) ([\d.]+) ([\d.]+)", said):
        own = re.sub(r"--shares [\d. ]+", "", options).split()
        main([*map(str, base), *own, "--shares", *offered.groups()])  # what is offered would do


def test_training_and_test_suffice(images, tmp_path, capsys):
    base = ["train", f"folder:{images / 'parts'}", *MANY, *QUICK]
    main([*base, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert f"no validation: the folder {images / 'parts'} has no directory val" in said
    assert "(1 of 2 test classes were seen in training)" in said
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["protocol"]["overlap"] == "1 of 2 test classes were seen in training"
    for option in ("--validate-every", "--patience"):
        said = refused(capsys, [*base, "--out", tmp_path / "b", option, "1"])
        assert said.endswith(f"has no directory val; give no {option}, or other data")
    said = refused(capsys, ["evaluate", tmp_path / "out", "--part", "validation"])
    assert said.endswith("has no directory val; take --part test")
    said = refused(capsys, [*base, "--out", tmp_path / "b", "--shares", "0.5", "0", "0.5"])
    assert "is split by its directories train, test, where no shares are of use, got 0.5 0 0.5" in said


def test_small_classes_are_left_out_before_the_split_and_stay_so(images, tmp_path, capsys):
    """Other shots at the test must not move classes from training to the test."""
    out = tmp_path / "out"
    shares = ["--shares", "0.5", "0", "0.5", "--skip-small-classes"]
    main(["train", f"folder:{images / 'uneven'}", *MANY, *QUICK, *shares, "--out", str(out)])
    said = capsys.readouterr().out
    assert "left out 4 classes with fewer than 3 images (class6 1, class7 1, class8 1, class9 1)" in said
    own = load_settings(out)
    assert (own.skip_small_classes, own.shares) == (3, (0.5, 0.0, 0.5))
    before = source_of(own).load(own, False)
    main(["evaluate", str(out), "--shots", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["protocol"]["overlap"] is None
    assert len(before.train) == len(before.test) == 3


def test_no_overlap_is_told_where_there_is_none(images, tmp_path, capsys):
    main(["train", f"folder:{images / 'even'}", *MANY, *QUICK, "--out", str(tmp_path / "out")])
    assert "seen in training" not in capsys.readouterr().out


def test_skipping_is_the_number_of_images_of_a_task():
    assert settle(source="folder:x").skip_small_classes is None
    assert settle(source="folder:x", skip_small_classes=True, shots=3, query_shots=4).skip_small_classes == 7
    assert (
        settle(source="folder:x", skip_small_classes=True, shots=3, test_query_shots=20).skip_small_classes
        == 23
    )


@pytest.mark.parametrize("source", ["folder", "tasks"])
def test_images_decoded_when_they_are_drawn_train_the_same_run(source, images, tmp_path, capsys):
    path = images / "even"
    if source == "tasks":
        path = tmp_path / "sites"
        for site in range(6):
            shutil.copytree(images / "even", path / f"site{site}")
    base = ["train", f"folder:{path}", "--query-shots", "1", "--ways", "2", *QUICK]
    weights = []
    for way in ("once", "drawn"):
        main([*base, "--decode", way, "--out", str(tmp_path / way)])
        weights.append((tmp_path / way / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert load_settings(tmp_path / "drawn").decode == "drawn"
    main(["evaluate", str(tmp_path / "drawn")])
    capsys.readouterr()


def test_a_large_folder_says_in_one_line_that_it_is_decoded_when_drawn(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fomaml.data.images.IN_MEMORY", 1000)
    main(["train", f"folder:{images / 'even'}", *MANY, *QUICK, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "they are decoded whenever they are drawn" in line] == [
        f"{images / 'even'}: 60 images would take 0.0 GiB, more than 0.0: they are decoded whenever they are drawn"
    ]
