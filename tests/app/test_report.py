"""What a result is said to show."""

import math

import pytest

from fomaml.app.report import verdict


def result(*differences, metric="accuracy"):
    rows = [
        {"to": f"baseline {i}", "mean": mean, "interval": own} for i, (mean, own) in enumerate(differences)
    ]
    return {"metric": metric, "name": "FOMAML", "steps": 5, "differences": rows}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            result((0.1, 0.02), (0.05, 0.01)),
            "beats every baseline; the best, baseline 1, by 5.0 ± 1.0 points",
        ),
        (
            result((0.1, 0.02), (0.01, 0.02)),
            "is not told apart from the baseline baseline 1: 1.0 ± 2.0 points",
        ),
        (result((-0.01, 0.02)), "is not told apart from the baseline baseline 0: -1.0 ± 2.0 points"),
        (result((0.0, 0.0)), "is not told apart from the baseline baseline 0: 0.0 ± 0.0 points"),
        (result((0.1, 0.02), (-0.05, 0.01)), "LOSES to the baseline baseline 1: -5.0 ± 1.0 points"),
        (result((-0.2, 0.3), (-0.05, 0.01)), "LOSES to the baseline baseline 1: -5.0 ± 1.0 points"),
        (
            result((0.1, 0.02), (0.2, 0.3)),
            "is not told apart from the baseline baseline 1: 20.0 ± 30.0 points",
        ),
        (result((math.nan, math.nan), (0.1, 0.02)), "is not told apart from the baseline baseline 0: nan"),
        (
            result((-0.5, 0.1), metric="loss"),
            "beats every baseline; the best, baseline 0, by a lower error of 0.5",
        ),
        (result((0.5, 0.1), metric="loss"), "LOSES to the baseline baseline 0: -0.5"),
    ],
)
def test_verdict(found, said):
    assert verdict(found).startswith(f"FOMAML after 5 steps {said}")


def test_no_baseline_no_verdict():
    assert verdict(result()) == ""
