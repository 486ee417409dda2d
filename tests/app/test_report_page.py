"""The page of a run: whole, of itself, and true to the run's files."""

import json
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from commands import refused, without
from few import few_baselines
from fomaml.app.cli import main
from fomaml.app.scores import metric_in
from fomaml.files import write_json
from html_pages import Page

pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib, of the extra plots")
pd = pytest.importorskip("pandas", reason="tables are read by pandas, of the extra tables")
HOSTILE = '<script>alert("1")</script>&amp;$x^2$'
QUICK = (
    "--iterations 4 --meta-batch-size 2 --test-tasks 6 --validation-tasks 4 --test-steps 0 2 --query-shots 3"
)
KINDS = {
    "pictures": f"folder:DATA/FOLDER --shots 1 --ways 2 --channels 4 --image-size 16 16 --rgb {QUICK} --no-baselines",
    "rows": "table:DATA/rows.csv --task machine --target wear --features load tool --categorical tool --shots 3 "
    f"{QUICK} --no-baselines",
    "states": f"table:DATA/rows.csv --task machine --target state --features load --shots 2 {QUICK} --no-baselines",
    "functions": "sinusoid --iterations 4 --meta-batch-size 2 --test-tasks 6 --test-steps 0 2",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    random = np.random.default_rng(0)
    for number in range(10):
        own = folder / "a <i>folder" / f"{number}<b>'\"&$a$"
        own.mkdir(parents=True)
        for image in range(5):
            pixels = random.integers(0, 255, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(own / f"{image}.png")
    rows = 150
    pd.DataFrame({
        "machine": np.repeat([f"m{number} {HOSTILE}" for number in range(10)], 15),
        "load": random.random(rows) * 9,
        "tool": np.array([f"mill {HOSTILE}", "lathe"])[random.integers(0, 2, rows)],
        "wear": 100 + 50 * random.random(rows),
        "state": np.array([f"good {HOSTILE}", "bad"])[np.arange(rows) % 2],
    }).to_csv(folder / "rows.csv", index=False)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Kind → the directory of its run, trained when it is first asked for."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("runs") / f"{kind} <u>&"
            places = {"DATA": str(data), "FOLDER": "a <i>folder"}
            words = [re.sub("DATA|FOLDER", lambda own: places[own[0]], word) for word in KINDS[kind].split()]
            with pytest.MonkeyPatch.context() as patch:
                few_baselines(patch)
                main(["train", *words, "--out", str(made[kind])])
        return made[kind]

    return of


@pytest.fixture(scope="module")
def page(run):
    """Kind → its page, read."""
    made = {}

    def of(kind):
        if kind not in made:
            main(["report", str(run(kind))])
            made[kind] = Page((run(kind) / "report" / "report.html").read_text())
        return made[kind]

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_whole_and_loads_nothing(kind, run, page):
    read, folder = page(kind), run(kind) / "report"
    names = {name for name, _ in read.tags}
    assert not names & {"script", "link", "iframe", "object", "b", "i", "u", "base", "form"}
    for name, own in read.tags:
        assert not [key for key in own if key.startswith("on")], name
        for key in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            to = own.get(key)
            if to is None or to.startswith("data:image/png;base64,"):
                continue
            if to.startswith("#"):
                assert to[1:] in read.ids
            else:  # the files of the plots, of which nothing is loaded
                assert name == "a" and (folder / to).exists()
    source = (folder / "report.html").read_text()
    assert "@import" not in source and not re.search(r"url\((?!#)", source)
    [policy] = [own["content"] for own in read.all("meta") if "http-equiv" in own]
    assert "default-src 'none'" in policy
    assert "prefers-color-scheme: dark" in source


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_have_texts_and_tables_headers(kind, page):
    read = page(kind)
    assert all(own.get("alt") for own in read.all("img"))
    assert all(own["role"] == "img" and own["aria-label"] for own in read.all("svg"))
    assert all(own["scope"] in ("col", "row") for own in read.all("th"))
    headings = [int(name[1]) for name, _ in read.tags if re.fullmatch("h[1-6]", name)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))


@pytest.mark.parametrize("kind", KINDS)
def test_the_figures_are_those_of_the_result(kind, run, page):
    result = json.loads((run(kind) / "result.json").read_text())
    metric, text = metric_in(result), page(kind).text
    for row in result["rows"]:
        assert row["label"] in text
        assert metric.text(row["mean"], row["interval"]) in text
    for row in result["differences"]:
        assert metric.text(row["mean"], row["interval"]) in text
    assert ("minus this" in text) == bool(result["differences"]) == (kind == "functions")


@pytest.mark.parametrize("kind", KINDS)
def test_each_plot_is_a_png_and_an_svg(kind, run, page):
    page(kind)
    folder = run(kind) / "report"
    names = {path.stem for path in folder.iterdir() if path.suffix != ".html"}
    own = {"pictures": {"confusion", "calibration"}, "states": {"confusion", "calibration"}}
    own |= {"rows": {"predicted-0"}, "functions": {"predicted-0", "task-0"}}
    assert {"steps", "training", "scores"} | own[kind] <= names
    for name in names:
        with Image.open(folder / f"{name}.png") as image:
            image.verify()
        assert (folder / f"{name}.svg").read_text().startswith("<?xml")


def test_names_are_told_as_they_are(page):
    assert any(f"of m{number} {HOSTILE}" in page("rows").text for number in range(10))
    assert f"good {HOSTILE}" in page("states").text
    assert f"mill {HOSTILE}" in page("rows").text
    assert "<b>'\"&$a$" in page("pictures").text
    assert "rows <u>&" in page("rows").text


def test_tasks_are_shown_as_what_they_are(page):
    pictures = page("pictures").all("img")
    # of each of three tasks two support and six query examples
    assert len(pictures) == 3 * (2 + 6)
    assert "wear, after 2 steps" in page("rows").text and "wear, before" in page("rows").text
    assert "A run that predicts numbers tells no confidence" in page("rows").text


def test_a_calibrated_run_says_what_its_confidence_is_worth(run, tmp_path):
    own = tmp_path / "run"
    shutil.copytree(run("pictures"), own)
    (own / "calibration.json").unlink()
    main(["report", str(own), "--out", str(tmp_path / "before"), "--shown", "0"])
    assert "not calibrated" in Page((tmp_path / "before" / "report.html").read_text()).text
    main(["calibrate", str(own), "--tasks", "4", "--shots", "1"])
    main(["report", str(own), "--out", str(tmp_path / "page"), "--shown", "0"])
    read = Page((tmp_path / "page" / "report.html").read_text())
    known = json.loads((own / "calibration.json").read_text())["calibrations"][0]["by_steps"]["2"]
    assert f"{known['temperature']:.3f}" in read.text and "with the temperature" in read.text
    assert not read.all("img")


def test_without_its_data_the_page_says_so(run, data, tmp_path, capsys):
    own = tmp_path / "run"
    shutil.copytree(run("rows"), own, ignore=shutil.ignore_patterns("report"))
    config = (own / "config.json").read_text().replace(str(data), str(tmp_path / "gone"))
    config = json.loads(config)
    del config["digest"]
    write_json(own / "config.json", config)
    capsys.readouterr()
    main(["report", str(own)])
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("test tasks are left out: ")
    read = Page((own / "report" / "report.html").read_text())
    assert said.err.strip()[1:] in read.text
    assert not (own / "report" / "scores.png").exists()
    # who asks for the tasks gets them, or an error
    assert "left out" not in refused(capsys, ["report", own, "--tasks", 3])


def test_a_run_without_result_is_shown_as_far_as_it_is(run, tmp_path, capsys):
    own = tmp_path / "run"
    own.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(run("functions") / name, own)
    with open(own / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 5, "meta_l')  # as it is being written
    main(["report", str(own)])
    read = Page((own / "report" / "report.html").read_text())
    assert "The run has no result yet: 4 lines of measurements so far" in read.text
    assert (own / "report" / "training.png").exists() and not (own / "report" / "steps.png").exists()


def test_the_run_is_only_read(run, tmp_path):
    files = {path: path.read_bytes() for path in sorted(run("states").iterdir()) if path.is_file()}
    main(["report", str(run("states")), "--out", str(tmp_path / "page")])
    assert {path: path.read_bytes() for path in sorted(run("states").iterdir()) if path.is_file()} == files


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metrics.jsonl", "{}\n", "metrics.jsonl is damaged: line 1"),
        ("metrics.jsonl", '{"iteration": 1, "meta_loss": "<b>"}\n', "metrics.jsonl is damaged: line 1"),
        ("metrics.jsonl", "[1]\n[2]\n", "metrics.jsonl is damaged: line 1"),
        ("result.json", "{}", "result.json is damaged"),
        ("result.json", "[]", "result.json is damaged"),
        ("result.json", '{"rows": [{"mean": "x"}]}', "result.json is damaged"),
        ("config.json", "{}", "is not the config of a run"),
        ("calibration.json", "{}", "calibration.json is damaged"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["report", "show"])
def test_damaged_files_are_one_line(command, name, text, words, run, tmp_path, capsys):
    own = tmp_path / "run"
    shutil.copytree(run("functions"), own)
    (own / name).write_text(text)
    assert words in refused(capsys, [command, own])


def test_what_cannot_be_done_is_one_line(run, tmp_path, capsys, monkeypatch):
    own = run("functions")
    assert "holds no run" in refused(capsys, ["report", tmp_path])
    assert "--tasks" in refused(capsys, ["report", own, "--tasks", 0])
    assert "shown" in refused(capsys, ["report", own, "--shown", -1])
    (tmp_path / "file").write_text("")
    refused(capsys, ["report", own, "--out", tmp_path / "file"])
    without(monkeypatch, "matplotlib")
    for arguments in (["report", own], ["show", own, "--png", tmp_path / "plots"]):
        assert "pip install 'fomaml[plots]'" in refused(capsys, arguments)
