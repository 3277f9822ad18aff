"""The form of every error of ours: one sentence that says what was expected, what was seen, and what to do."""

import re
from contextlib import contextmanager

import pytest

SENTENCE = re.compile(r"(?P<expected>.+?)[,;] got (?P<seen>.+); (?P<what_to_do>.+)[.?]")


def parts(message: str) -> dict[str, str]:
    """The three parts. Fails for a message that lacks one, or is more than one line."""
    found = SENTENCE.fullmatch(message)
    assert found, f"not 'what was expected, got what was seen; what to do.': {message}"
    return found.groupdict()


@contextmanager
def refuses(match: str, kind: type[Exception] = ValueError):
    """`pytest.raises` for a refusal of ours, which has its three parts."""
    with pytest.raises(kind, match=match) as raised:
        yield raised
    parts(str(raised.value))
