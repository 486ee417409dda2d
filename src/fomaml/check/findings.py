"""What a check may find, in words: a finding, the report, and the cures."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

LOOP, INPLACE = "engine='loop'", "compute a new tensor in forward, and use that"
READ = "read parameters in forward, as self.weight, not from a cache or an object of your own; keep no state on self"
SDPA = "with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH): around it, or first order"
FIRST = "first order"
CUDNN = "with torch.backends.cudnn.flags(enabled=False): around it, or first order"
DOUBLE = "first order; torch.autograd.gradgradcheck finds the layer whose double backward is wrong"
AGAIN = "its forward runs again in the backward pass, outside of vmap"
# part of torch's message: (the reason in plain words, the cure)
REASONS = {
    "data-dependent": ("its forward branches on the values of a tensor", f"{LOOP}, or torch.where"),
    ".item()": ("its forward takes a number out of a tensor", f"{LOOP}, or keep it a tensor"),
    "scaled_dot_product": ("the fused attention kernel has no double backward", SDPA),
    "rnn_backward": ("the fused recurrent kernel has no double backward", CUDNN),
    "Batching rule not": ("vmap has no rule for one of its operations; recurrent layers have none", LOOP),
    "setup_context": ("vmap does not take its autograd.Function", f"{LOOP}, or write setup_context"),
    "may have escaped": (AGAIN, LOOP),
    "maybe_level.has_value": (AGAIN, LOOP),
    "_NoopSaveInputs": (AGAIN, LOOP),  # torch 2.6 and 2.7
    "inplace arithmetic": (
        "its forward writes in place into what all tasks share",
        f"{LOOP}, or torch.stack",
    ),
    "modified by an inplace": ("its forward changes in place what the backward needs", INPLACE),
}
# kind: (level, what, cure), for findings that end in a list of names
KINDS = {
    "frozen": ("note", "frozen, neither adapted nor meta-learned", "requires_grad_(True), if they should learn"),
    "tied": ("note", "tied, adapted and meta-learned as one tensor", ""),
    "leaking": ("wrong",
        "batch norms with running statistics that meta-training never updates (in train mode they use the batch's, "
        "so query examples inform each other; in eval mode, statistics that were never learned)",
        "fomaml.convert_batch_norm(model, policy=...) with 'batch', 'support', 'running', 'per-step' or 'frozen'; "
        "then learner.adapt(support, statistics='support') serves single examples"),
    "eval": ("note", "in eval mode, running statistics are used as they are, by", ""),
    "unmoved": ("wrong", "in eval mode, normalise by running statistics as they were made, which nothing has moved",
        "fomaml.convert_batch_norm(model), or model.train()"),
    "batch": ("note", "statistics of the batch, so query examples inform each other, in",
        "fomaml.convert_batch_norm(model, 'support') or learner.adapt(support, statistics='support'), if unwanted"),
    "recurrent": ("note", "on CUDA, cuDNN has no double backward for", CUDNN),
    "moved": ("wrong", "forward changes parameters in place, and so the meta-model in every task", INPLACE),
    "buffers": ("note", "buffers that forward changes; each task starts from the meta-model's, which stay", ""),
    "dropout": ("note", "dropout is active in training, a mask of its own in each task and step (compared without it), "
        "and off in evaluate and adapt", "model.eval() for a module that adapt has returned, before it predicts"),
    "stale": ("wrong", "computed from parameters before forward, so adapted ones do not reach it", READ),
    "bypassed": ("wrong", "used, but no gradient reaches, so never learned",
        "no .data, .detach(), rounding or torch.no_grad on the way; or requires_grad_(False), if meant so"),
    "cached": ("wrong", "never read, but the module holds a copy, which never learns", READ),
    "unused": ("note", "unused, no output depends on", "delete them, or freeze them"),
    "strange": ("wrong", "learnable tensors that are no parameters of the module, so never learned, of shape",
        "nn.Parameter; nn.ModuleList or nn.ParameterList in place of a list"),
}  # fmt: skip


class Finding(NamedTuple):
    """level: "ok", "note", "wrong" (it would be silent) or "refused" (an error says so). cure: may be empty."""

    level: str
    what: str
    cure: str = ""


@dataclass(frozen=True)
class Report:
    """What `check` found about its subject; exit_status is 1 if something would be silently wrong, else 0."""

    subject: str
    findings: list[Finding]

    @property
    def exit_status(self) -> int:
        return int(any(finding.level == "wrong" for finding in self.findings))

    def facts(self) -> dict:
        """The same as JSON-able facts."""
        findings = [finding._asdict() for finding in self.findings]
        return {"subject": self.subject, "findings": findings, "exit_status": self.exit_status}

    def text(self) -> str:
        """A heading, a marked line per finding with the cure beneath it, the conclusion."""
        lines = [self.subject, ""]
        for level, what, cure in self.findings:
            lines += _wrap(what, f"{'WRONG' if level == 'wrong' else level:9}")
            lines += _wrap(cure, f"{'':9}→ ") if cure else []
        levels = [finding.level for finding in self.findings]
        last = f"Nothing would be silently wrong ({plural(levels.count('note'), 'note')}, "
        last += f"{levels.count('refused')} refused)."
        if self.exit_status:
            last = f"{plural(levels.count('wrong'), 'thing')} would be silently wrong: see WRONG above."
        return "\n".join([*lines, "", last])


def of_kinds(found: Mapping[str, list[str]]) -> Iterator[Finding]:
    for kind, names in found.items():
        if names:
            level, what, cure = KINDS[kind]
            yield Finding(level, f"{what}: {listed(names)}", cure)


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _wrap(text: str, lead: str) -> list[str]:
    indent = " " * len(lead)
    return textwrap.wrap(text, 110, initial_indent=lead, subsequent_indent=indent, break_on_hyphens=False)
