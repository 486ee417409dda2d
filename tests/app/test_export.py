"""An adapted model as a program for other runtimes."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fomaml
from commands import refused
from fomaml.app.cli import main
from fomaml.data.images import Decoder
from fomaml.serve import export as exporting

pd = pytest.importorskip("pandas", reason="tables are read by pandas, of the extra tables")
pytest.importorskip("timm", reason="some networks are timm's, of the extra backbones")
from served import own_rows  # noqa: E402

exports = pytest.mark.skipif(bool(exporting.too_old()), reason=exporting.too_old())


@exports
@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("torch-export", "colour"),
        ("torch-export", "two targets"),
        ("torch-export", "windows"),
        ("onnx", "grey"),
        ("onnx", "table"),
    ],
)
def test_an_exported_program_says_what_the_model_says(form, name, run_of, strangers, tmp_path, capsys):
    if form == "onnx":
        pytest.importorskip("onnxscript", reason="ONNX needs onnxscript and onnxruntime, of the extra export")
        onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX needs onnxruntime, of the extra export")
    own = own_rows(name, strangers, tmp_path / "own")
    main(["adapt", str(run_of(name)), "--support", str(own), "--out", str(tmp_path / "model")])
    capsys.readouterr()
    main(["export", str(tmp_path / "model"), "--to", form])
    told = capsys.readouterr().out
    assert "the same outputs as the network's" in told
    path = told.split("saved in ")[1].strip()
    model = fomaml.load_adapted(tmp_path / "model")
    if name in ("grey", "colour"):
        read = Decoder((16, 16), "L" if name == "grey" else "RGB").image
        given = [np.stack([read(path) for path in sorted(own.rglob("*.*"))])]
        expected = model.predict(own).probabilities
    elif name == "windows":
        arrays = np.load(own)["samples"]
        cut = [arrays[60 * n + 8 * k : 60 * n + 8 * k + 8].T for n in range(2) for k in range(7)]
        given, expected = [np.stack(cut)], model.predict(own).probabilities
    else:
        frame = pd.read_csv(own)
        given = [frame[["load", "heat"] if name == "table" else ["load"]].to_numpy(np.float32).copy()]
        if name == "table":
            given.append(np.array(frame[["tool"]] == "mill", dtype=np.int64))
        expected = model.predict(own).values
    if form == "onnx":
        session = onnxruntime.InferenceSession(path)
        [found] = session.run(
            None, {each.name: own for each, own in zip(session.get_inputs(), given, strict=True)}
        )
    else:
        found = torch.export.load(path).module()(*map(torch.from_numpy, given)).detach().numpy()
    assert np.allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)


@exports
def test_what_is_exported_is_compared_first(run_of, strangers, tmp_path, capsys, monkeypatch):
    main(["adapt", str(run_of("states")), "--support", str(own_rows("states", strangers, tmp_path / "own")),
          "--out", str(tmp_path / "model")])  # fmt: skip
    out = tmp_path / "model.safetensors"
    main(["export", str(tmp_path / "model"), "--to", "safetensors", "--out", str(out)])
    weights = fomaml.load_adapted(tmp_path / "model").module.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in load_file(out).items())
    export = ["export", tmp_path / "model", "--to", "safetensors", "--out", out]
    assert "is there already" in refused(capsys, export)
    monkeypatch.setattr(exporting, "_program", lambda *_: lambda given: torch.zeros(len(given[0]), 2))
    export = ["export", tmp_path / "model", "--to", "torch-export"]
    assert "gives other outputs than the network" in refused(capsys, export)
    assert not (tmp_path / "model" / "model.pt2").exists()


def test_a_torch_that_exports_no_programs(run_of, strangers, tmp_path, capsys, monkeypatch):
    main(["adapt", str(run_of("table")), "--support", str(own_rows("table", strangers, tmp_path / "own")),
          "--out", str(tmp_path / "model")])  # fmt: skip
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    given = ["export", str(tmp_path / "model"), "--to"]
    assert "exported by torch >= 2.8, this is 2.6.0+cpu" in refused(capsys, [*given, "torch-export"])
    main([*given, "safetensors"])
