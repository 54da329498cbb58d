"""Conversations for chat models: their form, what they say, and which of their tokens are trained. No hub is asked."""

import importlib
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from vocabularies import train_bpe

import lib.finetune
from lib.agent.server import Find
from lib.agent.tools import SqlTool
from lib.base import InputError
from lib.dialogs.request import format_request, parse_request
from lib.dialogs.templates import Role, dialogs
from lib.facts.database import write_database
from lib.facts.people import People
from lib.facts.sampling import sample_people
from lib.finetune.conversations import chats, people_of
from lib.finetune.tokens import tokenize_chats, trained_parts
from lib.training.loss import IGNORED

MODES = ["in-weight", "in-tool", "in-tool-text"]

#: ChatML with tools, as many models have it. What the assistant generates is marked, for transformers to find it.
CHATML = """
{%- if tools %}{{ '<|start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|end|>\n' }}{% endif %}
{%- for message in messages %}{{ '<|start|>' + message.role + '\n' }}
  {%- if message.role == 'assistant' %}
    {%- generation %}{{ message.content }}
      {%- for call in message.tool_calls %}
        {{- '<call>' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) + '</call>' }}
      {%- endfor %}{{ '<|end|>' }}{% endgeneration %}{{ '\n' }}
  {%- else %}{{ message.content + '<|end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""  # noqa: E501


def _tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(), eos_token="<|end|>", pad_token="<|pad|>", bos_token="<|start|>",
        chat_template=template, clean_up_tokenization_spaces=False,
    )  # fmt: skip


TOKENIZER = _tokenizer()
ANN = People(["Ann Lee"], {"birth_place": ["Peru"]})


def _spans(row: dict) -> list[str]:
    """What is trained, piece by piece, from a row's labels."""
    spans, open_ = [], False
    for label in row["labels"]:
        if label != IGNORED and not open_:
            spans.append([])
        open_ = label != IGNORED
        if open_:
            spans[-1].append(label)
    return [TOKENIZER.decode(span) for span in spans]


# ---- Conversations


def test_conversations_have_the_form_that_chat_templates_know():
    asked, told = "Where was Ann Lee born?", "Ann Lee was born in Peru."
    user, last = {"role": "user", "content": asked}, {"role": "assistant", "content": told}
    assert list(chats(ANN, "in-weight")) == [{"messages": [user, last]}]

    (row,) = chats(ANN, "in-tool")
    (_, call, result, _) = row["messages"]
    assert row["messages"] == [user, call, result, last]
    assert call == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "find00000",
                "type": "function",
                "function": {"name": "find", "arguments": {"attribute": "birth_place", "name": "Ann Lee"}},
            }
        ],
    }
    assert result == {"role": "tool", "tool_call_id": "find00000", "name": "find", "content": "Peru"}
    (tool,) = row["tools"]
    assert tool == Find(ANN.attributes).declaration  # that of `itl serve` and `itl ask`
    assert tool["type"] == "function" and tool["function"]["name"] == "find"
    parameters = tool["function"]["parameters"]
    assert parameters["properties"]["attribute"]["enum"] == ["birth_place"]
    assert parameters["required"] == ["attribute", "name"] == list(parameters["properties"])

    (row,) = chats(ANN, "in-tool-text")
    request = (
        "To answer this question I will make a request to the database:\n```sql\nFIND birth_place FOR Ann Lee\n```"
    )
    middle = [{"role": "assistant", "content": request}, {"role": "user", "content": "Peru"}]
    assert row == {"messages": [user, *middle, last]}


def test_the_facts_are_those_of_the_dialogs_and_a_database_answers_the_calls(tmp_path):
    people = people_of(40)
    write_database(people, tmp_path / "people.sqlite")
    text_of = {mode: [[turn.text for turn in dialog] for dialog in dialogs(people, mode)] for mode in MODES[:2]}
    with SqlTool(tmp_path / "people.sqlite") as ask:
        for row, (asked, _, value, told) in zip(chats(people, "in-tool"), text_of["in-tool"], strict=True):
            question, call, result, answer = row["messages"]
            assert (question["content"], result["content"], answer["content"]) == (asked, value, told)
            arguments = call["tool_calls"][0]["function"]["arguments"]
            assert ask(format_request(**arguments)).text == value
        for row, dialog in zip(chats(people, "in-tool-text"), text_of["in-tool"], strict=True):
            assert [message["content"] for message in row["messages"]] == dialog
            assert ask(dialog[1]).text == dialog[2] and parse_request(dialog[1]) is not None
    rows = [[message["content"] for message in row["messages"]] for row in chats(people, "in-weight")]
    assert rows == text_of["in-weight"]


