"""`fomaml demo`: its server says what `fomaml adapt` and `predict` say, to its own page alone."""

import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

import fomaml
from commands import refused
from fomaml.app.cli import main
from fomaml.errors import InputError

pytest.importorskip("starlette", reason="the page is served by starlette, of the extra demo")
pytest.importorskip("uvicorn", reason="the page is served by uvicorn, of the extra demo")
import fomaml.app.demo as demos_of
from demos import RUNS, asked, drawings, in_base64, posted, question, serving
from fomaml.app import demo_server
from fomaml.app.demo import Demo
from html_pages import Page

BEST, FIVE = RUNS / "omniglot_best", RUNS / "omniglot_fomaml_5w1s_short"


@pytest.fixture(scope="module")
def five():
    """A demo of FOMAML's 5-way run, and the port where it is served."""
    demo = Demo(fomaml.load_run(FIVE))
    with serving(demo) as port:
        yield demo, port


def written(pictures, folder):
    for name, files in pictures.items():
        (folder / name).mkdir(parents=True)
        for number, data in enumerate(files):
            (folder / name / f"{number}.png").write_bytes(data)
    return folder


@pytest.mark.parametrize(("run", "classes"), [(BEST, 5), (FIVE, 5), (FIVE, 2)], ids=["best", "five", "two"])
def test_it_says_what_adapt_and_predict_say(run, classes, tmp_path, capsys):
    pictures = dict(list(drawings(4).items())[:classes])
    support = {name: own[:2] for name, own in pictures.items()}
    queries = {(name, n): own[n] for name, own in pictures.items() for n in (2, 3)}
    with serving(Demo(fomaml.load_run(run), save=tmp_path / "kept")) as port:
        status, adapted = posted(port, "/adapt", question(dict(reversed(support.items()))))
        assert (status, adapted["classes"]) == (200, sorted(pictures))
        found = {
            key: posted(port, "/predict", {"model": adapted["model"], "picture": in_base64(data)})[1]
            for key, data in queries.items()
        }
        folders = [posted(port, "/keep", {"model": adapted["model"]})[1]["saved"] for _ in range(2)]
    assert folders == [str(tmp_path / "kept" / "adapted-1"), str(tmp_path / "kept" / "adapted-2")]
    own = written(support, tmp_path / "own")
    main(["adapt", str(run), "--support", str(own), "--out", str(tmp_path / "model")])
    expected, kept = fomaml.load_adapted(tmp_path / "model"), fomaml.load_adapted(folders[1])
    for key, value in expected.module.state_dict().items():
        assert torch.equal(kept.module.state_dict()[key], value)
    assert kept.facts == expected.facts and adapted["steps"][-1] == expected.facts["steps"]
    capsys.readouterr()
    for (name, n), data in queries.items():
        (tmp_path / "query.png").write_bytes(data)
        main(["predict", str(tmp_path / "model"), str(tmp_path / "query.png"), "--json"])
        said = json.loads(capsys.readouterr().out)
        answer = found[name, n]
        assert dict(zip(answer["classes"], answer["probabilities"][-1])) == said["probabilities"]
        assert said["class"] == name


def test_the_curve_is_of_each_number_of_steps(five):
    """On the support set, and on the picture that is asked about."""
    _, port = five
    pictures = drawings(2)
    _, adapted = posted(port, "/adapt", question(pictures))
    _, answer = posted(
        port, "/predict", {"model": adapted["model"], "picture": in_base64(pictures["ring"][0])}
    )
    assert adapted["steps"] == answer["steps"] == [0, 1, 2, 3, 5, 10]
    assert adapted["examples"] == 10 and adapted["seconds"] > 0 and "not calibrated" in adapted["worth"]
    opened = fomaml.load_run(FIVE)
    taken = opened.intake.labelled(pictures)
    truth = torch.arange(5).repeat_interleave(2)
    for n, steps in enumerate(adapted["steps"]):
        module = opened.learner.adapt(fomaml.Examples(taken.inputs, truth), steps, "support").eval()
        with torch.no_grad():
            chances = module(taken.inputs).double().softmax(1)
        assert adapted["probability"][n] == pytest.approx(chances[range(10), truth].mean().item(), abs=1e-6)
        assert adapted["accuracy"][n] == pytest.approx((chances.argmax(1) == truth).double().mean().item())
        assert answer["probabilities"][n] == pytest.approx(chances[4].tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ["colour", "frozen"])
