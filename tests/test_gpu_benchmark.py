"""`python -m benchmarks.gpu`, the one command for a machine with a GPU, tried on the CPU."""

import json
import sys

import pytest
import torch

from benchmarks import gpu, gpu_checks, report

CPU = torch.device("cpu")


def test_a_check_that_fails_is_recorded_and_the_others_go_on(monkeypatch):
    def broken(device):
        raise AssertionError("off by 3\nand more")

    monkeypatch.setattr(gpu_checks, "CHECKS", {"a": broken, "b": lambda device: f"on {device}"})
    assert gpu_checks.checked(CPU) == {
        "a": {"passed": False, "saw": "AssertionError: off by 3"},
        "b": {"passed": True, "saw": "on cpu"},
    }


@pytest.mark.parametrize(
    ("difference", "passes"), [(0.0, True), (0.1, True), (0.2, False), (float("nan"), False)]
)
def test_what_is_near(difference, passes):
    if passes:
        assert gpu_checks.near(difference, 0.1, "it").startswith("it differs by")
        return
    with pytest.raises(AssertionError, match="it differs by"):
        gpu_checks.near(difference, 0.1, "it")


def test_labels_and_half_precision_that_were_taken_would_fail(monkeypatch):
    monkeypatch.setattr(gpu_checks, "gradients_of", lambda *given, **told: [])
    for name in ("labels beyond the outputs", "half precision"):
        with pytest.raises(AssertionError, match="taken"):
            gpu_checks.CHECKS[name](CPU)


@pytest.mark.long  # the checks and a race: some seconds
def test_the_command_from_end_to_end(tmp_path, monkeypatch, capsys):
    out = tmp_path / "gpu.json"
    told = "gpu tiny-F tiny-D --device cpu --tiny --rounds 2 --turn 0"
    few = ["--contestants", "fomaml loop", "fomaml batched", "plain loop", "learn2learn"]
    monkeypatch.delitem(gpu_checks.CHECKS, "compiled and replayed")  # a compiler's minute on a CPU
    monkeypatch.setattr(sys, "argv", [*told.split(), *few, "--out", str(out)])
    gpu.main()
    found = json.loads(out.read_text())
    assert {name: own["saw"] for name, own in found["checks"].items() if not own["passed"]} == {}
    assert set(found["rule"]) == {"PEAK", "LAUNCH", "SHARE_OF_PRODUCTS", "SHARE_OF_CONVOLUTIONS", "FACTORED"}
    assert found["rule"]["LAUNCH"]["measured"] > 0
    rows = found["workloads"]["tiny-D"]["contestants"]
    assert rows["fomaml loop"]["ours"] and rows["plain loop"]["ratio"] > 0 and "reason" in rows["learn2learn"]
    text = capsys.readouterr().out
    assert "### tiny-F on a GPU" in text and "| stacked attention | passed |" in text
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- gpu: begin -->\nold\n<!-- gpu: end -->\nafter\n")
    report.put(gpu.page(found), page, "gpu")
    assert (
        "old" not in page.read_text()
        and page.read_text().startswith("before")
        and "tiny-F" in page.read_text()
    )
