"""The three splits of Omniglot's characters."""

import random
from itertools import combinations

import pytest
import torch

from fomaml.data import omniglot
from fomaml.data.omniglot import load_omniglot
from omniglot_files import ALL, assert_same, error_of, write

pytestmark = pytest.mark.usefixtures("cache", "tiny")


def write_vinyals(root, parts=None, rotations=omniglot.ROTATIONS):
    for part, names in (parts or {"train": ALL[:5], "val": ALL[5:7], "test": ALL[7:]}).items():
        lines = [f"{name}/{rotation}\n" for name in names for rotation in rotations]
        (root / f"vinyals_{part}.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("split", ["maml", "vinyals"])
def test_the_three_parts_share_no_character_and_miss_none(root, split):
    write_vinyals(root)
    found = load_omniglot(root, split=split)
    parts = [set(part.names) for part in found[:3]]
    assert [len(part) for part in parts] == [5, 2, 3]
    assert all(a.isdisjoint(b) for a, b in combinations(parts, 2))
    assert set.union(*parts) == set(ALL)
    whole = load_omniglot(root, split="background-evaluation")
    for part in found[:3]:  # each drawing is with its own name
        for name in part.names:
            half = whole.train if name in whole.train.names else whole.test
            assert torch.equal(part.select([name]).inputs, half.select([name]).inputs)


def test_background_and_evaluation_share_no_alphabet(root):
    found = load_omniglot(root, split="background-evaluation")
    assert (found.split, found.validation) == ("background-evaluation", None)
    alphabets = [{name.partition("/")[0] for name in part.names} for part in (found.train, found.test)]
    assert alphabets == [{"Greek", "Latin"}, {"Angelic", "Manipuri"}]


def test_mamls_split_is_a_shuffle_of_the_sorted_names_by_the_seed(root):
    shuffled = list(ALL)
    random.Random(1).shuffle(shuffled)
    first = load_omniglot(root)
    assert first.split == "maml, seed 1"
    assert [part.names for part in first[:3]] == [shuffled[:5], shuffled[5:7], shuffled[7:]]
    assert_same(load_omniglot(root), first)
    other = load_omniglot(root, seed=2)
    assert other.split == "maml, seed 2" and other.train.names != first.train.names


def test_pythons_shuffle_has_not_changed():
    numbers = list(range(10))
    random.Random(1).shuffle(numbers)
    assert numbers == [6, 8, 9, 7, 5, 3, 0, 4, 1, 2]


def test_vinyals_split_is_the_text_files(root, tmp_path):
    write_vinyals(root)
    found = load_omniglot(root, split="vinyals")
    assert found.split == "vinyals"
    assert [part.names for part in found[:3]] == [ALL[:5], ALL[5:7], ALL[7:]]
    layout = write(tmp_path / "layout" / "omniglot-py").parent
    assert_same(load_omniglot(write_vinyals(layout), split="vinyals"), found)
    for path in layout.glob("*.txt"):
        path.rename(layout / "omniglot-py" / path.name)
    assert_same(load_omniglot(layout, split="vinyals"), found)


def test_missing_text_files_are_named(root):
    files = "vinyals_train.txt, vinyals_val.txt, vinyals_test.txt"
    end = "for the split vinyals; add them, or take the split maml or background-evaluation"
    text = f"expected the text files {files} beside the data {end}"
    assert error_of(root, split="vinyals") == f"{root}: no {files}, {text}"
    (write_vinyals(root) / "vinyals_val.txt").unlink()
    assert error_of(root, split="vinyals") == f"{root}: no vinyals_val.txt, {text}"


LINE = "ALPHABET/characterNN/rotDDD of one of the 10 characters"
BAD_TEXTS = {
    "no such character": ("val", "Klingon/character01/rot000\n",
                          f"found the line 'Klingon/character01/rot000', expected {LINE}"),
    "no rotation": ("val", f"{ALL[5]}\n", f"found the line '{ALL[5]}', expected {LINE}"),
    "no such rotation": ("val", f"{ALL[5]}/rot045\n",
                         f"found the line '{ALL[5]}/rot045', expected {LINE}"),
    "binary": ("val", b"\xff\n", f"found the line '\ufffd', expected {LINE}"),
    "twice in a file": ("train", f"{ALL[0]}/rot090\n",
                        f"found {ALL[0]}/rot090 once more after vinyals_train.txt, expected it once"),
    "in two files": ("test", f"{ALL[0]}/rot000\n",
                     f"found {ALL[0]}/rot000 once more after vinyals_train.txt, expected it once"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_bad_text_file_is_named(root, case):
    part, line, message = BAD_TEXTS[case]
    path = write_vinyals(root) / f"vinyals_{part}.txt"
    path.write_bytes(path.read_bytes() + (line if isinstance(line, bytes) else line.encode()))
    assert (
        error_of(root, split="vinyals") == f"{path}: {message}; take Vinyals et al.'s text files as they are"
    )


def test_a_character_whose_rotations_are_in_two_text_files_is_an_error(root):
    train, test = (write_vinyals(root) / f"vinyals_{part}.txt" for part in ("train", "test"))
    line = f"{ALL[0]}/rot270\n"
    train.write_text(train.read_text().replace(line, ""))
    test.write_text(test.read_text() + line)
    message = f"{test}: found {ALL[0]}/rot270 once more after vinyals_train.txt, expected it once"
    assert error_of(root, split="vinyals").startswith(message)


def test_text_files_that_leave_out_a_character_or_a_part_are_named(root):
    write_vinyals(root, {"train": ALL[:5], "val": ALL[5:7], "test": ALL[7:-1]})
    message = (
        f"found 1 of 10 characters without all rotations, first {ALL[-1]}, expected each in all of rot000"
    )
    assert message in error_of(root, split="vinyals")
    write_vinyals(root, rotations=omniglot.ROTATIONS[:3])
    assert "found 10 of 10 characters without all rotations" in error_of(root, split="vinyals")
    write_vinyals(root, {"train": ALL[:7], "val": [], "test": ALL[7:]})
    message = f"{root / 'vinyals_val.txt'}: found an empty file, expected the characters of a part"
    assert error_of(root, split="vinyals").startswith(message)
