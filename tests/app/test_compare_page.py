"""The page of a comparison: whole, of itself, and true to compare.json."""

import re
import shutil
from itertools import pairwise

import pytest
from PIL import Image

from commands import refused, without
from few import few_baselines
from fomaml.app import compare
from fomaml.app.algorithms import ALGORITHMS
from fomaml.app.cli import main
from fomaml.app.compare import introduced
from fomaml.app.compare_plots import verdict
from fomaml.app.scores import metric_in
from fomaml.files import write_json
from fomaml.metrics import METRICS
from fomaml.sealed import unsealed
from html_pages import Page

pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib, of the extra plots")
SHORT = "--iterations 6 --meta-batch-size 2 --test-tasks 6 --test-steps 0 1 3"
PICTURES = "--ways 2 --shots 1 --query-shots 2 --channels 4 --shares 0.4 0.3 0.3 --validate-every 2"
HOSTILE = '<script>alert("1")</script>'


@pytest.fixture(scope="module")
def folders(tmp_path_factory, images):
    """Name → the folder of a comparison: of functions, and of pictures in a folder of a hostile name."""
    root = tmp_path_factory.mktemp("compared")
    shutil.copytree(images / "even", root / "a <b>folder&")
    words = {
        "functions": ["sinusoid", "--algorithms", "maml", "reptile"],
        "pictures": [f"folder:{root}/a <b>folder&", "--algorithms", "anil", *PICTURES.split()],
    }
    with pytest.MonkeyPatch.context() as patch:  # no process per algorithm: torch takes seconds to import
        patch.setattr(compare, "isolated", lambda function, *own: function(*own, threads=1))
        few_baselines(patch)
        for name, own in words.items():
            main(["compare", *own, *SHORT.split(), "--out", str(root / name)])
    return {name: root / name for name in words}


@pytest.fixture(scope="module")
def pages(folders):
    for folder in folders.values():
        main(["report", str(folder)])
    return {name: Page((own / "report" / "report.html").read_text()) for name, own in folders.items()}


def saved(folder):
    return unsealed((folder / "compare.json").read_text())