def test_pictures_of_a_folders_run(name, run_of, strangers, tmp_path):
    """Of several sizes and formats, as they are; through a frozen network too."""
    pytest.importorskip("timm", reason="some networks are timm's, of the extra backbones")
    files = {own: sorted((strangers / "symbols" / own).iterdir()) for own in ("class0", "class1")}
    run = fomaml.load_run(run_of(name))
    expected = run.adapt({own: paths[:4] for own, paths in files.items()})
    given = {own: [path.read_bytes() for path in paths] for own, paths in files.items()}
    with pytest.raises(InputError, match="steps"):
        Demo(run, steps="2")
    demo = Demo(run, steps=2)
    adapted = demo.adapt(question({own: all_of[:4] for own, all_of in given.items()}))
    for own, paths in files.items():
        for path, data in list(zip(paths, given[own]))[4:]:
            answer = demo.predict({"model": adapted["model"], "picture": in_base64(data)})
            chances = expected.predict(path).probabilities[0]
            assert torch.allclose(torch.tensor(answer["probabilities"][-1]).double(), chances, atol=1e-6)


def test_the_oldest_model_is_let_go(five):
    demo, port = five
    pictures = drawings(1)
    keys = [posted(port, "/adapt", question(pictures))[1]["model"] for _ in range(demos_of.HELD + 1)]
    query = in_base64(pictures["hook"][0])
    answers = [posted(port, "/predict", {"model": key, "picture": query}) for key in keys]
    assert [status for status, _ in answers] == [400] + [200] * demos_of.HELD
    assert "no longer held: press Adapt again" in answers[0][1]["error"]
    assert len(demo.held) == demos_of.HELD


def test_a_large_network_has_a_short_curve(monkeypatch):
    monkeypatch.setattr(demos_of, "PARAMETERS", 1000)
    assert Demo(fomaml.load_run(FIVE)).adapt(question(drawings(1)))["steps"] == [0, 10]
    assert Demo(fomaml.load_run(FIVE), steps=0).adapt(question(drawings(1)))["steps"] == [0]


# --- what it refuses ------------------------------------------------------------------------------


