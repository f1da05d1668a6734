"""Reads a page: its tags, ids, links, and the texts of its cells."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Reader(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []
        self.used = set(re.findall(r"url\(#([^)]+)\)", page))
        """Ids that the page's figures refer to."""
        self._in_cell = False
        self.feed(page)
        self.used |= {link[1:] for link in self.links if link.startswith("#")}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        self._in_cell = tag == "td"
        if self._in_cell:
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data


def check_alone(page: str) -> Reader:
    """Checks that a page needs no other file and runs no script; returns what was read."""
    reader = Reader(page)
    assert not {"script", "link", "iframe", "img"} & set(reader.tags)
    assert "http" not in page and "@import" not in page and "//" not in page
    assert all(link.startswith("#") for link in reader.links)
    assert len(reader.ids) == len(set(reader.ids)) and reader.used <= set(reader.ids)
    assert "viewport" in page and "prefers-color-scheme: dark" in page
    return reader
