"""An adapted model that holds only what adaptation has changed: the whole one, to the bit, where its run is."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open

import fomaml
from commands import refused
from fomaml.app.changes import _same
from fomaml.app.cli import main
from fomaml.errors import InputError

pytest.importorskip("pandas", reason="tables are read by pandas, of the extra tables")
pytest.importorskip("timm", reason="some networks are timm's, of the extra backbones")
from served import SOURCES, own_rows


@pytest.fixture(scope="module")
def anil(strangers, tmp_path_factory):
    """A run whose body stays as it is when it adapts."""
    out = tmp_path_factory.mktemp("anil") / "run"
    words = SOURCES["grey"].replace("DATA", str(strangers)).split()
    main(["train", *words, "--algorithm", "anil", "--out", str(out)])
    return out


def adapted(run, own, out, *words):
    main(["adapt", str(run), "--support", str(own), "--out", str(out), *words])
    return out


def names(folder):
    with safe_open(str(folder / "weights.safetensors"), framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("name", ["anil", "grey", "colour", "table", "states", "frozen"])
def test_it_is_the_whole_model_to_the_bit(name, anil, run_of, strangers, tmp_path):
    run = anil if name == "anil" else run_of(name)
    own = own_rows("grey" if name == "anil" else name, strangers, tmp_path / "own")
    whole = fomaml.load_adapted(adapted(run, own, tmp_path / "whole"))
    part = fomaml.load_adapted(adapted(run, own, tmp_path / "part", "--change-only"))
    first, second = whole.module.state_dict(), part.module.state_dict()
    assert first.keys() == second.keys()
    assert all(_same(first[key], second[key]) for key in first)
    found = [model.predict(own) for model in (whole, part)]
    values = [each.values if each.probabilities is None else each.probabilities for each in found]
    assert torch.equal(*values)
    before = fomaml.load_run(run).learner.model.state_dict()
    expected = {key for key in first if key not in before or not _same(first[key], before[key])}
    assert names(tmp_path / "part") == expected
    if name == "anil":  # of the run's own tensors the head alone; the statistics of batch norms are new
        layers = {key.rpartition(".")[0] for key in expected & before.keys()}
        assert len(layers) == 1 and expected < first.keys()
        sizes = [(tmp_path / each / "weights.safetensors").stat().st_size for each in ("part", "whole")]
        assert sizes[0] < sizes[1]


def test_the_run_is_found_where_it_has_moved(anil, strangers, tmp_path, monkeypatch, capsys):
    shutil.copytree(anil, tmp_path / "run")
    own = own_rows("grey", strangers, tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    adapted("run", own, tmp_path / "model", "--change-only")
    assert "the model needs run where it is used" in capsys.readouterr().out
    expected = fomaml.load_adapted("model").predict(own).probabilities
    assert "are read from the run" in (tmp_path / "model" / "README.md").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the run was named from another folder
    assert torch.equal(fomaml.load_adapted(tmp_path / "model").predict(own).probabilities, expected)
    (tmp_path / "run").rename(tmp_path / "moved")
    said = refused(capsys, ["predict", tmp_path / "model", own])
    assert said.endswith("run, which is not there: bring it back, or say where it is by now, --run RUN")
    with pytest.raises(InputError, match=r"say where it is by now, run='RUN'$"):
        fomaml.load_adapted(tmp_path / "model")
    moved = fomaml.load_adapted(tmp_path / "model", run=tmp_path / "moved")
    assert torch.equal(moved.predict(own).probabilities, expected)
    capsys.readouterr()
    main(["predict", str(tmp_path / "model"), str(own), "--json", "--run", str(tmp_path / "moved")])
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert list(first["probabilities"].values()) == expected[0].tolist()
    main(["evaluate", str(tmp_path / "model"), "--query", str(own), "--run", str(tmp_path / "moved")])
    # a model that is loaded is whole, and is kept so
    moved.facts["run"] = str(tmp_path / "moved")
    fomaml.app.serving.save_model(moved, tmp_path / "whole")
    assert torch.equal(fomaml.load_adapted(tmp_path / "whole").predict(own).probabilities, expected)
    assert "not in this folder" not in (tmp_path / "whole" / "README.md").read_text()


def test_another_run_is_refused(anil, run_of, strangers, tmp_path, capsys):
    own = own_rows("grey", strangers, tmp_path / "own")
    model = adapted(anil, own, tmp_path / "model", "--change-only")
    said = refused(capsys, ["predict", model, own, "--run", run_of("grey")])
    assert (
        said == f"{run_of('grey')} is not the run that {model} was made of: its weights have another digest"
    )
    whole = adapted(anil, own, tmp_path / "whole")
    assert "needs no run" in refused(capsys, ["predict", whole, own, "--run", anil])
    assert "is of an adapted model" in refused(capsys, ["evaluate", anil, "--run", anil])
    # what has been edited is noticed, of the run it names too
    facts = json.loads((model / "model.json").read_text())
    facts["base"]["run"] = str(run_of("grey"))
    (model / "model.json").write_text(json.dumps(facts))
    assert "was written for other settings" in refused(capsys, ["predict", model, own])


def test_the_last_weights_are_the_last_ones(anil, strangers, tmp_path):
    own = own_rows("grey", strangers, tmp_path / "own")
    models = [
        fomaml.load_adapted(adapted(anil, own, tmp_path / name, "--weights", "last", *words))
        for name, words in {"whole": [], "part": ["--change-only"]}.items()
    ]
    assert torch.equal(*(model.predict(own).probabilities for model in models))
    assert json.loads((tmp_path / "part" / "model.json").read_text())["base"]["weights"] == "last"


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ([0.0], [-0.0], False), ([float("nan")], [float("nan")], True), ([1.0], [1.0], True), ([1.0], [[1.0]], False),
        ([], [], True),
    ],
)  # fmt: skip
def test_the_same_is_to_the_bit(first, second, same):
    assert _same(torch.tensor(first), torch.tensor(second)) == same
    assert not _same(torch.tensor([1.0]), torch.tensor([1.0]).double())


def test_a_copy_of_the_run_is_the_run(anil, strangers, tmp_path):
    """Whose file of weights differs in its header, as paths are left out of what is shared."""
    pytest.importorskip("huggingface_hub", reason="runs are shared by huggingface_hub, of the extra hub")
    own = own_rows("grey", strangers, tmp_path / "own")
    model = adapted(anil, own, tmp_path / "model", "--change-only")
    fomaml.load_run(anil).save_pretrained(tmp_path / "copy")
    found = [fomaml.load_adapted(model, run=run).predict(own) for run in (None, tmp_path / "copy")]
    assert torch.equal(*(each.probabilities for each in found))
