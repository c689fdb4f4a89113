"""What a browser makes of a report, for the tests."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

_VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Texts below each heading, and what the page refers to; raises where tags do not match.

    Attributes:
        sections: {heading: text} of each h2.
        references: values of src and href.
        tags: number of elements by tag.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections, self.references, self.tags = {"": ""}, [], {}
        self._open, self._heading = [], ""
        self.feed(text)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.references += [value for name, value in attrs if name in ("src", "href")]
        if tag == "h2":
            self._heading = None
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self._open and self._open[-1] in ("style", "title") and "svg" not in self._open:
            return
        if self._heading is None:
            self._heading, self.sections[data] = data, ""
        else:
            self.sections[self._heading] += data + " "


def open_page(path: Path) -> Page:
    """The page as headless Chromium shows it, which must find nothing wrong; without Chromium, as it is written."""
    written = Page(path.read_text(encoding="utf-8"))
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        return written
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([chromium, *flags, path.as_uri()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    shown = Page(done.stdout)
    assert shown.sections.keys() == written.sections.keys()
    return shown
