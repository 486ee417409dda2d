"""Reading a page back: that its tags close, and what it would load."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """A page read strictly: every element is closed in its order, and every id is there once.

    tags: the elements in order, (name, attributes). text: all text, unescaped.
    """

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.pieces = [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"
        ids = [own["id"] for _, own in self.tags if "id" in own]
        assert len(ids) == len(set(ids)), "an id is there twice"
        self.ids = set(ids)
        self.text = "".join(self.pieces)

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"an attribute of {tag} is there twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.pieces.append(data)

    def all(self, name):
        """The attributes of all elements of this name."""
        return [own for tag, own in self.tags if tag == name]
