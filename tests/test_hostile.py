"""What has been changed at random, or made to do harm, is read to the end or refused in one line."""

import json
import random
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hostile
from hostile import CASES, outcome

EXAMPLES = 5  # of a kind; `runs/fuzz.py` runs thousands


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        hostile.write(folder)
        yield folder


def test_the_base_is_whole(base):
    names = {path.name for path in (base / "stopped").iterdir()}
    assert {"state.safetensors", "config.json", "metrics.jsonl"} <= names and "result.json" not in names
    assert (base / "adapted" / "model.json").exists() and (base / "run" / "calibration.json").exists()
    for words in (["show", base / "run"], ["predict", base / "adapted", base / "data" / "class0"]):
        assert hostile.quietly(words) == (0, "")


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.filterwarnings("default")  # a library may warn of what is damaged
def test_the_outcome_is_clean_or_one_line(base, kind, tmp_path_factory):
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[*HealthCheck],
    )
    @given(st.integers(0, 2**32))
    def holds(seed):
        found = outcome(kind, base, tmp_path_factory.mktemp("case"), random.Random(f"{kind} {seed}"))
        assert found in ("clean", "refused"), found

    holds()


@pytest.mark.parametrize("seed", range(20))
def test_what_is_changed_is_another(seed):
    numbers = random.Random(seed)
    data = json.dumps({"a": [1, {"b": None}], "c": "x"}).encode()
    assert hostile.spoiled_json(data, numbers) != data or hostile.spoiled(data, numbers) != data


def test_faults_are_told(base, tmp_path, monkeypatch):
    """What is no InputError, more than one line, a status of another kind, and a file left half-written."""
    (tmp_path / "in").mkdir()

    def raising(error):
        def use():
            raise error

        return use

    def leaving():
        (tmp_path / "in" / ".x.json.123").write_text("")

    for use, told in (
        (raising(KeyError("x")), "KeyError"),
        (raising(OSError(2, "x")), "FileNotFoundError"),
        (leaving, "left .x.json.123"),
    ):
        monkeypatch.setitem(CASES, "own", lambda *_, use=use: use)
        assert told in outcome("own", base, tmp_path / "in", random.Random(0))
    monkeypatch.setattr(hostile, "main", lambda words: (_ for _ in ()).throw(SystemExit(1)))
    monkeypatch.setitem(CASES, "own", lambda *_: ["x"])
    assert "status 1" in outcome("own", base, tmp_path / "in", random.Random(0))

    def two_lines(words):
        print("fomaml: error: a\nb", file=sys.stderr)
        raise SystemExit(2)

    monkeypatch.setattr(hostile, "main", two_lines)
    assert "not one line" in outcome("own", base, tmp_path / "in", random.Random(0))
