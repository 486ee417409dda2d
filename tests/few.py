"""Baselines of a second in the result of a run: all of them, tuned on few tasks, for few steps and few step sizes."""

from fomaml.app import sizing


def few_baselines(patch):
    least = lambda settings: sizing.Sizes(4, settings.test_tasks, 2, (1, 2), 2)  # noqa: E731
    patch.setattr(sizing, "least", least)
    patch.setattr(sizing, "full", least)
    patch.setattr(sizing, "BATCH", 8)
    patch.setattr(sizing, "INNER_LRS", (0.01, 0.1))
