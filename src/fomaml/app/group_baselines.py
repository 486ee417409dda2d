"""What a run on groups of rows is compared with, beside its network from a random start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fomaml.app.settings import Settings
from fomaml.baselines import of_estimator
from fomaml.data.groups import GroupSource
from fomaml.evaluate import evaluate
from fomaml.learning.algorithms import FOMAML
from fomaml.metrics import METRICS, Metric

# A label, the (tasks,) scores by metric, and facts.
Baseline = tuple[str, dict[str, Tensor], dict]


def pooled(
    settings: Settings,
    model: nn.Module,
    test: Any,
    metrics: list[Metric],
    judged_by: dict[str, Any],
    tuned: Callable[[nn.Module], tuple[dict[str, Tensor], dict]],
    few: str,
) -> Iterator[Baseline]:
    """The network that was trained on all training tasks as if they were one, as it is and fine-tuned.

    test: the episodes. few: what labels say of how many tasks there are. Where classes are numbered anew in each task,
    what it says of them before it adapts means nothing, and is left out.
    """
    if settings.fixed_classes is not False:
        learner = FOMAML(model, 0.01, 1, **judged_by)  # at 0 steps, where the step size is no matter
        found: Any = evaluate(learner, test, tasks=settings.test_tasks, at_steps=[0], metric=list(metrics))
        yield "pooled training tasks, not adapted", {name: own[0] for name, own in found.items()}, {}
    scores, facts = tuned(model)
    yield f"pooled training tasks, fine-tuned{few}", scores, facts


def without_network(
    settings: Settings, train: GroupSource, test: Any, metrics: list[Metric], say: Callable[[str], None]
) -> Iterator[Baseline]:
    """What one would take without a network, by scikit-learn, fitted anew on each support set."""
    metrics = [metric for metric in metrics if metric.name in METRICS and metric.name != "loss"]
    if not metrics:
        return
    try:
        from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
        from sklearn.linear_model import Ridge
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError:
        say("baseline: none without a network: pip install 'fomaml[metrics]'")
        return
    shapes = train.input_shapes
    rows = isinstance(shapes, dict) or len(shapes) == 1  # of a table, not images or series
    regression = settings.kind == "regression"

    def scored(make: Callable[[], Any], tasks: int, beside: GroupSource | None = None) -> dict[str, Tensor]:
        return {
            metric.name: of_estimator(make, test, tasks=tasks, metric=metric, pooled=beside)
            for metric in metrics
        }

    if regression:
        yield "ridge on the support set", scored(lambda: Ridge(alpha=1.0), settings.test_tasks), {}
    else:
        nearest = scored(lambda: KNeighborsClassifier(1), settings.test_tasks)
        yield "nearest neighbour in the support set", nearest, {}
    if rows and settings.fixed_classes is not False:
        forest = RandomForestRegressor if regression else RandomForestClassifier
        once = min(len(test), settings.test_tasks)  # each group once: a forest takes its time
        found = scored(lambda: forest(random_state=settings.seed), once, train)
        yield f"random forest on pooled rows and the support set, on {once} tasks", found, {}
