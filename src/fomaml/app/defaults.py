"""The default values of options that neither a preset, nor the algorithm, nor the source has an opinion on."""

from __future__ import annotations

from typing import Any

DEFAULTS: dict[str, Any] = {
    "preset": None,
    "out": None,
    "data_root": None,
    "augment": "none",
    "jitter": 0.0,
    "ways": 5,
    "shots": 1,
    "query_shots": 10,
    "test_augment": "none",
    "test_copies": 1,
    "algorithm": "fomaml",
    "choices": None,
    "model": "mlp",
    "channels": (64,),
    "norm_policy": "batch",
    "norm_parameters": "scale-shift",
    "adapt": "all",
    "learn_rates": "none",
    "rates_lr": None,
    "multi_step_iterations": None,
    "inner_loss": "mean",
    "inner_optimizer": "sgd",
    "inner_momentum": 0.0,
    "inner_batch_size": None,
    "seconds": None,
    "meta_lr": 1e-3,
    "meta_batch_size": 16,
    "schedule": "cosine",
    "weight_decay": 0.0,
    "clip": None,
    "validate_every": None,
    "validation_tasks": None,  # sized to the run: sizing.py
    "patience": None,
    "checkpoint_every": 500,
    "checkpoint_seconds": 60.0,
    "on_nonfinite": "stop",
    "test_tasks": 1000,
    "test_steps": (0, 1, 5, 10, 20),
    "statistics": "own",
    "baselines": True,
    "baseline_size": "run",
    "engine": "auto",
    "tasks_at_once": None,
    "compile": False,
    "autocast": "none",
    "seed": 0,
    "device": "cpu",
}
# Options that follow another where they are not given.
FOLLOWING: dict[str, str] = {
    "train_ways": "ways",
    "train_shots": "shots",
    "test_query_shots": "query_shots",
    "test_jitter": "jitter",
    "test_inner_batch_size": "inner_batch_size",
}
