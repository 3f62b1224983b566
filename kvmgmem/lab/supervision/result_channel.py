"""What comes over the result channel: records, and whatever a broken guest writes between them."""

import json

RECORD_BEGINS = (b'{"record":', b'{"record" :')


def split_garbage(line: bytes) -> tuple[bytes, bytes]:
    """Part a line into what is garbage and the record behind it, if any.

    A record that was cut has the next one right behind it: the last place where a record begins is where one may be
    whole.
    """
    if line.startswith(RECORD_BEGINS) and _is_json(line):
        return b"", line
    start = max(line.rfind(begin) for begin in RECORD_BEGINS)
    if start < 0:
        return line, b""
    return line[:start], line[start:]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
