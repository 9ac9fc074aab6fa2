"""`LLM.chat`: one conversation, several, and what is none."""

import pytest

import jpd
from tests.faces.tiny import SHAPES

GREEDY = jpd.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
MESSAGE = {"role": "user", "content": "the cat"}
OTHER = {"role": "user", "content": "a bird"}


@pytest.fixture
def chat(built, folder):
    llm = jpd.LLM(str(folder), **SHAPES)
    return lambda messages: llm.chat(messages, GREEDY)


def test_one_conversation_several_or_none(chat):
    (first,), (second,) = chat([MESSAGE]), chat([OTHER])
    assert first.prompt_token_ids != second.prompt_token_ids
    both = chat([[MESSAGE], [OTHER]])
    assert [o.prompt_token_ids for o in both] == [first.prompt_token_ids, second.prompt_token_ids]
    assert [o.outputs[0].token_ids for o in both] == [
        o.outputs[0].token_ids for o in (first, second)
    ]
    assert chat([]) == []


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ("hello", "messages='hello'"),
        (MESSAGE, r"messages=\{'role': 'user'"),
        (None, "messages=None"),
        (7, "messages=7"),
        ([[]], r"messages=\[\]"),
    ],
)
def test_what_is_no_list_of_messages(chat, messages, fault):
    with pytest.raises(
        jpd.RequestError, match=rf'{fault}.* is not allowed: a list of .*"role": \.\.\., "content"'
    ):
        chat(messages)


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (["hello"], r"messages\[0\]='hello'"),
        ([[MESSAGE], ["hello"]], r"messages\[0\]='hello'"),
        ([MESSAGE, [MESSAGE]], r"messages\[1\]=\[\{"),
    ],
)
def test_what_is_no_message(chat, messages, fault):
    with pytest.raises(jpd.RequestError, match=rf'{fault}.* keys "role" and "content"'):
        chat(messages)
