import datetime

import numpy as np
import pytest
import torch

from fomaml import GroupEpisodes, GroupSource
from fomaml.errors import InputError

pd = pytest.importorskip("pandas", reason="tables are read by pandas, of the extra tables")

FRAME = pd.DataFrame(
    {
        "machine": ["b", "a", "b", "c", "a", "c", "b", "a"],
        "hour": [3, 1, 1, 2, 2, 1, 2, 3],
        "temperature": [20.5, 21.0, 22.5, 19.0, 18.5, 17.0, 23.0, 25.0],
        "load": [1, 2, 3, 4, 5, 6, 7, 8],
        "tool": ["mill", "lathe", "mill", "drill", "lathe", "drill", "mill", "mill"],
        "state": ["good", "bad", "bad", "good", "good", "bad", "good", "bad"],
        "wear": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8],
    }
)
NUMBERS = ["temperature", "load"]


def written(folder, suffix, frame=FRAME):
    path = folder / f"machines.{suffix}"
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="parquet is read by pyarrow, of the extra tables")
        frame.to_parquet(path)
    else:
        frame.to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False)
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "DataFrame"])
def test_rows_of_a_table_are_those_of_pandas(suffix, tmp_path):
    table = FRAME if suffix == "DataFrame" else str(written(tmp_path, suffix))
    found = GroupSource.from_table(table, task="machine", target="wear", order="hour", features=NUMBERS)
    assert found.kind == "regression" and found.outputs == 1 and found.dropped == 0
    assert found.names == ["a", "b", "c"] and found.input_names == NUMBERS and found.target_names == ["wear"]
    for number, name in enumerate(found.names):
        own = FRAME[FRAME.machine == name].sort_values("hour")
        inputs, targets = found.take(found.positions(number)[0])
        np.testing.assert_array_equal(inputs, own[NUMBERS].to_numpy(np.float32))
        np.testing.assert_array_equal(targets, own[["wear"]].to_numpy(np.float32))


def test_all_other_columns_are_features_by_default():
    frame = FRAME.drop(columns=["tool", "state"])
    found = GroupSource.from_table(frame, task="machine", target="wear", order="hour")
    assert found.input_names == ["hour", "temperature", "load"] and found.input_shapes == (3,)
    found = GroupSource.from_table(frame, task="machine", target=["wear", "load"])
    assert found.input_names == ["hour", "temperature"] and found.target_names == ["wear", "load"]
    assert found.outputs == 2 and found.kind == "regression"
    dated = frame.assign(hour=pd.to_datetime("2026-01-01") + pd.to_timedelta(frame.hour, unit="h"))
    found = GroupSource.from_table(dated, task="machine", target="wear", order="hour")
    assert found.input_names == ["temperature", "load"]


@pytest.mark.parametrize("kept_as", ["iso", "date", "datetime", "zone", "python"])
def test_dates_order_rows(kept_as, tmp_path):
    times = pd.to_datetime("2026-01-30") + pd.to_timedelta(FRAME.hour, unit="D")
    column = {
        "iso": times.dt.strftime("%Y-%m-%d %H:%M"),
        "date": times.dt.strftime("%Y-%m-%d"),
        "datetime": times,
        "zone": times.dt.tz_localize("Asia/Tokyo"),
        "python": pd.Series(
            [datetime.date(2026, 1, 29 + hour) for hour in [2, 0, 0, 1, 1, 0, 1, 2]], dtype=object
        ),
    }[kept_as]
    found = GroupSource.from_table(
        FRAME.assign(hour=column), task="machine", target="wear", order="hour", features=NUMBERS
    )
    assert found.rows.tolist() == [1, 4, 7, 2, 6, 0, 5, 3]


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (FRAME.state, "classification"),
        (FRAME.state.astype("category"), "classification"),
        (FRAME.state == "good", "classification"),
        (FRAME.load % 3, "classification"),
        ((FRAME.load % 3).astype("Int64"), "classification"),
        (FRAME.load / 2, "regression"),
        (FRAME.load.astype(float), "regression"),
        (pd.Series(range(8)) * 100, "classification"),
    ],
)
def test_the_kind_follows_from_the_target(column, kind):
    found = GroupSource.from_table(
        FRAME.assign(target=column), task="machine", target="target", features=NUMBERS
    )
    assert found.kind == kind


