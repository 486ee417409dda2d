"""What an option that is not given takes: by source, by algorithm, and where neither has an opinion. No torch."""

from __future__ import annotations

# What an option that is not given takes, by source and question, then by number of shots (the
# nearest below counts). How the MNIST ones were found: docs/LOG.md.
RECIPES: dict[tuple[str, str], dict[int, dict]] = {
    ("mnist", "new-labels"): {
        1: {"inner_lr": 0.05, "inner_steps": 5, "meta_lr": 5e-3, "iterations": 1000},
        5: {"inner_lr": 0.05, "inner_steps": 5, "meta_lr": 5e-3, "iterations": 800},
    },
    ("mnist", "new-digits"): {
        1: {
            "inner_lr": 0.05,
            "inner_steps": 5,
            "meta_batch_size": 32,
            "iterations": 500,
            "schedule": "constant",
            "augment": "rotations",
        },
        5: {"inner_lr": 0.02, "inner_steps": 10, "iterations": 400, "augment": "warps"},
    },
    ("omniglot", ""): {
        1: {
            "model": "conv4-strided",
            "inner_lr": 0.4,
            "inner_steps": 3,
            "meta_lr": 2e-3,
            "query_shots": 5,
            "iterations": 2000,
            "augment": "rotations",
            "split": "maml",
        },
    },
    ("folder", ""): {
        1: {"model": "conv4", "inner_lr": 0.05, "inner_steps": 5, "iterations": 2000},
    },
    ("sinusoid", ""): {
        1: {"inner_lr": 0.01, "inner_steps": 1, "iterations": 15000, "meta_batch_size": 25},
    },
}
COMMON = {"meta_lr": 1e-3, "meta_batch_size": 16, "augment": "none", "schedule": "cosine"}

# What an option is that no recipe speaks of.
PLAIN = {
    "algorithm": "fomaml",
    "ways": 5,
    "resize": "lanczos",
    "jitter": 0.0,
    "test_augment": "none",
    "test_copies": 1,
    "statistics": "own",
    "channels": (64,),
    "norm_policy": "batch",
    "norm_parameters": "scale-shift",
    "adapt": "all",
    "inner_loss": "mean",
    "inner_optimizer": "sgd",
    "inner_momentum": 0.0,
    "learn_rates": "none",
    "weight_decay": 0.0,
    "validation_tasks": 200,
    "test_steps": (0, 1, 5, 10, 20),
    "autocast": "none",
}

# What an algorithm takes instead, by kind of task; `choices` are further arguments of its preset. Found on short
# runs (sinusoid: 800 to 4 000 iterations; MNIST, new-labels, 1 shot: 80 to 150). On sinusoids Reptile with inner_lr
# 0.02 and 10 or more steps gave nan. MAML at FOMAML's meta_lr of 5e-3 on MNIST: 57 % instead of 81 %. CAVIA stayed at
# chance on MNIST with every inner_lr from 1 to 30, first and second order, context at the pixels or at a hidden layer.
ALGORITHM_RECIPES: dict[tuple[str, str], dict] = {
    ("regression", "reptile"): {"inner_lr": 0.01, "inner_steps": 10, "meta_lr": 1.0},
    ("regression", "anil"): {"inner_lr": 0.01, "inner_steps": 5},
    ("regression", "boil"): {"inner_lr": 0.01, "inner_steps": 5},
    ("regression", "meta-sgd"): {"inner_lr": 0.01, "inner_steps": 5},
    ("regression", "maml++"): {"inner_lr": 0.01, "inner_steps": 5},
    ("regression", "imaml"): {
        "inner_lr": 0.005,
        "inner_steps": 16,
        "meta_lr": 3e-4,  # 1e-3: nan after 2500 to 3400 iterations
        "iterations": 10_000,  # more were not tried
        "choices": {"strength": 0.5, "cg_steps": 5, "damping": 100.0},  # without damping: nan after 1200
    },
    ("regression", "cavia"): {"inner_lr": 1.0, "inner_steps": 1},  # the paper's
    ("regression", "sign-maml"): {"inner_lr": 0.003, "inner_steps": 10},
    ("classification", "reptile"): {"meta_lr": 1.0},
    ("classification", "maml"): {"meta_lr": 1e-3},
    ("classification", "anil"): {"inner_lr": 0.2, "meta_lr": 1e-3},
    ("classification", "boil"): {"inner_lr": 0.1, "meta_lr": 1e-3},
    ("classification", "meta-sgd"): {"meta_lr": 1e-3},
    ("classification", "maml++"): {"meta_lr": 1e-3},
    ("classification", "imaml"): {
        "inner_steps": 10,
        "meta_lr": 1e-3,
        "choices": {"strength": 0.5, "cg_steps": 2},
    },
    ("classification", "cavia"): {"inner_lr": 1.0},
    ("classification", "sign-maml"): {"inner_lr": 0.002},
    ("classification", "proto-maml"): {"inner_lr": 0.01, "meta_lr": 1e-3},  # 0.05: down to chance
}
