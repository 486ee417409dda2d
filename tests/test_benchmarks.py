"""The benchmark harness on tiny workloads, without peers and mostly without processes."""

import json

import pytest
import torch

from benchmarks import by_hand, exactness, first_call, memory, race, report, worker
from benchmarks.contestants import contestants
from benchmarks.process import Worker
from benchmarks.workloads import TINY, WORKLOADS, build, find


class InProcess(worker.Session):
    """A worker without a process."""

    def __init__(self, threads, cache):
        super().__init__()

    def ask(self, limit, **request):
        return self.answer(json.loads(json.dumps(request)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def in_process(monkeypatch):
    """Workers without processes, small matrix products, no walk of the garbage collector after each run."""
    monkeypatch.setattr(race, "Worker", InProcess)
    monkeypatch.setattr(memory, "Worker", InProcess)
    monkeypatch.setattr(worker, "GEMM", 8)
    monkeypatch.setattr(worker, "_trim", lambda: None)


def options(*globs, **choices):
    return race.Options(threads=1, rounds=2, turn=0.0, globs=globs, **choices)


class TestError:
    def test_of_equal_gradients_is_zero(self):
        gradient = [torch.randn(3, 2), torch.randn(2)]
        assert exactness.error(gradient, gradient) == 0.0

    def test_is_that_of_the_worst_parameter(self):
        expected = [torch.ones(4), torch.ones(2, 2)]
        assert exactness.error([torch.ones(4), 1.5 * torch.ones(2, 2)], expected) == pytest.approx(0.5)

    def test_forgives_rounding_where_there_is_no_gradient(self):
        expected = [torch.ones(4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
        found = [expected[0], expected[1] + 1e-16]
        assert exactness.error(found, expected) < exactness.FLOAT64

    def test_sees_a_small_parameter_that_is_wrong(self):
        expected = [torch.ones(4), torch.full((2,), 1e-6)]
        assert exactness.error([expected[0], torch.zeros(2)], expected) > exactness.FLOAT64

    def test_refuses_other_shapes(self):
        with pytest.raises(ValueError, match="shapes"):
            exactness.error([torch.ones(3)], [torch.ones(2)])

    def test_of_nan_is_not_exact(self):
        assert not exactness.error([torch.full((2,), torch.nan)], [torch.ones(2)]) <= exactness.FLOAT64


class TestWorkloads:
    @pytest.mark.parametrize("name", TINY)
    def test_a_seed_gives_the_same_numbers_in_both_precisions(self, name):
        single, double = (build(find(name), dtype, 3) for dtype in (torch.float32, torch.float64))
        for a, b in zip(single.model.parameters(), double.model.parameters(), strict=True):
            assert torch.equal(a.double(), b)
        assert torch.equal(single.tasks.query.inputs.double(), double.tasks.query.inputs)

    @pytest.mark.parametrize("name", ["tiny-C", "tiny-D", "E"])
    def test_own_networks_compute_what_the_plain_ones_do(self, name):
        setup = build(find(name), torch.float64, 0)
        inputs = setup.tasks.support.inputs[0, :2]
        torch.testing.assert_close(setup.own_model()(inputs), setup.model(inputs))

    def test_are_those_of_the_tables(self):
        assert "".join(WORKLOADS) == "ABCDEFG"


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("make", [by_hand.loop, by_hand.vmapped])
def test_hand_written_peers_are_exact(name, make):
    setup = build(find(name), torch.float64, 0)
    run, read = make(setup)
    assert exactness.error(read(run()), exactness.reference(setup)) < 1e-10


def test_race_checks_times_and_reports(in_process):
    record = race.race("tiny-A", options("plain loop", "fomaml loop", "fomaml auto"), say=lambda _: None)
    rows = record["contestants"]
    assert set(rows) == {"plain loop", "fomaml loop", "fomaml auto"}
    for row in rows.values():
        assert row["error_float64"] <= exactness.FLOAT64
        assert len(row["rounds"]) == 2
        assert row["ratio"] > 0
    assert min(row["ratio"] for row in rows.values() if row["ours"]) == 1.0
    assert record["flops"] == flops_of_tiny_a()
    circumstances = dict.fromkeys(("cores", "machine", "threads", "torch", "commit", "date", "seed"), 0)
    results = json.loads(json.dumps({"workloads": {"tiny-A": record | {"run": circumstances}}}))
    assert "plain loop" in report.overview(results)
    assert "fomaml auto" in report.details(results)


def flops_of_tiny_a() -> int:
    """12-8-5, 3 tasks, 2 steps on 5 examples and one on 4: per example and weight one product forward, one by the
    weight, and one by the input of all layers but the first."""
    workload = TINY["tiny-A"]
    examples = workload.tasks * (workload.steps * workload.support + workload.query)
    return 2 * examples * (2 * 12 * 8 + 3 * 8 * 5)


def test_a_wrong_contestant_is_not_timed(in_process, monkeypatch):
    def wrong(setup):
        run, read = by_hand.loop(setup)
        return run, lambda result: [1.001 * gradient for gradient in read(result)]

    monkeypatch.setitem(contestants.__globals__["PEERS"], "wrong", race.Contestant(wrong))
    record = race.race("tiny-A", options("wrong"), say=lambda _: None)
    assert "not exact" in record["contestants"]["wrong"]["reason"]


def test_what_fails_is_recorded_with_its_reason():
    request = {"do": "check", "contestant": "plain loop", "workload": "tiny-A", "seed": 0, "file": "missing"}
    assert "missing" in worker.Session().answer(request)["reason"]


def test_memory_over_steps(in_process):
    record = memory.over_steps("tiny-A", options("plain loop"), say=lambda _: None)
    assert set(record["contestants"]["plain loop"]["memory"]) == {1, 20}


def test_a_process_answers_and_is_stopped_at_its_limit(tmp_path):
    with Worker(1, tmp_path) as process:
        request = {"contestant": "plain loop", "workload": "tiny-A", "seed": 0}
        assert process.ask(600, do="open", **request)["first_seconds"] > 0
        assert process.ask(0.0, do="time", runs=100_000)["reason"] == "stopped after 0 s"
        assert "reason" in process.ask(1, do="time", runs=1)


class TestPut:
    def test_replaces_what_stands_between_the_markers(self, tmp_path):
        document = tmp_path / "README.md"
        document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
        report.put("new", document)
        assert document.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"

    def test_refuses_a_document_without_a_place(self, tmp_path):
        document = tmp_path / "README.md"
        document.write_text("no place\n")
        with pytest.raises(ValueError, match="no place for the table"):
            report.put("new", document)


def test_a_first_call_is_measured_in_processes_of_its_own(tmp_path, monkeypatch):
    asked, page = [], tmp_path / "page.md"

    def process(name, source, cache, options):
        asked.append((name, source.parent.name, [*cache.iterdir()]))
        (cache / str(len(asked))).touch()
        return {"A": 4.0, "B": 2.0}[name] / len(asked[-1][2] or [1, 1])

    monkeypatch.setattr(first_call, "_in_a_process", process)
    monkeypatch.setattr(first_call, "RESULTS", tmp_path / "first_call.json")
    monkeypatch.setattr(first_call, "WORKLOADS", {name: WORKLOADS[name] for name in "AB"})
    first_call.main(["--rounds", "2", "--beside", str(tmp_path / "src")])
    # in turns, the second process with what the first has left and nobody else
    assert [(name, len(left)) for name, _, left in asked] == [
        *[("A", 0), ("A", 1), ("A", 0), ("A", 1), ("B", 0), ("B", 1), ("B", 0), ("B", 1)] * 2
    ]
    assert {source for _, source, _ in asked} == {first_call.ROOT.name, tmp_path.name}
    results = json.loads(first_call.RESULTS.read_text())
    assert results["seconds"]["A"]["beside"] == {"first": [2.0, 2.0], "second": [4.0, 4.0]}
    page.write_text("<!-- first call: begin -->\n<!-- first call: end -->\n")
    first_call.render(page)
    assert "| A | 2 | 4 | 2 | 4 |" in page.read_text()
    assert 0 < first_call.call(next(iter(TINY)), 1, 0) < 600


def test_processors_stand_side_by_side(in_process):
    options = race.Options(threads=1, rounds=2, turn=0.0, globs=("fomaml loop", "plain loop"))
    name = next(iter(TINY))
    found = race.race(name, options, say=lambda line: None)
    runs = [{"machine": machine, "commit": "c", "date": "d"} for machine in ("one", "other")]
    records = [{"workloads": {name: found | {"run": run}}} for run in runs]
    rows = report.processors(records).splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == ["one", "other"]
    assert all("loop" in row and "plain loop" in row for row in rows)
