"""Names of files and classes in what people read: whatever is in them, they can neither steer a terminal nor forge a
line of a log, and a log's line is not lost because they are no UTF-8."""

import logging
import re

__all__ = ["make_printable", "printable"]

# Control characters, line and paragraph separators, marks that turn the direction of writing, and surrogates: those
# are how Python holds the bytes of a file's name that are no UTF-8, and no output takes them.
_UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, lines: bool = False) -> str:
    r"""`text` with what is not to be printed as Python escapes it, ``\x1b``; with `lines`, line feeds and tabs stay."""
    return _UNSAFE.sub(lambda m: m[0] if lines and m[0] in "\n\t" else m[0].encode("unicode_escape").decode(), text)


def make_printable(record: logging.LogRecord) -> bool:
    """Filter of a log's handlers. Our records are a line each; Detectron2's may be tables, which it colors."""
    text, own = record.getMessage(), record.name.endswith("d2distill")
    record.msg = printable(text) if own else printable(re.sub(r"\x1b\[[\d;]*m", "", text), lines=True)
    record.args = None
    if record.exc_info:  # a formatter takes the text of the traceback from here
        record.exc_text = printable(logging.Formatter().formatException(record.exc_info), lines=True)
    return True
