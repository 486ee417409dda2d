"""Runs of each kind of source and the files of a stranger, for the tests of what is made of them."""

import shutil

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

QUICK = "--iterations 3 --meta-batch-size 2 --test-tasks 4 --validation-tasks 4 --test-steps 0 2 --shots 2"
QUICK += " --query-shots 2 --no-baselines"
IMAGES = f"--channels 4 --ways 2 --shares 0.4 0.3 0.3 --image-size 16 16 {QUICK}"
TIMM = IMAGES.replace("--channels 4 ", "")
SOURCES = {
    "grey": f"folder:DATA/symbols {IMAGES}",
    "colour": f"folder:DATA/symbols --rgb --algorithm proto-maml {IMAGES}",
    "of a library": f"folder:DATA/symbols --rgb --model timm:test_resnet --model-weights random {TIMM}",
    "frozen": "folder:DATA/symbols --rgb --features-of timm:test_resnet --features-weights DATA/net.safetensors "
    + TIMM,
    "table": f"table:DATA/machines.csv --task machine --target wear --features load heat --categorical tool {QUICK}",
    "two targets": f"table:DATA/machines.csv --task machine --target wear heat --features load {QUICK}",
    "states": f"table:DATA/machines.csv --task machine --target state --features load {QUICK}",
    "arrays": f"arrays:DATA/machines.npz --task machine --inputs x --target wear {QUICK}",
    "windows": "windows:DATA/motion.npz --inputs samples --lengths lengths --task subject --target motion --window 8 "
    f"--hop 8 {QUICK}",
}  # fmt: skip


PICTURES = ("grey", "colour", "of a library", "frozen")


def write(folder):
    """Symbols as pictures of several sizes, kinds and colours, and machines and motions as rows."""
    random = np.random.default_rng(0)
    for number in range(10):
        own = folder / "symbols" / f"class{number}"
        own.mkdir(parents=True)
        shape = random.integers(0, 2, (4, 4, 3)) * 200
        for image in range(6):
            size = 4 * int(random.integers(3, 6))
            pixels = np.kron(shape, np.ones((size // 4, size // 4, 1))) + random.integers(
                0, 50, (size, size, 3)
            )
            Image.fromarray(pixels.astype(np.uint8)).save(own / f"{image}.{'png' if image % 2 else 'jpg'}")
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=5).state_dict(), folder / "net.safetensors")
    rows = 150
    frame = pd.DataFrame({
        "machine": np.repeat([f"m{number}" for number in range(10)], 15),
        "load": random.random(rows) * 9,
        "tool": np.array(["mill", "lathe"])[random.integers(0, 2, rows)],
        "wear": 100 + 50 * random.random(rows),
        "heat": 20 + 5 * random.random(rows),
        "state": np.array(["good", "bad"])[np.arange(rows) % 2],
    })  # fmt: skip
    frame.to_csv(folder / "machines.csv", index=False)
    np.savez(
        folder / "machines.npz", x=frame[["load", "heat"]].to_numpy(), wear=frame.wear.to_numpy(),
        machine=frame.machine.to_numpy(dtype=str),
    )  # fmt: skip
    np.savez(
        folder / "motion.npz", samples=random.normal(size=(720, 2)).astype(np.float32), lengths=np.full(12, 60),
        subject=np.arange(12) // 2, motion=np.array(["walk", "run"])[np.arange(12) % 2],
    )  # fmt: skip


def own_rows(name, data, path):
    """The path of a file of the rows of one task, or of a folder of two classes, as a stranger has them."""
    if name in PICTURES:
        for own in ("class0", "class1"):
            shutil.copytree(data / "symbols" / own, path / own)
        return path
    path.mkdir()
    if name in ("arrays", "windows"):
        arrays = dict(np.load(data / ("machines.npz" if name == "arrays" else "motion.npz")))
        if name == "arrays":
            arrays = {key: value[arrays["machine"] == "m3"] for key, value in arrays.items()}
        else:
            arrays = {
                "samples": arrays["samples"][:120],
                **{key: arrays[key][:2] for key in arrays if key != "samples"},
            }
        np.savez(path / "own.npz", **arrays)
        return path / "own.npz"
    frame = pd.read_csv(data / "machines.csv")
    frame[frame.machine == "m3"].sample(frac=1, axis=1, random_state=0).to_csv(path / "own.csv", index=False)
    return path / "own.csv"
