"""Names of files and classes in what people read: whatever is in them, they can neither steer a terminal nor forge a
line of a log, and a log's line is not lost because they are no UTF-8."""

import re

__all__ = ["printable"]

# Control characters, line and paragraph separators, marks that turn the direction of writing, and surrogates: those
# are how Python holds the bytes of a file's name that are no UTF-8, and no output takes them.
_UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, lines: bool = False) -> str:
    r"""`text` with what is not to be printed as Python escapes it, ``\x1b``; with `lines`, line feeds and tabs stay."""
    return _UNSAFE.sub(lambda m: m[0] if lines and m[0] in "\n\t" else m[0].encode("unicode_escape").decode(), text)
