"""`fomaml data`: what a source holds, what would be left out, and a line that trains with settings that fit."""

import json
import shlex

import numpy as np
import pytest

from commands import refused, without
from fomaml.app.build import open_data
from fomaml.app.cli import main
from fomaml.app.commands import TrainOptions, given
from fomaml.app.parser import parse
from fomaml.app.settle import settle

pd = pytest.importorskip("pandas", reason="tables are read by pandas, of the extra tables")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Machines of 3 to 30 rows in a table, recordings of six subjects, and a folder of images."""
    image = pytest.importorskip("PIL.Image", reason="images are read by Pillow, of the extra images")
    folder = tmp_path_factory.mktemp("show")
    random = np.random.default_rng(0)
    sizes = [3, *random.integers(12, 31, 19)]
    machine = np.repeat([f"m{number}" for number in range(20)], sizes)
    frame = pd.DataFrame({
        "machine": machine,
        "hour": random.permutation(len(machine)),
        "load": random.random(len(machine)).round(3),
        "tool": np.array(["mill", "lathe"])[random.integers(0, 2, len(machine))],
        "wear": random.random(len(machine)).round(3),
        "state": np.array(["good", "bad"])[np.arange(len(machine)) % 2],
    })  # fmt: skip
    frame.to_csv(folder / "machines.csv", index=False)
    frame.assign(load=frame.load.where(frame.index != 4)).to_csv(folder / "missing.csv", index=False)
    # the first fifteen machines have two of three tools each, the others three
    which = np.unique(machine, return_inverse=True)[1]
    row = np.arange(len(machine))
    tool = np.array(["mill", "lathe", "drill"])[np.where(which < 15, (which + row % 2) % 3, row % 3)]
    frame.assign(tool=tool).to_csv(folder / "lacking.csv", index=False)
    np.savez(
        folder / "motion.npz",
        samples=random.normal(size=(900, 2)).astype(np.float32),
        lengths=np.full(18, 50),
        subject=np.arange(18) // 3,
        motion=np.arange(18) % 3,
        names=np.array(["up", "down"]),
        objects=np.array([None, 1]),
    )
    for number in range(6):
        (folder / "photos" / f"kind{number}").mkdir(parents=True)
        for shot in range(4 + number):
            pixels = random.integers(0, 256, (10, 12, 3)).astype(np.uint8)
            image.fromarray(pixels).save(folder / "photos" / f"kind{number}" / f"{shot}.png")
    return folder


TABLE = "table:DATA/machines.csv --task machine --target wear --order hour --categorical tool state"
CLASSES = "table:DATA/lacking.csv --task machine --target tool --features load --shots 2 --query-shots 2"
LABELS = "table:DATA/machines.csv --task machine --target state --features load"
CUT = "--lengths lengths --window 10 --hop 5"
WINDOWS = f"windows:DATA/motion.npz --task subject --inputs samples --target motion {CUT}"
PHOTOS = "folder:DATA/photos"


def shown(data, text, capsys, *more):
    main(["data", *text.replace("DATA", str(data)).split(), *more])
    return capsys.readouterr().out


def facts_of(data, text, capsys, *more):
    return json.loads(shown(data, text, capsys, "--json", *more))


def test_a_table_is_counted_as_pandas_counts_it(data, capsys):
    frame = pd.read_csv(data / "machines.csv")
    facts = facts_of(data, TABLE, capsys)
    sizes = frame.groupby("machine").size().to_dict()
    assert {unit["name"]: unit["examples"] for unit in facts["units"]} == sizes
    assert sum(part["number"] for part in facts["parts"]) == 20
    for part in facts["parts"]:
        own = [sizes[unit["name"]] for unit in facts["units"] if unit["part"] == part["part"]]
        assert (part["number"], part["examples"]) == (len(own), sum(own))
        assert (part["smallest"][1], part["largest"][1]) == (min(own), max(own))
    needed = 5 + 10  # shots and query shots of tables
    small = {f"{name} ({size})" for name, size in sizes.items() if size < needed}
    assert set(facts["left_out"]["tasks"]) == small and facts["left_out"]["needed"] == needed
    assert f"of 15 together: {sum(size >= 15 for size in sizes.values())} of 20 tasks" in " ".join(
        facts["fits"]
    )
    for example in facts["examples"]:
        row = frame[(frame.machine == example["task"]) & (frame.hour == example["inputs"]["hour"])].iloc[0]
        assert example["inputs"] == pytest.approx(
            {"hour": row.hour, "load": row.load, "tool": row.tool, "state": row.state}
        )
        assert example["target"] == [pytest.approx(row.wear)]


def test_classes_are_counted_in_each_task(data, capsys):
    frame = pd.read_csv(data / "machines.csv")
    facts = facts_of(data, LABELS, capsys, "--shots", "2", "--query-shots", "3")
    table = frame.groupby(["machine", "state"]).size()
    for unit in facts["units"]:
        assert unit["classes"] == table[unit["name"]].to_dict()
    room = table.unstack().min(axis=1)
    assert {text.split(" ")[0] for text in facts["left_out"]["tasks"]} == set(room[room < 5].index)
    text = shown(data, LABELS, capsys)
    assert "per class" in text and "state" in text and "(bad " in text


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        (TABLE, {"skip_small_groups": True}),
        (TABLE + " --shots 1 --query-shots 2", {"shots": 1, "query_shots": 2}),
        (LABELS, {"skip_small_groups": True}),
        (CLASSES, {"skip_small_groups": True, "fewer_classes": True, "shots": 2, "query_shots": 2}),
        (CLASSES + " --ways 3", {"ways": 2, "shots": 2, "query_shots": 2}),
        (WINDOWS, {}),
        (WINDOWS + " --shots 3 --query-shots 20", {}),
        (PHOTOS, {"ways": 1}),
        (PHOTOS + " --shares 0.5 0 0.5", {"ways": 3, "query_shots": 3, "shots": 1}),
        ("sinusoid", {"shots": 10}),
    ],
)
def test_the_line_at_the_end_trains(text, fits, data, capsys):
    facts = facts_of(data, text, capsys)
    said = shown(data, text, capsys)
    if fits.get("ways") == 1:  # of six classes one is for the test
        assert facts["command"] is None and "--ways of at most 1" in said
        return
    assert said.rstrip().endswith(facts["command"])
    program, command, *words = shlex.split(facts["command"])
    assert (program, command) == ("fomaml", "train")
    settings = settle(**given(parse(TrainOptions, words)))
    found = open_data(settings)
    for episodes in (found.train, found.test):
        assert len(episodes.batch(0, 2)) == 2
    assert {name: getattr(settings, name) for name in fits} == fits


@pytest.mark.parametrize(
    "text", ["table:DATA/missing.csv", "windows:DATA/motion.npz", "arrays:DATA/motion.npz"]
)
def test_columns_where_it_is_not_said_which_is_what(text, data, capsys):
    facts = facts_of(data, text, capsys)
    found = {column["name"]: column for column in facts["columns"]}
    if text.startswith("table"):
        frame = pd.read_csv(data / "missing.csv")
        assert list(found) == list(frame.columns)
        for name in frame:
            assert (found[name]["different"], found[name]["missing"]) == (
                frame[name].nunique(), frame[name].isna().sum(),
            )  # fmt: skip
    else:
        assert found["samples"]["shape"] == [900, 2] and found["names"]["examples"] == ["down", "up"]
        assert "never unpickled" in found["objects"]["kind"]
    said = shown(data, text, capsys)
    assert all(name in said for name in found)
    assert (
        said.rstrip()
        .splitlines()[-1]
        .startswith(f"fomaml data {text.replace('DATA', str(data))} --task TASK")
    )


def test_the_line_that_asks_which_column_is_what_reads_the_file_as_it_was_read(data, capsys):
    pd.read_csv(data / "machines.csv").to_csv(data / "comma.csv", sep=";", decimal=",", index=False)
    said = shown(data, "table:DATA/comma.csv --separator ; --decimal ,", capsys)
    assert "load     float64" in said
    line = said.rstrip().splitlines()[-1]
    assert line.startswith(f"fomaml data table:{data}/comma.csv --separator ';' --decimal , --task TASK")


def test_a_sheet_of_images(data, tmp_path, capsys):
    from PIL import Image

    out = tmp_path / "out"
    said = shown(data, PHOTOS, capsys, "--shares", "0.5", "0", "0.5", "--rgb", "--out", str(out))
    assert sorted(path.name for path in out.iterdir()) == ["data.json", "data.txt", "images.png"]
    assert (out / "data.txt").read_text().rstrip() == said.rstrip() and str(out / "images.png") in said
    facts = json.loads((out / "data.json").read_text())
    sheet = np.asarray(Image.open(out / "images.png").convert("RGB"), dtype=float)
    training = [unit for unit in facts["units"] if unit["part"] == "training"]
    assert len(sheet) == 64 * len(training)
    settings = settle(
        source=f"folder:{data / 'photos'}", shares=(0.5, 0.0, 0.5), rgb=True, ways=3, query_shots=3
    )
    source = open_data(settings).own_classes
    for row, unit in enumerate(training):
        own = source.inputs[source.labels() == source.names.index(unit["name"])]
        for column in range(8):
            cell = sheet[64 * row : 64 * row + 62, 140 + 64 * column : 140 + 64 * column + 62]
            if column < len(own):  # as resized, so that the means are alike
                expected = own[column].double().mean((1, 2)).numpy()
                np.testing.assert_allclose(cell.mean((0, 1)), expected, atol=12)
            else:
                assert (cell == 255).all()


@pytest.mark.parametrize("text", [WINDOWS, "sinusoid"])
def test_a_plot_of_series(text, data, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as lacking:
        without(lacking, "matplotlib")
        said = shown(data, text, capsys, "--out", str(tmp_path / "none"))
    assert "no picture: a plot needs matplotlib, pip install 'fomaml[plots]'" in said
    assert sorted(path.name for path in (tmp_path / "none").iterdir()) == ["data.json", "data.txt"]
    pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib, of the extra plots")
    said = shown(data, text, capsys, "--out", str(tmp_path / "some"))
    assert str(tmp_path / "some" / "series.png") in said
    assert (tmp_path / "some" / "series.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "name a source of tasks"),
        ("nothing", "unknown source 'nothing'"),
        ("table:DATA/none.csv", "no file DATA/none.csv"),
        ("table:DATA/machines.csv --task machine --target wera", "no column 'wera'"),
        ("table:DATA/machines.csv --task machine", "the source table needs --target"),
        ("table:DATA/missing.csv --task machine --target wear --features load", "lacks"),
        ("windows:DATA/motion.npz --task subject --target motion", "the source windows needs --inputs"),
        ("folder:DATA/none", "DATA/none"),
        ("sinusoid --ways 3.5", "--ways"),
    ],
)
def test_bad_input_is_one_line(text, message, data, tmp_path, capsys):
    out = tmp_path / "out"
    told = refused(capsys, ["data", *text.replace("DATA", str(data)).split(), "--out", str(out)])
    assert message.replace("DATA", str(data)) in told and not out.exists()


def test_files_that_are_there_are_kept(data, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    shown(data, "sinusoid", capsys, *out)
    assert "already holds data.json; give another --out" in refused(capsys, ["data", "sinusoid", *out])


def test_a_task_of_many_classes_is_one_short_line(tmp_path, capsys):
    rows = [f"t{task},{row},c{row % 40 if task else row % 5}" for task in range(8) for row in range(60)]
    (tmp_path / "own.csv").write_text("\n".join(["task,x,y", *rows]) + "\n")
    main(["data", f"table:{tmp_path}/own.csv", "--task", "task", "--target", "y", "--features", "x"])
    said = capsys.readouterr().out
    assert " t1: 60 (40 of 40 classes, of 1 to 2)\n" in said
    assert " t0: 60 (5 of 40 classes, of 12 to 12)\n" in said
