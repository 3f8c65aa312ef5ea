from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.server.chat.markdown import MarkdownStream, Segment

TEXTS = st.lists(st.text(alphabet="a *`#\n", max_size=6), max_size=12)


def styled(pieces: Sequence[str]) -> list[Segment]:
    """Segments with neighbours of one style joined, and what has no style at its ends left out."""
    stream = MarkdownStream()
    segments = [segment for piece in pieces for segment in stream.feed(piece)]
    joined: list[Segment] = []
    for text, style in [*segments, *stream.finish()]:
        if joined and joined[-1][1] == style:
            joined[-1] = (joined[-1][0] + text, style)
        else:
            joined.append((text, style))
    return joined


@given(TEXTS)
def test_no_character_is_lost_or_added(pieces: list[str]) -> None:
    assert "".join(text for text, _ in styled(pieces)) == "".join(pieces)


@given(TEXTS)
def test_styles_do_not_depend_on_where_the_increments_end(pieces: list[str]) -> None:
    assert styled(pieces) == styled(["".join(pieces)])


@given(st.lists(st.text(alphabet="a *`#\n", min_size=1, max_size=6), max_size=12))
def test_at_most_two_characters_are_held_back(pieces: list[str]) -> None:
    stream = MarkdownStream()
    shown = given_ = 0
    for piece in pieces:
        given_ += len(piece)
        shown += sum(len(text) for text, _ in stream.feed(piece))
        assert given_ - shown <= 2


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("plain", [("plain", "")]),
        ("a **b** c", [("a ", ""), ("**b**", "bold"), (" c", "")]),
        ("run `ls -l`.", [("run ", ""), ("`ls -l`", "cyan"), (".", "")]),
        ("# Title\ntext", [("# Title", "bold"), ("\ntext", "")]),
        ("2 * 3 # no", [("2 * 3 # no", "")]),
        ("`a ** b`", [("`a ** b`", "cyan")]),
        ("**open\nnext", [("**open", "bold"), ("\nnext", "")]),
    ],
)
def test_inline_styles(text: str, segments: list[Segment]) -> None:
    assert styled([text]) == segments


def test_code_fences_go_over_lines() -> None:
    segments = styled(["```py\nx = 2**3  # `no`\n```\nafter"])
    code = "".join(text for text, style in segments if style == "cyan")
    assert code == "```pyx = 2**3  # `no````"
    assert segments[-1] == ("\nafter", "")