@pytest.mark.parametrize("n_facts", [500, 10_000])
def test_facts_are_counted_as_the_paper_does_four_a_person(n_facts):
    people = people_of(n_facts, seed=1)
    assert 4 * len(people) == n_facts == sum(1 for _ in chats(people, "in-weight"))
    assert people == sample_people(n_facts // 4, 1)


@pytest.mark.parametrize("n_facts", [0, 501, 4 * 5_000_000])
def test_a_number_of_facts_that_nobody_has_is_refused(n_facts):
    with pytest.raises(InputError, match=rf"n_facts = {n_facts}: .*multiple" if n_facts % 4 else "n_people"):
        people_of(n_facts)


# ---- Labels


def _expected(row: dict) -> list[str]:
    """What the assistant says, turn by turn, stop included, as CHATML writes it."""
    turns = []
    for message in row["messages"]:
        if message["role"] == Role.ASSISTANT:
            calls = [call["function"] for call in message.get("tool_calls", [])]
            said = [f"<call>{json.dumps(call, ensure_ascii=False)}</call>" for call in calls]
            turns.append(message["content"] + "".join(said) + "<|end|>")
    return turns


def _assert_trained(rows: list[dict], max_length: int = 2000) -> None:
    """By the definition, and by the places where transformers sees the template generate."""
    encoded = tokenize_chats(rows, TOKENIZER, max_length)
    assert len(encoded) == len(rows)
    for row, made in zip(rows, encoded, strict=True):
        assert _spans(made) == _expected(row)
        reference = TOKENIZER.apply_chat_template(
            row["messages"], tools=row.get("tools"), return_dict=True, return_assistant_tokens_mask=True
        )
        assert made["input_ids"] == reference["input_ids"]
        trained = zip(made["input_ids"], reference["assistant_masks"], strict=True)
        assert made["labels"] == [token if mask else IGNORED for token, mask in trained]


@pytest.mark.parametrize("mode", MODES)
def test_only_what_the_assistant_says_is_trained_and_its_stop(mode):
    rows = list(chats(people_of(20), mode))
    _assert_trained(rows)
    first = tokenize_chats(rows, TOKENIZER, 2000)[0]
    assert len(_spans(first)) == (1 if mode == "in-weight" else 2)


tricky = st.text(max_size=8) | st.sampled_from(
    ['O\'Neil "Bo"', "<b>&amp;", "李 😀", "{{ name }}", "{% raw %}", "\\n", " "]
)


@given(st.dictionaries(tricky, tricky, min_size=1, max_size=4), st.sampled_from(MODES))
def test_whatever_people_are_called_their_labels_say_it(values, mode):
    people = People(list(values), {"occupation": list(values.values())})
    _assert_trained(list(chats(people, mode)))


def test_no_row_is_cut_or_left_out():
    rows = list(chats(people_of(12), "in-tool"))
    lengths = [len(ids) for ids in tokenize_chats(rows, TOKENIZER, 10_000)["input_ids"]]
    longest = max(range(12), key=lambda i: lengths[i])
    assert [len(ids) for ids in tokenize_chats(rows, TOKENIZER, lengths[longest])["labels"]] == lengths
    with pytest.raises(InputError, match=rf"n {longest + 1} in .*: it has {lengths[longest]} tokens, more"):
        tokenize_chats(rows, TOKENIZER, lengths[longest] - 1)


def test_text_that_would_write_a_special_token_is_refused():
    people = People(["Ann<|end|>Lee"], {"birth_place": ["Peru"]})
    with pytest.raises(InputError, match=r"conversation 1 in .*: .*would write the special token <\|end\|>"):
        tokenize_chats(chats(people, "in-weight"), TOKENIZER, 999)


UNFIT = {
    "no template": (None, "in-weight", "chat_template is not set"),
    "a template that never ends a turn": (
        "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}",
        "in-weight", "no special token ends message 2",
    ),
    "a template without tool calls": (
        CHATML.replace("message.tool_calls", "[]"), "in-tool", "it leaves out 'find'"
    ),
    "a template that passes tool results over": (
        CHATML.replace("for message in messages", "for message in messages if message.role != 'tool'")
        .replace("message.content", "message.content.replace('Peru', '')"), "in-tool", "it leaves out 'Peru'",
    ),
    "a template that knows two roles only": (
        "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}",
        "in-tool", "roles must alternate",
    ),
    "a template that writes earlier turns in another way": (
        CHATML.replace("{{ message.content }}", "{{ ('' if loop.last else 'so: ') + message.content }}"),
        "in-tool-text", "message 2 differently",
    ),
}  # fmt: skip


@pytest.mark.parametrize("problem", UNFIT)
def test_a_template_that_does_not_fit_is_one_sentence(problem):
    template, mode, words = UNFIT[problem]
    with pytest.raises(InputError, match=words) as caught:
        tokenize_chats(chats(ANN, mode), _tokenizer(template), 2000)
    assert str(caught.value).startswith("cannot read conversation 1 in the tokenizer's chat template: ")


def test_a_template_of_two_roles_takes_the_textual_request():
    two_roles = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
        "{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
    )
    rows = list(chats(ANN, "in-tool-text"))
    (made,) = tokenize_chats(rows, _tokenizer(two_roles), 999)
    assert _spans(made) == _expected(rows[0])


@pytest.mark.parametrize("package", ["datasets", "transformers"])
def test_a_library_that_is_not_installed_is_one_sentence(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs the package {package}: pip install -e '\.\[scale\]'"):
        importlib.reload(lib.finetune)


def test_the_parts_of_a_conversation_are_what_is_read_in_order():
    (chat,) = chats(ANN, "in-tool")
    parts = trained_parts(chat, TOKENIZER)
    assert "".join(text for text, _ in parts) == TOKENIZER.apply_chat_template(
        chat["messages"], tools=chat["tools"], tokenize=False
    )
    (row,) = tokenize_chats([chat], TOKENIZER, 10**6)
    assert [text for text, trained in parts if trained] == _spans(row)
