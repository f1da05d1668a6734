"""Bytes of text files as text: compression, byte order marks and encodings."""

from __future__ import annotations

import bz2
import codecs
import gzip
import logging
import lzma
import re
from pathlib import Path

logger = logging.getLogger("softprompt_fast")

MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
COMPRESSIONS = ((b"\x1f\x8b", gzip.decompress), (b"BZh", bz2.decompress), (b"\xfd7zXZ\x00", lzma.decompress))
FOREIGN = (
    (b"PK\x03\x04", "a zip archive or a spreadsheet; unpack it, or save the sheet as csv"),
    (b"\xd0\xcf\x11\xe0", "a spreadsheet; save it as csv"),
    (b"PAR1", "a parquet file; name it .parquet"),
    (b"ARROW1", "an Arrow file; save it as parquet"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it"),
    (b"SQLite format 3", "a database; save the rows as csv"),
    (b"%PDF", "a PDF document"),
    (b"<!doctype html", "a web page; download the file itself"),
    (b"<html", "a web page; download the file itself"),
    (b"version https://git-lfs", "a pointer of Git LFS; `git lfs pull` brings the file itself"),
)
"""First bytes of files that are often given another file's name, in lower case where they are text."""
WESTERN = (
    r"\xc0-\xd6\xd8-\xf6\xf8-\xff\u0152\u0153\u0160\u0161\u017d\u017e\u0178"  # letters
    r"\xa0\xa1\xa3\xa7\xa9\xab\xae\xb0\xb4\xb7\xbb\xbf\u20ac"  # signs
    r"\u2013\u2014\u2018\u2019\u201c\u201d\u201e\u2022\u2026\u2122"  # typographic signs
)
"""Characters that Western texts in Windows-1252 have beside ASCII, for a regular expression."""
RUN = 2
"""Most of them in a row: alphabets other than the Latin one make whole words of them."""


def decompressed(data: bytes) -> bytes:
    """The contents of a gz, bz2 or xz file, known by its first bytes; other bytes as they are."""
    for mark, function in COMPRESSIONS:
        if data.startswith(mark):
            return decompressed(function(data))
    return data


def check_contents(data: bytes, name: str) -> None:
    """Refuses files that their first bytes show to be no text.

    Raises:
        ValueError: what the file is, and what to do.
    """
    start = data[:64].lstrip()
    for mark, what in FOREIGN:
        if start.startswith(mark) or start.lower().startswith(mark):
            raise ValueError(f"{name} is {what}")


def read_bytes(path: Path, name: str) -> bytes:
    """A file's contents, unpacked if it is compressed."""
    try:
        return decompressed(path.read_bytes())
    except (OSError, EOFError, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{name} could not be unpacked: {error}") from error


def decode(data: bytes, name: str, encoding: str | None = None) -> str:
    """A file's text, without a byte order mark.

    Args:
        name: of the file, for messages.
        encoding: None: by the byte order mark, else UTF-8 or UTF-16, else Windows-1252 if the bytes are Western text.

    Raises:
        ValueError: bytes that are not of this encoding, with their line, or no encoding is evident.
    """
    if encoding is not None:
        try:
            codecs.lookup(encoding)
            return data.decode(encoding).removeprefix("\ufeff")
        except LookupError as error:
            raise ValueError(f"`encoding` must be an encoding that Python knows, got {encoding!r}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}, line {_line(data, error.start)}: not {encoding} ({error.reason})") from error
    for mark, marked in MARKS:
        if data.startswith(mark):
            return decode(data, name, marked)
    if wide := _utf_16(data):
        return decode(data, name, wide)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        text = _western(data)
        if text is None:
            raise ValueError(
                f"{name}, line {_line(data, error.start)}: not UTF-8 (byte 0x{data[error.start]:02x}); give the file's "
                "`encoding` (--encoding), such as cp1252, cp1251, gb18030 or shift_jis"
            ) from error
    logger.warning("%s is not UTF-8 and is read as Windows-1252 (Latin-1); `encoding` gives another encoding", name)
    return text


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def _utf_16(data: bytes) -> str | None:
    """UTF-16 without a mark: ASCII characters have a zero in every other byte."""
    start = data[:4096]
    if len(start) < 4 or len(data) % 2:
        return None
    even, odd = start[::2].count(0), start[1::2].count(0)
    if max(even, odd) < len(start) / 8 or min(even, odd) > max(even, odd) / 8:
        return None
    return "utf-16-be" if even > odd else "utf-16-le"


def _western(data: bytes) -> str | None:
    """Windows-1252 text; None where there is other evidence: UTF-8 elsewhere in the file, or no Western letters."""
    if re.search(rb"[\xc3-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}", data):
        return None
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return None
    words = rf"[À-ÿ]{{{RUN + 1},}}|(?<![A-Za-zÀ-ÿ])[À-ÿ]{{2,}}(?![A-Za-zÀ-ÿ])"
    if re.search(rf"[^\x00-\x7f{WESTERN}]", text) or re.search(words, text):
        return None
    return text
