"""The options of what learns: the algorithm and its network, the inner loop and the outer one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fomaml.app.parser import option
from fomaml.app.settings import (
    Adapted,
    InnerLoss,
    InnerOptimizer,
    LearnedRates,
    NormParameters,
    NormPolicy,
    Schedule,
)
from fomaml.choices import OnNonfinite

MODEL_WEIGHTS = (
    "the weights to begin with of a model of your own, or of timm or torchvision: a .safetensors file; for these two "
    "also random, or download, by the library itself"
)


@dataclass(frozen=True)
class AlgorithmOptions:
    """Algorithm and network."""

    model_options: tuple[str, ...] | None = option(
        "what a model of your own is called with, each key=value, a number, a word, a list, True, False or None",
        metavar="KEY=VALUE",
    )
    model_weights: str | None = option(MODEL_WEIGHTS, metavar="FILE")
    features_of: str | None = option(
        "a network that runs once over all inputs and does not learn: timm:NAME, torchvision:NAME, both without their "
        "head, or FILE.py:NAME; --model, by default linear, learns on what it gives",
        metavar="NETWORK",
    )
    features_weights: str | None = option(
        "the weights of --features-of: a .safetensors file; of timm and torchvision also download",
        metavar="FILE",
    )
    features_layer: str | None = option(
        "the layer of --features-of whose outputs are taken; --model then stands for those after it; default: its "
        "outputs",
        metavar="NAME",
    )
    features_in: Path | None = option(
        "a folder that keeps what --features-of gives, so that it runs once for all runs on these data",
        metavar="FOLDER",
    )
    head: str | None = option(
        "the layer that algorithms such as anil take for the head; default: the last nn.Linear"
    )
    output: str | None = option(
        "what of the outputs of a model of your own is judged: a name, such as logits, or a number; default: all"
    )
    channels: tuple[int, ...] | None = option(
        "the channels of the convolutions: one number for all (default: 64), or one for each of the four"
    )
    norm_policy: NormPolicy | None = option(
        "what a batch norm, of a model of your own too, normalises by: batch (default; transductive), support, "
        "running, per-step, or frozen at the statistics of --model-weights (default for timm and "
        "torchvision with such)"
    )
    norm_parameters: NormParameters | None = option(
        "what a batch norm learns: scale-shift (gamma and beta; default) or shift (beta alone, as in the original MAML "
        "code)"
    )
    adapt: Adapted | None = option(
        "what the inner loop moves: all that the algorithm adapts (default), or no-norm, all but the parameters of "
        "batch norms, which are then only meta-learned (as in the original MAML code)"
    )
    learn_rates: LearnedRates | None = option(
        "learn the inner step sizes too, starting at --inner-lr: none (default), per-step (one per tensor and inner "
        "step) or elementwise"
    )
    rates_lr: float | None = option("the meta_lr of learned step sizes; default: --meta-lr times --inner-lr")
    multi_step_iterations: int | None = option(
        "weigh the query losses of all inner steps, annealed to the last step over so many outer steps"
    )


@dataclass(frozen=True)
class InnerOptions:
    """Inner loop."""

    loss: str | None = option(
        "a loss of your own, FILE.py:NAME or package.module:NAME, a function (forward, examples) that returns a "
        "scalar; default: the cross-entropy, or the mean squared error"
    )
    inner_lr: float | None = option("the step size alpha")
    inner_steps: int | None = option("the number of inner steps in training")
    inner_loss: InnerLoss | None = option(
        "mean (default) over the support examples, or summed: divided by the shots only, as in the original MAML code, "
        "where the step size acts as N times alpha"
    )
    inner_optimizer: InnerOptimizer | None = option(
        "sgd (default), adam, or carried-adam, whose second moments outlive a task (as in Reptile's code)"
    )
    inner_momentum: float | None = option("the momentum of sgd, or beta1 of adam (default: 0)")
    inner_batch_size: int | None = option(
        "take each inner step on a mini-batch of the support set; default: on all of it"
    )
    test_inner_batch_size: int | None = option(
        "the same in validation and test; default: as --inner-batch-size"
    )


@dataclass(frozen=True)
class OuterOptions:
    """Outer loop."""

    meta_lr: float | None = option("the step size of Adam (of SGD for reptile)")
    meta_batch_size: int | None = option("the tasks of one outer step")
    seconds: float | None = option(
        "train for so many seconds instead of --iterations; such a run cannot be repeated bit for bit"
    )
    schedule: Schedule | None = option("the meta_lr over the training: constant, cosine or linear (to zero)")
    weight_decay: float | None = option("the weight decay, decoupled in Adam (default: 0)")
    clip: float | None = option(
        "the largest norm of the meta-gradient; a longer one is scaled down to it; default: no limit"
    )
    validate_every: int | None = option(
        "the outer steps between two validations, 0 for none; default: a tenth of the iterations where the source has "
        "validation classes. weights.safetensors then holds the best weights, last.safetensors the last"
    )
    validation_tasks: int | None = option(
        "the number of validation tasks, the same each time (default: 200; fewer in a run shorter than the source's "
        "default)"
    )
    patience: int | None = option("stop after so many validations without a better one; default: never")
    checkpoint_every: int | None = option(
        "the outer steps between two checkpoints, from which a killed run goes on (default: 500)"
    )
    checkpoint_seconds: float | None = option(
        "the seconds between two checkpoints, where these come first (default: 60)"
    )
    on_nonfinite: OnNonfinite | None = option(
        "what becomes of an outer step whose meta-loss or meta-gradient is not finite: stop (default), with the cause, "
        "or skip it; a hundred skipped in a row stop too"
    )
