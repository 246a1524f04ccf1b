"""A page as a test reads it: elements and text, with every tag closed in order; and a text that
breaks bad pages.
"""

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "link", "input"}
EVIL = "</p></pre></title><script>alert('x')</script><img src=x onerror=\"y\">&amp;"


class Page(HTMLParser):
    """Collects elements and text, and fails where a tag is not closed in order."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts = [], [], []
        self.feed(source)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"repeated attribute in <{tag}>"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self):
        return "".join(self.texts)
