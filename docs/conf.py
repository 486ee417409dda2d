"""How Sphinx makes the site of the pages in this folder and of the docstrings; `make docs` runs it."""

import re
import sys
from pathlib import Path

from sphinx.addnodes import pending_xref

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

import fomaml

project = "fomaml"
author = copyright = "The fomaml authors"
version = release = fomaml.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["results"]
myst_heading_anchors = 3  # headings are linked to as on GitHub
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "fomaml"
html_show_sourcelink = False
html_copy_source = False

default_role = "py:obj"  # `name` in a docstring is a link where there is such a name, else code
autodoc_default_options = {"members": True, "exclude-members": "set_fit_request, set_score_request"}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 90

ITEM = re.compile(r"(?!Source)(\w+(?:, \w+)*): (?=\S)")


def as_rst(lines):
    """The lines of a docstring, which are prose with `code` in it, as Sphinx reads them.

    A line `name: what it is`, with its indented further lines, becomes an item of a list; what else is indented, such
    as code and formulas, stands as it is. Sections, such as "Raises:", are left to napoleon, and so are docstrings in
    numpy's form.
    """
    if any(re.fullmatch("-{3,}", line) for line in lines):
        return ["".join([*line.partition(" : ")[:2], escaped(line.partition(" : ")[2])]) for line in lines]
    found, kind = [], "prose"
    for number, line in enumerate(lines):
        before = kind
        if line and not line[0].isspace():
            follows = number > 0 and (kind == "item" or not lines[number - 1])
            named = ITEM.match(line) if follows else None
            kind = "item" if named else "section" if re.fullmatch(r"[A-Z]\w+:", line) else "prose"
            line = f"* ``{named[1]}``: {escaped(line[named.end() :])}" if named else escaped(line)
        elif line and kind in ("prose", "literal"):
            kind = "literal"
        elif line and kind == "item":
            line = f"  {escaped(line.lstrip())}"
        elif line:
            line = escaped(line)
        if kind == "literal" and before != "literal":
            found += ["", "::", ""]
        elif kind != before or (kind == "item" and line.startswith("*")):
            found.append("")
        found.append(line)
    return found


def escaped(line):
    """Stars, bars and trailing underscores outside of `code` are themselves; a plural may follow the code."""
    parts = re.split("(`[^`]*`)", line)
    parts[::2] = [re.sub(r"[*|]|(?<=\w)_\b(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
    for number in range(2, len(parts), 2):
        parts[number] = re.sub(r"^(?=\w)", r"\\ ", parts[number])
    return "".join(parts)


def process_docstring(app, what, name, of, options, lines):
    lines[:] = as_rst(lines)


def skip_member(app, what, name, of, skip, options):
    """A name that `import fomaml` offers stands on the first page of the reference, and there alone."""
    at_the_top = what == "module" and name in fomaml.__dir__() and getattr(fomaml, name) is of
    return at_the_top or (getattr(of, "__doc__", None) or "").startswith("Alias for field") or None


def unlink_folders(app, doctree):
    """What links to a folder of the repository, such as that of a kept run, is text on the site."""
    here = Path(app.env.doc2path(app.env.docname)).parent
    for node in list(doctree.findall(pending_xref)):
        if node["reftype"] == "myst" and (here / node["reftarget"]).is_dir():
            node.replace_self(node.children)


def setup(app):
    app.connect("autodoc-process-docstring", process_docstring, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip_member)
    app.connect("doctree-read", unlink_folders)