@pytest.mark.parametrize(
    ("labels", "kind"), [([1, None, 2, 3] * 2, "classification"), ([1, None, 2.5, 3] * 2, "regression")]
)
def test_labels_that_once_lacked_some_are_classes(labels, kind, tmp_path):
    path = written(tmp_path, "csv", FRAME.assign(state=labels))
    found = GroupSource.from_table(path, task="machine", target="state", features=NUMBERS, drop_missing=True)
    assert found.kind == kind and found.classes == (["1", "2", "3"] if kind == "classification" else None)


def test_whole_numbers_of_many_values_are_regressed_on_unless_asked():
    frame = pd.DataFrame({"task": np.arange(42) // 6, "x": np.arange(42.0), "y": np.arange(42) % 21})
    assert GroupSource.from_table(frame, task="task", target="y").kind == "regression"
    found = GroupSource.from_table(frame, task="task", target="y", kind="classification")
    assert found.classes == [str(number) for number in range(21)]
    assert GroupSource.from_table(frame[frame.y < 20], task="task", target="y").kind == "classification"


def test_categories_are_whole_numbers_beside_the_others():
    found = GroupSource.from_table(
        FRAME, task="machine", target="wear", features=["temperature", "tool", "load"], categorical=["tool"]
    )
    assert found.input_names == ["temperature", "load", "tool"]
    assert found.categories == {"tool": ["drill", "lathe", "mill"]}
    assert found.input_shapes == {"numbers": (2,), "categories": (1,)}
    inputs, _ = found.take(np.arange(8))
    assert inputs["categories"].dtype == torch.int64
    names = [found.categories["tool"][number] for number in inputs["categories"][:, 0]]
    assert names == FRAME.tool[found.rows].tolist()
    alone = GroupSource.from_table(
        FRAME, task="machine", target="wear", features=[], categorical=["tool", "load"]
    )
    assert alone.input_shapes == {"numbers": (0,), "categories": (2,)}
    assert set(alone.fit_scaling().inputs) == {"['numbers']"} or alone.fit_scaling().inputs == {}


def test_rows_that_lack_values_are_dropped_and_counted_where_asked(tmp_path):
    frame = FRAME.copy()
    frame.loc[[1, 4], "temperature"] = np.nan
    frame.loc[4, "machine"] = None
    frame.loc[6, "tool"] = None  # of no use here
    path = written(tmp_path, "csv", frame)
    choice = {"task": "machine", "target": "wear", "features": NUMBERS}
    with pytest.raises(InputError) as caught:
        GroupSource.from_table(path, **choice)
    assert str(caught.value) == (
        f"{path} lacks values in 2 of 8 rows, the first in row 2, column 'temperature' (by column: 'machine' 1, "
        "'temperature' 2): fill them in, or drop these rows (drop_missing=True)"
    )
    found = GroupSource.from_table(path, **choice, drop_missing=True)
    assert found.dropped == 2 and found.counts.tolist() == [1, 3, 2]
    drawn = found.take(np.arange(6))[1][:, 0]
    expected = frame.dropna(subset=["machine", *NUMBERS]).sort_values("machine", kind="stable").wear
    np.testing.assert_array_equal(drawn, expected.to_numpy(np.float32))


def test_keys_of_whole_numbers_that_once_lacked_some_have_no_point(tmp_path):
    frame = pd.DataFrame({"task": [1.0, 2.0, np.nan, 10.0], "x": range(4), "y": [0.5, 1.5, 2.5, 3.5]})
    found = GroupSource.from_table(
        written(tmp_path, "csv", frame), task="task", target="y", drop_missing=True
    )
    assert found.names == ["1", "2", "10"]


def test_another_separator_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "machines.csv"
    path.write_bytes(FRAME.to_csv(sep=";", index=False).encode("utf-8-sig"))
    found = GroupSource.from_table(path, task="machine", target="wear", features=NUMBERS, separator=";")
    assert found.names == ["a", "b", "c"]


def test_a_decimal_comma(tmp_path):
    path = tmp_path / "table.csv"
    FRAME.to_csv(path, sep=";", decimal=",", index=False)
    given = {"task": "machine", "target": "wear", "features": NUMBERS, "separator": ";"}
    found = GroupSource.from_table(path, **given, decimal=",")
    inputs, targets = found.take(np.arange(8))
    assert np.allclose(inputs, FRAME[NUMBERS].to_numpy()[found.rows])
    assert np.allclose(targets[:, 0], FRAME.wear.to_numpy()[found.rows])
    with pytest.raises(InputError, match=r"'wear' .* '0,1' in row 1, .* give decimal=','"):
        GroupSource.from_table(path, **given)
    with pytest.raises(InputError, match=r"decimal must be '\.' or ',', got 'x'"):
        GroupSource.from_table(path, **given, decimal="x")


@pytest.mark.parametrize(
    ("flaw", "text"),
    [
        (lambda number: str(number), "'0.0' in row 1; it reads as numbers: convert it"),
        (lambda number: str(number).replace(".", ","), "'0,0' in row 1, with a comma .* give decimal=','"),
        (lambda number: "n.a.?" if number == 2 else str(number), r"text, .* 'n\.a\.\?' in row 5, the first of 1 such"),
    ],
)  # fmt: skip
def test_a_quantity_with_a_flaw_is_not_taken_for_classes(flaw, text):
    frame = pd.DataFrame({"task": np.arange(42) // 6, "x": np.arange(42.0)})
    frame["y"] = [flaw(number / 2) for number in range(42)]
    with pytest.raises(InputError, match=f"the target 'y' .* {text}"):
        GroupSource.from_table(frame, task="task", target="y")
    assert GroupSource.from_table(frame, task="task", target="y", kind="classification").outputs == 42


def test_a_dataframe_of_polars():
    polars = pytest.importorskip("polars", reason="polars is not installed")
    found = GroupSource.from_table(
        polars.from_pandas(FRAME), task="machine", target="state", order="hour", features=NUMBERS
    )
    assert found.classes == ["bad", "good"] and found.rows.tolist() == [1, 4, 7, 2, 6, 0, 5, 3]


def test_the_table_makes_tasks():
    found = GroupSource.from_table(FRAME, task="machine", target="wear", order="hour", features=NUMBERS)
    episodes = GroupEpisodes(found, shots=1, query_shots=None, draw="first", in_turn=True)
    hours = FRAME.hour.to_numpy()
    for index in range(3):
        support, query = episodes.rows(index)
        assert hours[support].tolist() == [1] and hours[query].tolist() in ([2, 3], [2])


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"task": "machin"}, "the table has no column 'machin'; there are: machine, "),
        ({"target": ["wear", "Weer"]}, "no column 'Weer'; there are: wear, "),
        ({"order": "our"}, "no column 'our'; there are: hour, "),
        ({"features": ["temp"]}, "no column 'temp'; there are: temperature, "),
        ({"categorical": ["tols"]}, "no column 'tols'; there are: tool, "),
        ({"features": ["load", "wear"]}, "the column 'wear' is given both as target and as feature"),
        ({"features": ["machine"]}, "'machine' is given both as task and as feature"),
        ({"target": "machine"}, "'machine' is given both as task and as target"),
        ({"order": "wear"}, "'wear' is given both as target and as order"),
        ({"categorical": ["wear"]}, "'wear' is given both as target and as categorical feature"),
        ({"features": ["load", "load"]}, "the feature 'load' is given twice"),
        ({"target": ["wear", "wear"]}, "the target 'wear' is given twice"),
        ({"target": []}, "no target given"),
        ({"features": []}, "no features given"),
        ({"features": ["load", "tool"]}, "the feature 'tool' of the table holds text, .*'mill' in row 1; list it"),
        ({"features": None}, "the feature 'tool' of the table holds text"),
        ({"target": "tool", "kind": "regression"}, "the target 'tool' .* holds text, .*; text is for classification"),
        ({"target": "wear", "kind": "classification"}, "the target 'wear' of the table holds numbers such as 0.1"),
        ({"target": ["wear", "hour"], "kind": "classification"}, "classification has one target, got wear, hour"),
        ({"kind": "ranking"}, "ranking"),
        ({"order": "tool"}, "the order 'tool' of the table holds text such as 'mill', expected numbers or dates"),
    ],
)  # fmt: skip
def test_columns_that_do_not_go_are_refused(change, text):
    given = {"task": "machine", "target": "wear", "features": NUMBERS}
    with pytest.raises(InputError, match=text) as caught:
        GroupSource.from_table(FRAME, **{**given, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "values", "more", "text"),
    [
        ("load", ["1", "2", "x4", "4", "5", "6", "7", "?"], {}, "'load' .* 'x4' in row 3, the first of 2 such rows"),
        ("load", list("12345678"), {}, "'load' .* holds text, .* '1' in row 1; it reads as numbers: convert it"),
        ("load", ["1,5", *"2345678"], {}, "'1,5' in row 1, with a comma for the decimal point: give decimal=','"),
        ("wear", ["0,5", "-1,5"] * 4, {}, "the target 'wear' .* with a comma for the decimal point"),
        ("load", [1, 2, np.inf, 4, 5, 6, 7, -np.inf], {}, "'load' .* is infinite in 2 rows, the first is row 3"),
        ("wear", [1, 2, np.inf, 4, 5, 6, 7, 8], {}, "the target 'wear' of the table is infinite in 1 rows"),
        ("wear", [2.5] * 8, {}, "the target 'wear' of the table is 2.5 in all 8 rows: there is nothing to learn"),
        ("wear", ["on"] * 8, {}, "the target 'wear' of the table has one class only, 'on' in all 8 rows"),
        ("wear", [True] * 8, {}, "one class only, 'True'"),
        ("wear", [None] * 8, {"drop_missing": True}, "lacks values in every row, the first in column 'wear'"),
        ("load", [datetime.datetime(2026, 1, 1)] * 8, {}, "the feature 'load' of the table holds dates"),
        ("load", [[1]] * 8, {}, "the feature 'load' .* holds values of type list"),
        ("load", [1 + 2j] * 8, {}, "the feature 'load' .* holds values of type complex"),
        ("hour", [None] * 8, {"order": "hour"}, "lacks values in 8 of 8 rows, the first in row 1, column 'hour'"),
    ],
)  # fmt: skip
def test_values_that_do_not_go_are_refused(column, values, more, text):
    given = {"task": "machine", "target": "wear", "features": NUMBERS}
    frame = FRAME.assign(**{column: pd.Series(values)})
    with pytest.raises(InputError, match=text) as caught:
        GroupSource.from_table(frame, **given, **more)
    assert "\n" not in str(caught.value)


