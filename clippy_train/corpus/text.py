"""The bytes of a file -> text.

UTF-8 comes first, as in the original, which then took the guess of a detector; here are the cases that need no guess:
byte order marks (UTF-8, UTF-16, UTF-32), which are not part of the text, and Western 8-bit text (Windows-1252).
"""

import codecs
import re

from clippy_train.corpus.document import Rejected
from clippy_train.files import LFS_POINTER

# The marks of UTF-32 begin with those of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Binary data has control characters; Cyrillic or Chinese text has long runs of bytes that are not ASCII.
_NOT_WESTERN = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]|[\x80-\xff]{3}")


def decoded(data: bytes) -> str:
    """The text of a file.

    Raises:
        Rejected: the file is a pointer of Git LFS, whose content is elsewhere, or its encoding is unknown.
    """
    if data.startswith(LFS_POINTER):
        raise Rejected("lfs_pointer")
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8-sig")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        if encoding == "utf-8-sig" and not _NOT_WESTERN.search(data):
            return data.decode("windows-1252", errors="replace")
        raise Rejected("not_utf8") from None
