"""The stream's pieces against the parser of whole texts, cut at every place."""

from hypothesis import given, settings
from hypothesis import strategies as st

from argosy.models.deepseek.encoding import (
    CALLS_END,
    CALLS_START,
    EOS_TOKEN,
    INVOKE_END,
    INVOKE_START,
    PARAMETER_END,
    PARAMETER_START,
)
from argosy.models.deepseek.encoding_parser import parse_completion
from argosy.server.chat_stream import ChatStream

WORDS = st.text(alphabet="ab \n<>/｜", max_size=12)
VALUES = st.one_of(
    WORDS.map(lambda text: f'string="true">{text}'),
    st.sampled_from(["1", "[1, 2]", '{"a": null}']).map('string="false">{}'.format),
)


@st.composite
def completions(draw: st.DrawFn) -> tuple[str, bool]:
    thinking = draw(st.booleans())
    text = (draw(WORDS) + "</think>" if thinking else "") + draw(WORDS)
    num_calls = draw(st.integers(0, 3))
    if num_calls:
        calls = ""
        for _ in range(num_calls):
            names = draw(st.lists(st.sampled_from(["x", "y", "z"]), unique=True, max_size=2))
            parameters = "".join(f'{PARAMETER_START} name="{name}" {draw(VALUES)}{PARAMETER_END}\n' for name in names)
            calls += f'{INVOKE_START} name="f">\n{parameters or chr(10)}{INVOKE_END}\n'
        text += f"\n\n{CALLS_START}\n{calls}{CALLS_END}"
    return text, thinking


@settings(max_examples=300, deadline=None)
@given(completion=completions(), sizes=st.lists(st.integers(1, 9), min_size=1))
def test_pieces_join_to_what_the_parser_reads(completion: tuple[str, bool], sizes: list[int]) -> None:
    text, thinking = completion
    try:
        expected = parse_completion(text + EOS_TOKEN, thinking=thinking)
    except ValueError:
        return
    stream = ChatStream(thinking=thinking, has_tools=True)
    pieces, position = [], 0
    while position < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream.feed(text[position : position + size]))
        position += size
    pieces.append(stream.finish())
    assert "".join(piece.reasoning for piece in pieces) == expected.reasoning_content
    assert "".join(piece.content for piece in pieces) == expected.content
    assert tuple(call for piece in pieces for call in piece.tool_calls) == expected.tool_calls


def test_one_call_is_told_where_calls_are_not_parallel() -> None:
    """Also where one piece brings two, as when a stop string held them back."""
    call = f'{INVOKE_START} name="f">\n\n{INVOKE_END}\n'
    text = f"See.\n\n{CALLS_START}\n{call}{call}{CALLS_END}"
    for size in (1, 7, len(text)):
        stream = ChatStream(thinking=False, has_tools=True, is_parallel=False)
        pieces = [stream.feed(text[i : i + size]) for i in range(0, len(text), size)] + [stream.finish()]
        assert "".join(piece.content for piece in pieces) == "See."
        assert [call.name for piece in pieces for call in piece.tool_calls] == ["f"]


def test_a_broken_block_is_told_as_content() -> None:
    text = f"See.\n\n{CALLS_START}\n{INVOKE_START} nonsense>\n{INVOKE_END}\n{CALLS_END}"
    stream = ChatStream(thinking=False, has_tools=True)
    pieces = [stream.feed(text), stream.finish()]
    assert "".join(piece.content for piece in pieces) == text
    assert not any(piece.tool_calls for piece in pieces)


def test_a_block_that_is_cut_off_is_told_as_content() -> None:
    text = f"See.\n\n{CALLS_START}\n{INVOKE_START} name="
    stream = ChatStream(thinking=False, has_tools=True)
    pieces = [stream.feed(text[:20]), stream.feed(text[20:]), stream.finish()]
    assert "".join(piece.content for piece in pieces) == text


def test_without_tools_markup_is_text() -> None:
    text = f"See.\n\n{CALLS_START}\n"
    stream = ChatStream(thinking=False, has_tools=False)
    assert stream.feed(text).content == text