TEXT = FRAME.to_csv(index=False)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("none.csv", None, "no file .*none.csv"),
        ("table.xlsx", b"PK", "ends in '.xlsx', expected .csv, .tsv or .parquet"),
        ("table.csv", b"", "is empty, expected a line of column names"),
        ("table.csv", b"\n\n", "is empty"),
        ("table.csv", b"machine,wear\n", "has no rows"),
        ("table.csv", TEXT.replace(",", ";").encode(), "has one column, 'machine;hour.*by ';': give separator=';'"),
        ("table.csv", TEXT.replace(",", "\t").encode(), "has one column, .*separated by tabs"),
        ("table.tsv", TEXT.encode(), "has one column, .*separated by ','"),
        ("table.csv", b"machine\na\nb\n", "has one column, 'machine', where columns are separated by ','"),
        ("table.csv", TEXT.replace("hour", "load").encode(), "has two columns 'load'"),
        ("table.csv", b"machine,wear\na,1\nb,2,3\n", "cannot be read as a table .*Expected 2 fields in line 3, saw 3"),
        ("table.csv", b"machine,wear\na,1,5\nb,2,3\n", "has rows with more values than the 2 names"),
        ("table.csv", b"machine,wear,x\n\xff\xfe,1,2\n", "cannot be read as a table .*UnicodeDecodeError"),
        ("table.parquet", TEXT.encode(), "cannot be read as a table"),
        ("table.parquet", b"", "cannot be read as a table"),
        ("table.csv", FRAME[["machine", "wear"]].to_csv().encode(), "has a column without a name, as an index has"),
        ("table.csv", b"machine,wear\na,1\nb,2\n", "no columns besides the task and the targets"),
    ],
)  # fmt: skip
def test_files_that_do_not_go_are_refused(name, content, text, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="parquet is read by pyarrow, of the extra tables")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=text) as caught:
        GroupSource.from_table(tmp_path / name, task="machine", target="wear")
    assert "\n" not in str(caught.value)


def test_a_folder_and_what_is_no_table_are_refused(tmp_path):
    for table, text in ((tmp_path, "is a folder, expected a table"), ([1, 2], "got a list")):
        with pytest.raises(InputError, match=text):
            GroupSource.from_table(table, task="machine", target="wear")


def test_pandas_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(InputError, match=r"pip install 'fomaml\[tables\]'"):
        GroupSource.from_table("machines.csv", task="machine", target="wear")
