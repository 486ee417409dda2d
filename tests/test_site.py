"""The site: every page and every public name stands in it; as it is built, it loads nothing from elsewhere."""

import html.parser
import importlib
import pkgutil
import re
import runpy
import subprocess
import sys
import types
import urllib.parse

import pytest

import fomaml
from pages import ROOT, read

DOCS = ROOT / "docs"
REFERENCE = "".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("reference/*.rst")))
# What is behind these is no interface: a package with an `__all__` speaks for its modules; so does the command line.
INTERNAL = (
    "fomaml.engines.",
    "fomaml.app",
    "fomaml.models.",
    "fomaml.baselines.",
    "fomaml.check.",
    "fomaml.__main__",
)


def test_every_page_stands_in_the_navigation():
    listed = set(re.findall(r"<([\w/-]+)>$", read("docs/index.rst"), re.MULTILINE))
    assert listed == {*(path.stem for path in DOCS.glob("*.md")), "reference/index"}
    listed = set(re.findall(r"^   ([\w-]+)$", read("docs/reference/index.rst"), re.MULTILINE))
    assert listed == {path.stem for path in DOCS.glob("reference/*.rst")} - {"index"}


def test_every_public_name_stands_in_the_reference():
    modules = {name for name in dir(fomaml) if isinstance(getattr(fomaml, name), types.ModuleType)}
    names = (
        {name for name in dir(fomaml) if not name.startswith("_")}
        - modules
        - {"TYPE_CHECKING", "LATE", "submodules"}
    )
    page = read("docs/reference/fomaml.rst")
    assert set(re.findall(r"^\.\. auto(?:class|function):: (\w+)$", page, re.MULTILINE)) == names
    assert set(fomaml.__all__) <= names


def test_every_public_module_stands_in_the_reference():
    walked = {module.name for module in pkgutil.walk_packages(fomaml.__path__, "fomaml.")}
    public = {name for name in walked if not name.startswith(INTERNAL) and "._" not in name}
    listed = set(re.findall(r"^\.\. automodule:: ([\w.]+)$", REFERENCE, re.MULTILINE))
    # a module of the same name as a function of `fomaml` has its names listed one by one
    for name in ("fomaml.train", "fomaml.evaluate"):
        page = REFERENCE.partition(f".. currentmodule:: {name}\n")[2].partition("\n\n\n")[0]
        found = set(re.findall(r":: (\w+)$", page.partition("----")[0], re.MULTILINE))
        own = vars(importlib.import_module(name))
        assert found == {
            each
            for each, of in own.items()
            if getattr(of, "__module__", None) == name
            and not each.startswith("_")
            and not hasattr(fomaml, each)
        }
        listed.add(name)
    assert listed - public == {"fomaml.app.serving"}
    assert public <= listed


def test_docstrings_as_the_site_reads_them():
    pytest.importorskip("sphinx")
    as_rst = runpy.run_path(str(DOCS / "conf.py"))["as_rst"]
    text = """What it is: a thing.

a, b: the first `x_` and
    more of x_.
c: two * three, `Task`s.
Text again:
    f = g(h)
end.

Raises:
    InputError: a wrong a*."""
    assert (
        "\n".join(as_rst(text.splitlines()))
        == """What it is: a thing.


* ``a, b``: the first `x_` and
  more of x\\_.

* ``c``: two \\* three, `Task`\\ s.

Text again:

::

    f = g(h)

end.


Raises:
    InputError: a wrong a\\*."""
    )
    numpy = ["Attributes", "----------", "a_ : array (b_,)"]
    assert as_rst(numpy) == ["Attributes", "----------", "a_ : array (b\\_,)"]


class Page(html.parser.HTMLParser):
    """ids, links, and what is loaded with the page."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") not in ("index", "search", "next", "prev", "author"):
            self.loaded.append(found["href"])
        self.loaded += [found[name] for name in ("src", "srcset", "data") if found.get(name)]


@pytest.mark.long  # half a minute; the tests above and those of links in tests/test_docs.py stand for it
def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path):
    for library in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(library)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path: Page(path) for path in tmp_path.rglob("*.html")}
    assert tmp_path / "start.html" in pages and tmp_path / "reference" / "fomaml.html" in pages
    for path, page in pages.items():
        assert not [url for url in page.loaded if re.match(r"(?:https?:)?//", url)], path.name
        assert all((path.parent / url.partition("?")[0]).is_file() for url in page.loaded), path.name
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert urllib.parse.unquote(parts.fragment) in pages[target].ids, f"{path.name}: {link}"
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(
            r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")
        ), sheet.name
