"""Runs and adapted models as folders of the Hugging Face hub. The hub is a folder here, and no network is used."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import fomaml
from commands import without
from few import few_baselines
from fomaml.app.cli import main
from fomaml.app.model_card import quoted, said
from fomaml.errors import InputError
from fomaml.files import write_json
from fomaml.sealed import unsealed

hub = pytest.importorskip("huggingface_hub", reason="the hub is reached by huggingface_hub, of the extra hub")
yaml = pytest.importorskip("yaml")
pytest.importorskip("pandas", reason="tables are read by pandas, of the extra tables")
pytest.importorskip("timm", reason="some networks are timm's, of the extra backbones")
from served import SOURCES, own_rows  # noqa: E402

NAMES = ("grey", "states", "frozen", "two targets")


def said_of(model, inputs):
    found = model.predict(inputs)
    return found.values if found.probabilities is None else found.probabilities


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """The hub as a folder, NAME of a repository → its files; what is asked of it is kept."""
    from huggingface_hub import hub_mixin

    root, asked = tmp_path / "hub", []

    def create_repo(self, repo_id, **options):
        asked.append(("create", repo_id, options))
        return hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **options):
        asked.append(("upload", repo_id, options))
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
        return f"https://huggingface.co/{repo_id}/commit/1"

    def download(repo_id, filename, **options):
        if not (root / repo_id / filename).exists():
            raise hub.errors.LocalEntryNotFoundError(filename)
        return str(root / repo_id / filename)

    def snapshot(repo_id, allow_patterns, **options):
        asked.append(("download", repo_id, options))
        own = tmp_path / "cache" / repo_id
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        for name in allow_patterns:
            if (root / repo_id / name).exists():
                shutil.copy(root / repo_id / name, own)
        return str(own)

    monkeypatch.setattr(hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    # one that is missing is told by an error that needs an answer of the network
    monkeypatch.setattr(hub_mixin, "HfHubHTTPError", hub.errors.LocalEntryNotFoundError)
    monkeypatch.setattr(hub_mixin, "hf_hub_download", download)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    return root, asked


@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_the_same_bits_after_a_round_trip(name, run_of, strangers, tmp_path, pretend):
    run, own = fomaml.load_run(run_of(name)), own_rows(name, strangers, tmp_path / "own")
    model = run.adapt(own)
    expected = said_of(model, own)
    again = {"features_weights": str(strangers / "net.safetensors")} if name == "frozen" else {}
    assert model.save_pretrained(tmp_path / "model") is None
    run.save_pretrained(tmp_path / "run")
    kept = fomaml.AdaptedModel.from_pretrained(tmp_path / "model", **again)
    assert torch.equal(said_of(kept, own), expected) and kept.classes == model.classes
    opened = fomaml.Run.from_pretrained(str(tmp_path / "run"), **again)
    assert torch.equal(said_of(opened.adapt(own), own), expected)
    assert model.push_to_hub("me/model", private=True).endswith("/commit/1")
    run.push_to_hub("me/run", commit_message="new")
    root, asked = pretend
    assert [(what, repo) for what, repo, _ in asked] == [
        (what, repo) for repo in ("me/model", "me/run") for what in ("create", "upload")
    ]
    assert asked[0][2]["private"] is True and asked[3][2]["commit_message"] == "new"
    (root / "me/model" / "extra.pkl").write_text("nothing that is asked for")
    (root / "me/run" / "own.py").write_text("raise SystemExit")
    shared = fomaml.AdaptedModel.from_pretrained("me/model", revision="v1", **again)
    assert torch.equal(said_of(shared, own), expected)
    assert asked[-1][2]["revision"] == "v1"
    assert torch.equal(said_of(fomaml.Run.from_pretrained("me/run", **again).adapt(own), own), expected)
    # what was loaded is saved again: nothing is lost on the way
    shared.save_pretrained(tmp_path / "second")
    for file in ("model.json", "README.md", "weights.safetensors"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "model" / file).read_bytes(), file


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_holds_no_pickle_and_no_place_of_this_machine(name, run_of, strangers, tmp_path):
    run = fomaml.load_run(run_of(name))
    run.save_pretrained(tmp_path / "run")
    run.adapt(own_rows(name, strangers, tmp_path / "own")).save_pretrained(tmp_path / "model")
    places = {str(strangers), str(run_of(name).parent), str(tmp_path), str(Path.home())}
    for file in [*(tmp_path / "run").iterdir(), *(tmp_path / "model").iterdir()]:
        assert file.suffix in (".json", ".jsonl", ".txt", ".md", ".safetensors")
        assert not [place for place in places if place.encode() in file.read_bytes()], file
    assert str(strangers) in (run_of(name) / "config.json").read_text()  # as the run itself says it


def test_the_card_warns_of_query_examples_that_inform_each_other(run_of, tmp_path):
    shutil.copytree(run_of("grey"), tmp_path / "run")
    result = unsealed((tmp_path / "run" / "result.json").read_text())
    result["protocol"] |= {"statistics": "own", "transductive": True}
    write_json(tmp_path / "run" / "result.json", result)
    fomaml.load_run(tmp_path / "run").save_pretrained(tmp_path / "kept")
    assert "transductive: the query" in hub.ModelCard.load(tmp_path / "kept" / "README.md").text


@pytest.mark.parametrize("name", ["grey", "table"])
def test_the_card_says_what_the_files_say(name, run_of, strangers, tmp_path):
    run = fomaml.load_run(run_of(name))
    model = run.adapt(own_rows(name, strangers, tmp_path / "own"))
    run.save_pretrained(tmp_path / "run", license="cc-by-4.0")
    model.save_pretrained(tmp_path / "model")
    cards = {own: hub.ModelCard.load(tmp_path / own / "README.md") for own in ("run", "model")}
    result = json.loads((run_of(name) / "result.json").read_text())
    [told] = cards["run"].data.eval_results
    scale = 100 if result["unit"] == "%" else 1
    assert told.metric_value == pytest.approx(scale * result[result["metric"]], rel=1e-5)
    assert told.metric_type == result["metric"]
    assert f"± {scale * result['interval']:.3g} (95 % interval)" in told.metric_name
    assert f"{result['tasks']} unseen tasks" in told.metric_name
    assert cards["model"].data.eval_results is None  # the figure is the run's
    assert (cards["run"].data.license, cards["model"].data.license) == ("cc-by-4.0", None)
    for card in cards.values():
        assert card.data.library_name == "fomaml" and "model_hub_mixin" in card.data.tags
        for row in result["rows"]:
            assert row["label"] in card.text
            assert f"| {scale * row['mean']:.{1 if scale == 100 else 3}f} ± " in card.text
        assert "No baselines were measured" in card.text and "## Limits" in card.text
        assert "transductive: the query" not in card.text
    assert "- classes or groups: " in cards["run"].text
    assert (tmp_path / "run" / "parts.json").read_bytes() == (run_of(name) / "parts.json").read_bytes()
    # the card of `fomaml adapt` is the same one
    from fomaml.app.serving import save_model

    save_model(model, tmp_path / "adapted")
    assert hub.ModelCard.load(tmp_path / "adapted" / "README.md").text == cards["model"].text


def test_the_card_has_the_baselines(tmp_path, monkeypatch):
    from fomaml.app.model_card import card_of_run
    from fomaml.app.run_record import read_record

    few_baselines(monkeypatch)
    small = {"iterations": 3, "meta-batch-size": 2, "test-tasks": 4}
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    main(["train", "sinusoid", "--test-steps", "0", "1", *words, "--out", str(tmp_path / "run")])
    record = read_record(tmp_path / "run")
    told = card_of_run(record.settings, record.result, record.calibrations, {})
    assert len(record.result["differences"]) > 2
    for row in record.result["differences"]:
        assert row["to"] in told and f"| {row['mean']:.3f} ± {row['interval']:.3f} |" in told
    assert "FOMAML minus it" in told


@pytest.mark.parametrize(
    "text", ['a "b" \\ c', "x: y # z", "été 😀", "a\nb\x85c\u2028d\x00", "---", "{[|>&*"]
)
def test_any_name_is_one_text_of_the_front_matter_and_one_line_of_the_page(text):
    assert yaml.safe_load(f"key: {quoted(text)}") == {"key": text}
    assert "\n" not in said(text) and said("<b>|`") == r"\<b\>\|\`"


def test_what_is_damaged_on_the_way_is_noticed(run_of, strangers, tmp_path, pretend):
    run, root = fomaml.load_run(run_of("grey")), pretend[0]
    run.push_to_hub("me/run")
    run.adapt(own_rows("grey", strangers, tmp_path / "own")).push_to_hub("me/model")
    for repo, of in (("me/run", fomaml.Run), ("me/model", fomaml.AdaptedModel)):
        weights = root / repo / "weights.safetensors"
        changed = bytearray(weights.read_bytes())
        changed[-1] ^= 1
        weights.write_bytes(changed)
        with pytest.raises(InputError, match="another digest"):
            of.from_pretrained(repo)


def test_code_of_ones_own_is_not_taken_from_the_hub(strangers, tmp_path, pretend):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "own.py").write_text(
        "from torch import nn\nclass Own(nn.Sequential):\n    def __init__(self, outputs):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(256, outputs))\n"
    )
    name = f"{tmp_path}/here/own.py:Own"
    text = SOURCES["grey"].replace("DATA", str(strangers)).replace("--channels 4", f"--model {name}")
    main(["train", *text.split(), "--out", str(tmp_path / "run")])
    run = fomaml.load_run(tmp_path / "run", model=name)
    own = own_rows("grey", strangers, tmp_path / "own")
    run.push_to_hub("me/run")
    for file in (pretend[0] / "me/run").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
    with pytest.raises(InputError, match=r"imported only where it is named again: add model='own\.py:Own'"):
        fomaml.Run.from_pretrained("me/run")
    again = fomaml.Run.from_pretrained("me/run", model=name)
    assert torch.equal(said_of(again.adapt(own), own), said_of(run.adapt(own), own))


def test_what_cannot_be_done_is_one_line(run_of, strangers, tmp_path, monkeypatch):
    run = fomaml.load_run(run_of("grey"))
    before = (run_of("grey") / "config.json").read_bytes()
    with pytest.raises(InputError, match="already holds something"):
        run.save_pretrained(run_of("grey"))
    assert (run_of("grey") / "config.json").read_bytes() == before
    with pytest.raises(InputError, match=r"holds no adapted model \(no model\.json\)"):
        fomaml.AdaptedModel.from_pretrained(run_of("grey"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("me/none", "no/such/folder", str(tmp_path / "none")):
        with pytest.raises(InputError, match="is no folder, and was not read from the hub") as told:
            fomaml.Run.from_pretrained(name, cache_dir=tmp_path / "cache")
        assert "\n" not in str(told.value)
    with pytest.raises(InputError, match="nothing was pushed to me/run") as told:
        run.push_to_hub("me/run", token="none")
    assert "\n" not in str(told.value)


def test_without_the_library_all_else_works(run_of, strangers, tmp_path, monkeypatch):
    own = own_rows("grey", strangers, tmp_path / "own")
    without(monkeypatch, "huggingface_hub")
    run = fomaml.load_run(run_of("grey"))
    model = run.adapt(own)
    for call in (
        lambda: run.save_pretrained(tmp_path / "run"),
        lambda: model.save_pretrained(tmp_path / "model"),
        lambda: model.push_to_hub("me/model"),
        lambda: fomaml.Run.from_pretrained(run_of("grey")),
        lambda: fomaml.AdaptedModel.from_pretrained("me/model"),
    ):
        with pytest.raises(InputError, match=r"pip install 'fomaml\[hub\]'"):
            call()
    assert not (tmp_path / "run").exists() and not (tmp_path / "model").exists()