def changed(folder, to, change):
    """A copy of a comparison whose compare.json is another."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("report"))
    facts = saved(folder)
    change(facts)
    write_json(to / "compare.json", facts)
    return to


KINDS = pytest.mark.parametrize("kind", ["functions", "pictures"])


@KINDS
def test_the_page_is_whole_and_loads_nothing(kind, folders, pages):
    read, folder = pages[kind], folders[kind] / "report"
    names = {name for name, _ in read.tags}
    assert not names & {"script", "link", "iframe", "object", "b", "base", "form"}
    for name, own in read.tags:
        assert not [key for key in own if key.startswith("on")], name
        for key in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            to = own.get(key)
            if to is not None and to.startswith("#"):
                assert to[1:] in read.ids
            elif to is not None:  # the files of the plots, of which nothing is loaded
                assert name == "a" and (folder / to).exists()
    source = (folder / "report.html").read_text()
    assert "@import" not in source and not re.search(r"url\((?!#)", source)
    assert "prefers-color-scheme: dark" in source and "default-src 'none'" in source
    assert all(own["role"] == "img" and own["aria-label"] for own in read.all("svg"))
    assert all(own["scope"] in ("col", "row") for own in read.all("th"))
    headings = [int(name[1]) for name, _ in read.tags if re.fullmatch("h[1-6]", name)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))


@KINDS
def test_the_figures_are_those_of_the_comparison(kind, folders, pages):
    result, told = saved(folders[kind]), pages[kind].text
    metric = metric_in(result)
    for row in result["rows"]:
        assert row["name"] in told
        for own in (row, *row["curve"].values()):
            assert metric.text(own["mean"], own["interval"]) in told
        if apart := row.get("difference"):
            assert metric.text(apart["mean"], apart["interval"]) in told
            assert (
                f"{row['name']} {metric.text(apart['mean'], apart['interval'])}, {verdict(apart, metric)}"
                in told
            )
    assert result["command"] in told and all(sentence in told for sentence in introduced(result))
    best = (max if metric.direction > 0 else min)(result["rows"], key=lambda row: row["mean"])
    equal = " and ".join(row["name"] for row in result["rows"] if row["mean"] == best["mean"])
    most = "highest accuracy" if metric.direction > 0 else "lowest mean squared error"
    assert (
        f"{equal} {'have' if ' and ' in equal else 'has'} the {most} of {len(result['rows'])} methods" in told
    )
    for point in result["cosines"]:
        assert f"{point['cosine']:.4f}" in told


@KINDS
def test_each_plot_is_a_png_and_an_svg(kind, folders, pages):
    folder = folders[kind] / "report"
    names = {path.stem for path in folder.iterdir() if path.suffix != ".html"}
    # nothing is measured in the training of functions, which have no validation
    assert names == {"differences", "steps", "cosines"} | ({"training"} if kind == "pictures" else set())
    assert ("Nothing is measured while the methods train" in pages[kind].text) == (kind == "functions")
    for name in names:
        with Image.open(folder / f"{name}.png") as image:
            image.verify()
        assert (folder / f"{name}.svg").read_text().startswith("<?xml")


def test_the_line_repeats_the_comparison(folders, tmp_path, monkeypatch):
    words = saved(folders["functions"])["command"].split()
    assert words[:3] == ["fomaml", "compare", "sinusoid"] and "--out" not in words
    monkeypatch.setattr(compare, "isolated", lambda function, *own: function(*own, threads=1))
    main([*words[1:], "--out", str(tmp_path / "again")])
    first, second = saved(folders["functions"]), saved(tmp_path / "again")
    for name in ("mean", "interval", "curve"):
        assert [row[name] for row in first["rows"]] == [row[name] for row in second["rows"]]
    assert second["command"] == first["command"] and second["cosines"] == first["cosines"]


@pytest.mark.parametrize(
    ("name", "mean", "interval", "expected"),
    [
        ("accuracy", 0.1, 0, "better"), ("accuracy", -0.1, 0.05, "worse"), ("accuracy", 0.1, 0.1, "not told apart"),
        ("mse", 0.1, 0.05, "worse"), ("mse", -0.1, 0.05, "better"), ("mse", 0.0, 0.0, "not told apart"),
    ],
)  # fmt: skip
def test_better_is_what_the_interval_leaves_no_doubt_of(name, mean, interval, expected):
    assert verdict({"mean": mean, "interval": interval}, METRICS[name]) == expected


def test_all_algorithms_fit_on_a_page(folders, tmp_path):
    """More of them than there are colours, dashes or marks."""

    def change(facts):
        for algorithm, entry in ALGORITHMS.items():
            facts["rows"].append(
                {**facts["rows"][1], "algorithm": algorithm, "name": f"another {entry.title}"}
            )

    own = changed(folders["pictures"], tmp_path / "own", change)
    main(["report", str(own)])
    read = Page((own / "report" / "report.html").read_text())
    for entry in ALGORITHMS.values():
        assert read.text.count(f"another {entry.title}") >= 5


def test_what_failed_or_diverged_says_so(folders, tmp_path):
    def change(facts):
        facts["rows"][1] = {"algorithm": "maml", "name": "MAML", "failed": f"the loss is {HOSTILE}"}
        facts["rows"][2] |= {"mean": None, "interval": None, "difference": {"mean": None, "interval": None}}
        facts["rows"][2]["curve"]["3"] = {"mean": None, "interval": None}

    own = changed(folders["functions"], tmp_path / "own", change)
    main(["report", str(own)])
    read = Page((own / "report" / "report.html").read_text())
    assert f"MAML failed: the loss is {HOSTILE}" in read.text and read.text.count("diverges") >= 3
    assert not (own / "report" / "differences.png").exists()
    (tmp_path / "none").mkdir()
    facts = saved(own)
    facts["rows"] = [{**facts["rows"][1], "algorithm": row["algorithm"]} for row in facts["rows"]]
    write_json(tmp_path / "none" / "compare.json", facts | {"cosines": []})
    main(["report", str(tmp_path / "none")])
    read = Page((tmp_path / "none" / "report" / "report.html").read_text())
    assert "No method was trained to its end" in read.text and not read.all("svg")


def test_without_the_runs_the_page_is_made_all_the_same(folders, tmp_path):
    (tmp_path / "own").mkdir()
    facts = saved(folders["pictures"])
    del facts["command"]  # as of an earlier version
    write_json(tmp_path / "own" / "compare.json", facts)
    before = (tmp_path / "own" / "compare.json").read_bytes()
    main(["report", str(tmp_path / "own"), "--out", str(tmp_path / "page")])
    read = Page((tmp_path / "page" / "report.html").read_text())
    assert "The run directories of FOMAML, ANIL are not there" in read.text
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["compare.json"]
    assert (tmp_path / "own" / "compare.json").read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": []}', '{"rows": [1], "protocol": 3}', "\udcff"])
def test_a_damaged_comparison_is_one_line(text, tmp_path, capsys):
    (tmp_path / "compare.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "compare.json is damaged" in refused(capsys, ["report", tmp_path])


def test_what_cannot_be_done_is_one_line(folders, tmp_path, capsys, monkeypatch):
    own = folders["functions"]
    for arguments in (["--tasks", 3], ["--weights", "last"], ["--device", "cpu"]):
        said = refused(capsys, ["report", own, *arguments])
        assert f"holds a comparison, whose page takes no {arguments[0]}" in said
    own = changed(
        own, tmp_path / "own", lambda facts: facts["rows"][1]["curve"].update({"3": {"mean": "<b>"}})
    )
    assert "compare.json is damaged" in refused(capsys, ["report", own])
    without(monkeypatch, "matplotlib")
    assert "pip install 'fomaml[plots]'" in refused(capsys, ["report", folders["functions"]])
