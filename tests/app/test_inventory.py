"""What a run directory says of itself."""

import shlex

import pytest

from fomaml.app.cli import main
from fomaml.app.inventory import FILES
from fomaml.sealed import unsealed

pytest.importorskip("pandas", reason="tables are read by pandas, of the extra tables")
pytest.importorskip("timm", reason="some networks are timm's, of the extra backbones")


@pytest.mark.parametrize("name", ["grey", "table", "states"])
def test_each_file_and_the_names_of_each_part_are_told(name, run_of):
    run = run_of(name)
    text, parts = (run / "README.txt").read_text(), unsealed((run / "parts.json").read_text())
    there = {path.name for path in run.iterdir()} - {"README.txt", "report"}
    told = {line.split()[0] for line in text.splitlines() if line.split()[:1] and line.split()[0] in FILES}
    assert told == there | {"state.safetensors", "before.safetensors"}  # which is there while it trains
    assert [*parts] == ["training", "validation", "test"]
    names = [own for part in parts.values() for own in part]
    kind = "class" if name == "grey" else "m"
    assert sorted(names) == [f"{kind}{number}" for number in range(10)]


def test_functions_have_no_classes(tmp_path):
    main(
        [
            *["train", "sinusoid", "--iterations", "2", "--test-tasks", "2", "--no-baselines", "--out"],
            str(tmp_path / "a run"),
        ]
    )
    text = (tmp_path / "a run" / "README.txt").read_text()
    assert not (tmp_path / "a run" / "parts.json").exists() and "parts.json" not in text
    assert "calibration" not in text and "fomaml adapt" not in text


def test_the_commands_go(run_of, capsys):
    run = run_of("grey")
    told = (run / "README.txt").read_text().partition("What to type next:")[2]
    commands = [line.partition("  ")[0] for line in told.splitlines() if line.startswith("fomaml ")]
    for command in commands:
        words = shlex.split(command)[1:]
        if words[0] in ("show", "evaluate"):
            main(words)
    assert any(command.startswith(f"fomaml adapt {run} --support FOLDER") for command in commands)
    assert f"fomaml train --resume {run}" in commands
