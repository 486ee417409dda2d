"""`python -m benchmarks.plain JOB DATA IMAGES SEED` meta-trains and tests by FOMAML as one writes it by hand.

The peer of `benchmarks.end_to_end`: `copy.deepcopy`, `torch.optim.SGD` inside, `torch.optim.Adam` outside.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.end_to_end import JOBS, Job
from benchmarks.workloads import conv4_strided, mlp

# classes, a tensor (examples, ...) each
Classes = list[Tensor]


def read_mnist(data: Path) -> tuple[Classes, Classes]:
    def array(name: str) -> np.ndarray:
        path = data / "MNIST" / "raw" / name
        content = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
        return np.frombuffer(content, np.uint8, offset=16 if "images" in name else 8)

    def part(name: str) -> Classes:
        images = torch.from_numpy(array(f"{name}-images-idx3-ubyte").reshape(-1, 784)).float() / 127.5 - 1
        labels = torch.from_numpy(array(f"{name}-labels-idx1-ubyte").copy())
        return [images[labels == label] for label in range(10)]

    return part("train"), part("t10k")


def read_omniglot(data: Path) -> tuple[Classes, Classes]:
    """Every drawing 28 x 28, kept in a file beside the data's name for the next time; 1100 classes to train on, each
    turned by 0, 90, 180 and 270 degrees, and the last 423 to test on.
    """
    kept = Path(sys.argv[3])
    if not kept.exists():
        found: dict[str, list[np.ndarray]] = {}
        for part in ("images_background", "images_evaluation"):
            with zipfile.ZipFile(data / f"{part}.zip") as archive:
                for name in sorted(archive.namelist()):
                    if name.endswith(".png"):
                        image = Image.open(io.BytesIO(archive.read(name))).convert("L")
                        small = np.asarray(image.resize((28, 28), Image.Resampling.LANCZOS))
                        found.setdefault(name.rpartition("/")[0], []).append(small)
        np.save(kept, np.stack([np.stack(found[name]) for name in sorted(found)]))
    images = 1 - torch.from_numpy(np.load(kept)).float()[:, :, None] / 255
    order = list(range(len(images)))
    random.Random(1).shuffle(order)
    train = [images[number] for number in order[:1100]]
    turned = [torch.rot90(own, quarters, (2, 3)) for quarters in range(4) for own in train]
    return turned, [images[number] for number in order[-423:]]


def draw(classes: Classes, job: Job) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    support, query = [], []
    for number in random.sample(range(len(classes)), job.ways):
        rows = random.sample(range(len(classes[number])), job.shots + job.query_shots)
        support.append(classes[number][rows[: job.shots]])
        query.append(classes[number][rows[job.shots :]])
    labels = torch.arange(job.ways)
    return (
        torch.cat(support), labels.repeat_interleave(job.shots),
        torch.cat(query), labels.repeat_interleave(job.query_shots),
    )  # fmt: skip


def adapt(model: nn.Module, inputs: Tensor, targets: Tensor, job: Job) -> nn.Module:
    adapted = copy.deepcopy(model)
    inner = torch.optim.SGD(adapted.parameters(), lr=job.inner_lr)
    for _ in range(job.inner_steps):
        inner.zero_grad()
        F.cross_entropy(adapted(inputs), targets).backward()
        inner.step()
    inner.zero_grad()
    return adapted


def main() -> None:
    job, data = JOBS[sys.argv[1]], Path(sys.argv[2])
    torch.manual_seed(int(sys.argv[4]))
    random.seed(int(sys.argv[4]))
    train, test = {"mnist": read_mnist, "omniglot": read_omniglot}[job.source](data)
    model = {"mnist": lambda: mlp(784, 256, 10), "omniglot": conv4_strided}[job.source]()
    outer = torch.optim.Adam(model.parameters(), lr=job.meta_lr)
    for _ in range(job.iterations):
        outer.zero_grad()
        for _ in range(job.meta_batch_size):
            x, y, query_x, query_y = draw(train, job)
            adapted = adapt(model, x, y, job)
            F.cross_entropy(adapted(query_x), query_y).backward()
            for parameter, own in zip(model.parameters(), adapted.parameters()):
                share = own.grad / job.meta_batch_size
                parameter.grad = share if parameter.grad is None else parameter.grad + share
        outer.step()
    right = []
    for _ in range(job.test_tasks):
        x, y, query_x, query_y = draw(test, job)
        outputs = adapt(model, x, y, job)(query_x)
        right.append((outputs.argmax(1) == query_y).float().mean().item())
    print(json.dumps({"accuracy": float(np.mean(right))}))


if __name__ == "__main__":
    main()
