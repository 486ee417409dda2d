"""The server of `fomaml demo` on a port of its own, and the files of drawings."""

import base64
import contextlib
import http.client
import io
import json
import math
import threading
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fomaml.app.demo_server import listening, server

RUNS = Path(__file__).parent.parent / "docs" / "results"


@contextlib.contextmanager
def serving(demo):
    """The port on which a demo is served, by a thread that ends with the block."""
    with listening(0) as listener:
        served = server(demo)
        thread = threading.Thread(target=served.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            served.should_exit = True
            thread.join(600)
            assert not thread.is_alive()


def asked(port, method, path, body=None, headers=None):
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def posted(port, path, given, headers=None):
    """Status and JSON of the answer to a question."""
    own = {"Content-Type": "application/json", **(headers or {})}
    status, _, body = asked(port, "POST", path, json.dumps(given), own)
    return status, json.loads(body)


def in_base64(data):
    return base64.b64encode(data).decode()


def circle(a, b):
    """From angle a to b, in whole turns."""
    angles = [2 * math.pi * (a + (b - a) * n / 24) for n in range(25)]
    return [(0.5 + 0.28 * math.cos(own), 0.5 + 0.3 * math.sin(own)) for own in angles]


# Strokes of points from 0 to 1.
SYMBOLS = {
    "cross": [[(0.2, 0.2), (0.8, 0.8)], [(0.8, 0.2), (0.2, 0.8)]],
    "hook": [[(0.3, 0.2), (0.3, 0.75), (0.75, 0.75)]],
    "ring": [circle(0, 1)],
    "tent": [[(0.2, 0.75), (0.5, 0.2), (0.8, 0.75)]],
    "zigzag": [[(0.2, 0.3), (0.4, 0.7), (0.6, 0.3), (0.8, 0.7)]],
}


def moved(strokes, random):
    """The symbol as a hand draws it again: elsewhere, in another size, not quite straight."""
    shift, size = random.uniform(-0.08, 0.08, 2), random.uniform(0.75, 1.1, 2)
    return [
        [
            tuple((np.array(point) - 0.5) * size + 0.5 + shift + random.uniform(-0.015, 0.015, 2))
            for point in stroke
        ]
        for stroke in strokes
    ]


def png(strokes, side=105, width=5.4):
    """A drawing as the page sends it: dark on white, with soft edges."""
    large = Image.new("RGBA", (8 * side, 8 * side), "white")
    draw = ImageDraw.Draw(large)
    for stroke in strokes:
        points = [(8 * side * x, 8 * side * y) for x, y in stroke]
        draw.line(points, fill="black", width=round(8 * width), joint="curve")
    file = io.BytesIO()
    large.resize((side, side), Image.Resampling.BOX).save(file, "PNG")
    return file.getvalue()


def drawings(number, seed=0):
    """Symbol → the files of so many drawings of it."""
    random = np.random.default_rng(seed)
    return {name: [png(moved(own, random)) for _ in range(number)] for name, own in SYMBOLS.items()}


def question(pictures):
    """What /adapt is asked for files by class."""
    return {"classes": [{"name": name, "pictures": [*map(in_base64, own)]} for name, own in pictures.items()]}
