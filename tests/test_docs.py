"""What the pages say holds: CONTRIBUTING.md's code runs in the files it names, links and options are there."""

import contextlib
import importlib
import io
import json
import re

import pytest
import torch

import family
from benchmarks import report
from fomaml import metrics
from fomaml.app import algorithms, cli, rundir, sources
from fomaml.app.session import train_run
from fomaml.app.settle import settle
from fomaml.engines import ENGINES, meta_gradient
from pages import PAGES, ROOT, blocks, read
from zoo import example

REGISTRIES = [
    algorithms.ALGORITHMS, family.ALGORITHMS, sources.SOURCES, metrics.METRICS, ENGINES, cli.COMMANDS,
]  # fmt: skip
QUICK = {"iterations": 2, "meta_batch_size": 2, "test_tasks": 5, "test_steps": (0, 1), "baselines": False}


@pytest.fixture
def contributed(monkeypatch):
    """Every block of CONTRIBUTING.md has run at the end of the file that its first line names; undone afterwards."""
    before = [dict(registry) for registry in REGISTRIES]
    for _, _, block, _ in blocks(read("CONTRIBUTING.md"), "python"):
        path = ROOT / block.splitlines()[0].removeprefix("# ")
        assert path.is_file()
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        module = importlib.import_module(name.removeprefix("src.").removeprefix("tests."))
        namespace = dict(vars(module))
        exec(compile(block, str(path), "exec", dont_inherit=True), namespace)
        for new in namespace.keys() - vars(module).keys():
            monkeypatch.setattr(module, new, namespace[new], raising=False)
    yield
    for registry, entries in zip(REGISTRIES, before):
        registry.clear()
        registry.update(entries)


def test_an_algorithm_is_added(contributed, tmp_path):
    settings = settle(source="sinusoid", algorithm="heavy-ball", **QUICK)
    assert train_run(settings, tmp_path / "run", say=lambda line: None)["name"] == "heavy-ball MAML"
    row = family.ALGORITHMS["heavy-ball"]
    model, tasks, criterion = example("mlp")
    for engine in ("loop", "batched"):
        result = meta_gradient(row.learner(model, criterion), tasks, engine=engine)
        family.assert_agrees(result, family.answer("heavy-ball", "mlp"))


def test_a_source_is_added(contributed, tmp_path):
    settings = settle(source="blobs", **QUICK)
    assert (settings.inner_lr, settings.inner_steps) == (0.1, 5)
    result = train_run(settings, tmp_path / "run", say=lambda line: None)
    assert result["protocol"]["data"] == "blobs" and result["metric"] == "accuracy"


def test_a_metric_is_added(contributed):
    metric = metrics.METRICS["top-3"]
    outputs = torch.tensor([[[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]])
    assert metric.score(outputs, torch.tensor([[2, 0]]), None).tolist() == [0.5]
    assert metric.text(0.5, 0.01) == "50.0 ± 1.0"


def test_an_engine_is_added(contributed):
    model, tasks, criterion = example("mlp")
    learner = family.ALGORITHMS["fomaml"].learner(model, criterion)
    result = meta_gradient(learner, tasks, engine="one-by-one", tasks_at_once=1)
    family.assert_agrees(result, family.answer("fomaml", "mlp"))
    assert result.engine == "one-by-one"


def test_a_command_is_added(contributed, tmp_path, capsys):
    settings = settle(source="sinusoid", **QUICK)
    train_run(settings, tmp_path / "run", say=lambda line: None)
    cli.main(["count", str(tmp_path / "run")])
    _, learner = rundir.load_run(tmp_path / "run")
    assert capsys.readouterr().out == f"{sum(p.numel() for p in learner.parameters())}\n"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_pages_hold_the_tables_of_the_benchmarks():
    results, *others = (
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("engines", "adaptation", "end_to_end")
    )
    summary = report.summary(results, *others)
    for page, table in (("README.md", summary), ("docs/benchmarks.md", report.page(results))):
        assert f"{report.BEGIN}\n{table}\n{report.END}" in (ROOT / page).read_text(encoding="utf-8")


def test_the_page_holds_the_kept_table_of_mnist():
    kept = (ROOT / "runs" / "mnist" / "mnist-5k.txt").read_text(encoding="utf-8").splitlines()
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("**", "")
    rows = [line for line in kept if re.search(r" ± .* ± ", line)]
    assert len(rows) == 9
    for line in rows:
        label, *figures = re.split(r"  +", line)
        cells = [label, *[""] * (4 - len(figures)), *figures]
        assert f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |") in page


@pytest.mark.parametrize("study", ["physics", "text", "signals"])
def test_the_page_holds_the_tables_of_the_studies(study):
    tables = (ROOT / "runs" / study / "result.txt").read_text(encoding="utf-8").strip()
    assert tables.count(" ± ") > 10
    assert tables in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, heading = link.partition("#")
        if path.startswith("https:"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_scripts_and_targets_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(
        r"\b(?:runs|benchmarks|examples|docs|tests|src)/[\w/.-]+\.(?:py|sh|md|txt|json)\b", text
    ):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE):
        assert target in targets, target


def test_options_that_are_named_exist():
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for command in cli.COMMANDS:
            with pytest.raises(SystemExit):
                cli.main([command, "--help"])
    known = set(re.findall(r"--[\w-]+", said.getvalue()))
    known |= {
        "--nproc-per-node",
        "--max-restarts",
        "--nnodes",
        "--rdzv-endpoint",
        "--rdzv-backend",
    }  # torchrun's
    for page in ("README.md", "docs/command-line.md", "docs/guide.md"):
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]+", line):
                assert option in known, line
