"""The page: everything that was said is in it, safely, and nothing outside is needed."""

import base64
from html.parser import HTMLParser

from mistral_ms.training.report import Check, Passage, Picture, Report, render_html

PNG = b"\x89PNG\r\n\x1a\n fake"
REPORT = Report(
    title="A <title> & more",
    lead="It went from 10 to 0.02.",
    facts=[("Model", "8 experts"), ("Text", "a < b")],
    pictures=[Picture("Loss", "It falls.", PNG)],
    passages=[Passage("Once <b>", " upon\na time", "Recited.")],
    checks=[Check("equal", True, "23 of 23"), Check("fast", False, "took long")],
    files=[("demo/report.html", "this page")],
    commands=[('run --prompt "x"', "again")],
)
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects text, headings and links; insists on balanced tags."""

    def __init__(self, source):
        super().__init__()
        self.open, self.text, self.headings, self.links, self.marks = [], "", [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag == "b":
            self.marks.append(attributes["class"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "style" not in self.open:
            self.text += data


def test_everything_is_said_and_escaped():
    page = Page(render_html(REPORT))
    for said in (
        "A <title> & more",
        "It went from 10 to 0.02.",
        "a < b",
        "It falls.",
        "Once <b> upon\na time",
        "Recited.",
        "23 of 23",
        "took long",
        "demo/report.html",
        'run --prompt "x"',
    ):
        assert said in page.text, said


def test_it_needs_no_other_file():
    page = Page(render_html(REPORT))
    assert page.links == ["data:image/png;base64," + base64.b64encode(PNG).decode()]
    assert "http" not in render_html(REPORT)


def test_checks_are_told_by_words_too():
    page = Page(render_html(REPORT))
    assert page.marks == ["passed", "failed"]
    assert "passedequal" in page.text
    assert "failedfast" in page.text


def test_empty_sections_are_left_out():
    full = Page(render_html(REPORT)).headings
    bare = Page(render_html(Report("t", "l", [("a", "b")]))).headings
    assert full == [
        "Checks",
        "The run",
        "Loss",
        "What it writes",
        "What was written to disk",
        "What to try next",
    ]
    assert bare == ["The run"]