def png_of(width, height):
    """A PNG whose header declares this size, and that holds no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


ONE = in_base64(drawings(1)["ring"][0])
TWO = [{"name": "a", "pictures": [ONE]}, {"name": "b", "pictures": [ONE]}]


def classes(*own):
    return {"classes": [{"name": name, "pictures": pictures} for name, pictures in own]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (classes(), "two classes or more are needed, got none"),
        (classes(("a", [ONE])), "two classes or more are needed, got one, 'a'"),
        (classes(("a", [ONE]), ("b", [])), "'b' has no examples yet: draw or add one, or remove it"),
        (classes(("a", [ONE]), (" a ", [ONE])), "two classes have the name 'a'"),
        (classes(("a", [ONE]), ("", [ONE])), "a name has 1 to 60 printable letters, got ''"),
        (classes(("a", [ONE]), ("b\n", [ONE]), ("c\td", [ONE])), "a name has 1 to 60 printable letters"),
        (classes(("a", [ONE]), ("\ud800", [ONE])), "a name has 1 to 60 printable letters"),
        (classes(("a", [ONE]), ("b" * 61, [ONE])), "a name has 1 to 60 printable letters"),
        (classes(*((f"{n}", [ONE]) for n in range(6))), "a head for 5 classes, got 6"),
        (classes(("a", [ONE] * 150), ("b", [ONE] * 51)), "more than 200 pictures"),
        (classes(("a", [ONE]), ("b", [ONE, "!"])), "picture 2 of 'b' is not written in base64"),
        (classes(("a", [ONE]), ("b", [7])), "picture 1 of 'b' is not written in base64"),
        (classes(("a", [ONE]), ("b", [""])), "picture 1 of 'b' is no picture that can be read"),
        (classes(("a", [ONE]), ("b", [in_base64(b"text")])), "picture 1 of 'b' is no picture that can be read"),
        (classes(("a", [ONE]), ("b", [ONE[:400]])), "picture 1 of 'b' cannot be read as an image"),
        (classes(("a", [ONE]), ("b", [in_base64(png_of(9000, 9000))])), "more than 50 million pixels, 9000 by 9000"),
        (classes(("a", [ONE]), ("b", [in_base64(png_of(10000, 10000))])), "'b' has more than 50 million pixels"),
        (classes(("a", [ONE]), ("b", [in_base64(png_of(60000, 60000))])), "'b' has more than 50 million pixels"),
        (classes(("a", [ONE]), ("b", [in_base64(b"%!PS-Adobe-3.0 EPSF-3.0\n")])), "no picture that can be read"),
        ({"classes": "ab"}, "the request has no 'classes' that is a list"),
        ({"classes": [1, 2]}, "the request has no 'pictures' that is a list"),
        ([], "the request has no 'classes' that is a list"),
        ({"classes": [{"name": 3, "pictures": [ONE]}]}, "the request has no 'name' that is text"),
    ],
)  # fmt: skip
def test_what_is_no_set_of_examples_is_one_line(given, message, five):
    demo, port = five
    before = list(demo.held)
    status, answer = posted(port, "/adapt", given)
    assert status == 400 and message in answer["error"] and "\n" not in answer["error"]
    assert list(demo.held) == before


@pytest.mark.parametrize(
    ("path", "given", "message"),
    [
        ("/predict", {"model": "x", "picture": ONE}, "no longer held: press Adapt again"),
        ("/predict", {"model": 1, "picture": ONE}, "the request has no 'model' that is text"),
        ("/predict", {"picture": ONE}, "the request has no 'model' that is text"),
        ("/predict", {"model": "HELD", "picture": "?"}, "the picture is not written in base64"),
        ("/predict", {"model": "HELD", "picture": in_base64(b"GIF89a")}, "the picture is no picture"),
        ("/keep", {"model": "HELD"}, "start fomaml demo with --save FOLDER"),
    ],
)
def test_what_is_no_question_is_one_line(path, given, message, five):
    _, port = five
    _, adapted = posted(port, "/adapt", {"classes": TWO})
    given = {key: adapted["model"] if value == "HELD" else value for key, value in given.items()}
    status, answer = posted(port, path, given)
    assert status == 400 and message in answer["error"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {}, 200),
        ("GET", "/", {"Host": "localhost"}, 200),
        ("GET", "/", {"Sec-Fetch-Site": "none"}, 200),
        ("GET", "/", {"Sec-Fetch-Site": "same-site"}, 200),  # a link in a notebook
        ("GET", "/", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("GET", "/", {"Host": "evil.example"}, 400),
        ("GET", "/", {"Host": "127.0.0.1.evil.example"}, 400),
        ("GET", "/", {"Host": ""}, 400),
        ("GET", "/adapt", {}, 405),
        ("GET", "/elsewhere", {}, 404),
        ("POST", "/", {"Content-Type": "application/json"}, 405),
        ("POST", "/adapt", {"Content-Type": "application/json"}, 200),
        ("POST", "/adapt", {"Content-Type": "Application/JSON; charset=utf-8", "Sec-Fetch-Site": "same-origin"}, 200),
        ("POST", "/adapt", {"Content-Type": "application/json", "Origin": "OWN"}, 200),
        ("POST", "/adapt", {"Content-Type": "application/json", "Origin": "http://evil.example"}, 403),
        ("POST", "/adapt", {"Content-Type": "application/json", "Origin": "http://127.0.0.1:1"}, 403),
        ("POST", "/adapt", {"Content-Type": "application/json", "Origin": "https://OWN"}, 403),
        ("POST", "/adapt", {"Content-Type": "application/json", "Origin": "null"}, 403),
        ("POST", "/adapt", {"Content-Type": "application/json", "Sec-Fetch-Site": "cross-site"}, 403),
        ("POST", "/adapt", {"Content-Type": "application/json", "Sec-Fetch-Site": "same-site"}, 403),
        ("POST", "/adapt", {"Content-Type": "application/json", "Host": "evil.example"}, 400),
        ("POST", "/adapt", {"Content-Type": "text/plain"}, 415),
        ("POST", "/adapt", {"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ("POST", "/adapt", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ("POST", "/adapt", {}, 415),
        ("POST", "/predict", {"Content-Type": "text/plain"}, 415),
        ("POST", "/keep", {"Content-Type": "text/plain"}, 415),
        ("OPTIONS", "/adapt", {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}, 403),
    ],
)  # fmt: skip
def test_only_its_own_page_is_answered(method, path, headers, status, five):
    _, port = five
    own = f"127.0.0.1:{port}"
    origin = {"OWN": f"http://{own}"}
    headers = {key: origin.get(value, value.replace("OWN", own)) for key, value in headers.items()}
    body = json.dumps({"classes": TWO}) if method == "POST" else None
    found, answered, _ = asked(port, method, path, body, headers)
    assert found == status
    assert "access-control-allow-origin" not in answered


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000, b""])
def test_what_is_no_json_is_one_line(body, five):
    status, _, answer = asked(five[1], "POST", "/adapt", body, {"Content-Type": "application/json"})
    assert (status, json.loads(answer)) == (400, {"error": "the request is no JSON"})


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_request_is_not_read(chunked, five, monkeypatch):
    monkeypatch.setattr(demo_server, "BODY", 10_000)
    connection = http.client.HTTPConnection("127.0.0.1", five[1], timeout=600)
    connection.putrequest("POST", "/adapt")
    connection.putheader("Content-Type", "application/json")
    if chunked:
        connection.putheader("Transfer-Encoding", "chunked")
    else:
        connection.putheader("Content-Length", "10001")
    connection.endheaders()
    if chunked:
        connection.send(b"2711\r\n" + b" " * 10_001 + b"\r\n")  # and no end
    answer = connection.getresponse()
    assert answer.status == 413 and "give fewer or smaller pictures" in json.loads(answer.read())["error"]
    connection.close()


# --- the page and the command ---------------------------------------------------------------------


def test_the_page_loads_nothing_and_runs_only_its_own_script(five):
    _, headers, body = asked(five[1], "GET", "/")
    page = Page(body.decode())
    assert "omniglot_fomaml_5w1s_short" in page.text
    for tag, own in page.tags:
        assert not {"src", "action", "style"} & set(own) and own.get("href", "data:,") == "data:,", tag
        assert not [name for name in own if name.startswith("on")]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", body.decode())
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff" and "server" not in headers


def test_what_the_run_is_called_cannot_break_the_page(five):
    facts = five[0].facts() | {"run": "</script><b>$STYLE$ & Co"}
    page = Page(demo_server.page_of(facts)[0])
    assert page.all("b") == [] and len(page.all("script")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("demo OWN", "holds no run"),
        ("demo RUN --port 65536", "--port must be a whole number from 0 to 65535, got 65536"),
        ("demo RUN --port -1", "--port must be a whole number"),
        ("demo RUN --port USED", "is in use: give another --port"),
        ("demo RUN --port 0 --save OWN/file", "is a file, expected a folder"),
        ("demo RUN --port 0 --steps many", "--steps is a whole number or auto"),
        ("demo RUN --port 0 --steps -1", "steps must be a whole number of 0 or more"),
        ("demo RUN --port 0 --steps auto", "has no calibration.json, which fomaml calibrate writes"),
    ],
)
def test_what_does_not_go_is_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        for word, place in {"OWN": tmp_path, "RUN": FIVE, "USED": used.getsockname()[1]}.items():
            arguments = arguments.replace(word, str(place))
        assert message in refused(capsys, arguments.split())


def test_a_run_of_rows_has_no_page(run_of, capsys):
    assert "the page takes pictures" in refused(capsys, ["demo", run_of("table"), "--port", "0"])


def test_without_the_libraries_it_says_which_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert 'pip install "fomaml[demo]"' in refused(capsys, ["demo", FIVE])


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is a signal")
def test_ctrl_c_ends_it_in_one_line():
    command = [sys.executable, "-m", "fomaml", "demo", str(FIVE), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(Path(fomaml.__file__).parents[1])}
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment) as process:
        told = process.stdout.readline()
        port = int(re.match(r"http://127\.0\.0\.1:(\d+) shows .* \(Ctrl-C ends it\)$", told)[1])
        assert asked(port, "GET", "/")[0] == 200
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=600)
    assert (process.returncode, said, errors) == (0, "the demo has ended\n", "")
