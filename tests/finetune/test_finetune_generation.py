"""Answers of many conversations at once are those of each alone, and a tool is really asked."""

import json
import re

import pytest
import torch
from chat_models import FAMILIES, ScriptedModel, random_model, tiny, tokenizer
from hypothesis import example, given
from hypothesis import strategies as st

from lib.agent.server import Find
from lib.agent.tools import Outcome, SqlTool
from lib.dialogs.templates import question, tool_call
from lib.facts.database import write_database
from lib.facts.sampling import sample_people
from lib.finetune import generation
from lib.finetune.conversations import chats, read_call
from lib.finetune.generation import encode_prompts, generate_tokens, reply_all
from lib.finetune.tasks import measure_recall

PEOPLE = sample_people(3)
FACTS = list(PEOPLE.facts())


def _asked(*texts: str) -> list[list[dict]]:
    return [[{"role": "user", "content": text}] for text in texts]


def _greedy(model, prompt: list[int], ends: set[int], max_new_tokens: int) -> list[int]:
    """By the definition: the whole text read again for each token, no cache, no padding."""
    said: list[int] = []
    while len(said) < max_new_tokens and not (said and said[-1] in ends):
        with torch.inference_mode():
            said.append(int(model(torch.tensor([prompt + said])).logits[0, -1].argmax()))
    return said


# ---- Many at a time


@pytest.mark.parametrize("batch_size", [64, 1, 3])
def test_answers_are_those_of_each_prompt_alone(batch_size, monkeypatch):
    monkeypatch.setitem(generation.BATCH, "cpu", batch_size)
    model, texts = random_model(), ["x" * n + "?" for n in (1, 30, 2, 3, 17, 60, 5, 44, 8, 1, 12)]
    ends = {tokenizer().eos_token_id, 101, 102, 103, 104, 105, 106}  # so that some end early
    model.generation_config.eos_token_id = sorted(ends - {tokenizer().eos_token_id})
    prompts = encode_prompts(tokenizer(), _asked(*texts))
    expected = [_greedy(model, prompt, ends, 30) for prompt in prompts]
    assert len({len(said) for said in expected}) > 2 and len(set(map(tuple, expected))) > 5
    assert generate_tokens(model, tokenizer(), prompts, max_new_tokens=30) == expected
    replies = reply_all(model, tokenizer(), _asked(*texts), max_new_tokens=30)
    assert replies == [tokenizer().decode(said, skip_special_tokens=True) for said in expected]


@pytest.mark.parametrize(
    ("family", "shared"), [*((family, 40) for family in FAMILIES), ("Llama", 0), ("Gemma3", 0), ("Llama", 5)]
)
def test_answers_are_those_of_generate(family, shared):
    """Whatever the prompts have in common (one is the beginning of another, two are equal), and whatever is guessed."""
    model = tiny(family, len(tokenizer()), initializer_range=0.5, tie_word_embeddings=False)
    beginning, own = list(range(shared)), torch.arange(60).tolist()
    prompts = [beginning + own[start : start + n] for start, n in ((1, 1), (1, 9), (3, 30), (20, 4), (20, 4), (7, 17))]
    model.generation_config.eos_token_id = ends = list(range(0, len(tokenizer()), 6))
    expected = [
        model.generate(torch.tensor([each]), max_new_tokens=30, do_sample=False)[0, len(each) :].tolist()
        for each in prompts
    ]
    assert len(set(map(len, expected))) > 2
    right, wrong = [said[: -(said[-1] in ends) or None] for said in expected], [7, 8, 9]
    partly, too_long = [said[:n] + wrong for n, said in enumerate(right)], [said + wrong for said in expected]
    for drafts in ((), right, partly, too_long, [wrong, *right[1:-1], []]):
        for n in (1, 30):
            made = generate_tokens(model, tokenizer(), prompts, max_new_tokens=n, drafts=drafts)
            assert made == [said[:n] for said in expected]


def test_batches_are_full_and_order_is_kept():
    model = ScriptedModel(lambda prompt: prompt.split("\n")[1].removesuffix("<|end|>").upper())
    texts = [chr(97 + i % 26) * (i % 7 + 1) for i in range(100)]
    assert reply_all(model, tokenizer(), _asked(*texts), max_new_tokens=20) == [text.upper() for text in texts]
    assert model.batches == [64, 36]
    assert reply_all(model, tokenizer(), [], max_new_tokens=20) == []


class _SmallMemory(ScriptedModel):
    """A device on which a batch of more than `room` fails as on CUDA."""

    def __init__(self, room: int, error: Exception):
        super().__init__(lambda prompt: prompt.split("\n")[1].removesuffix("<|end|>"))
        self.room, self.error = room, error

    def __call__(self, input_ids, **options):
        read = super().__call__(input_ids, **options)
        if len(input_ids) > self.room:
            raise self.error
        return read


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_batches_shrink_where_memory_runs_out():
    model, texts = _SmallMemory(5, OUT_OF_MEMORY), [str(i) for i in range(20)]
    assert reply_all(model, tokenizer(), _asked(*texts), max_new_tokens=9) == texts
    assert model.batches == [20, 10, 5, 5, 5, 5]
    with pytest.raises(torch.OutOfMemoryError):
        reply_all(_SmallMemory(0, OUT_OF_MEMORY), tokenizer(), _asked("x"), max_new_tokens=9)
    with pytest.raises(RuntimeError, match="device-side assert"):  # no matter of memory
        reply_all(_SmallMemory(1, RuntimeError("device-side assert")), tokenizer(), _asked("x", "y"), max_new_tokens=9)


def test_the_models_own_settings_do_not_make_it_less_greedy():
    model, prompts = random_model(1), encode_prompts(tokenizer(), _asked("who?", "and when?"))
    plain = generate_tokens(model, tokenizer(), prompts, max_new_tokens=20)
    own = model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty, own.top_k = True, 5.0, 10.0, 3
    assert generate_tokens(model, tokenizer(), prompts, max_new_tokens=20) == plain
    assert plain == [_greedy(model, prompt, {tokenizer().eos_token_id}, 20) for prompt in prompts]
    assert model.generation_config is own


# ---- With a tool


@pytest.fixture
def database(tmp_path):
    write_database(PEOPLE, tmp_path / "people.sqlite")
    with SqlTool(tmp_path / "people.sqlite") as tool:
        yield tool


def _call(**call) -> str:
    return f"<call>{json.dumps(call)}</call>"


@pytest.mark.parametrize("mode", ["in-tool", "in-tool-text"])
def test_what_the_model_reads_is_what_the_database_says(mode, database):
    seen = []

    def reply(prompt: str) -> str:
        """Asks for what is asked, then repeats the last turn, as its prompt has it."""
        seen.append(prompt)
        *_, (_, text) = re.findall(r"<\|start\|>(\w+)\n(.*?)<\|end\|>", prompt, re.DOTALL)
        for name, attribute, _ in FACTS:
            if text == question(name, attribute):
                if mode == "in-tool-text":
                    return tool_call(name, attribute)
                return _call(name="find", arguments={"attribute": attribute, "name": name})
        return text

    made = measure_recall(ScriptedModel(reply), tokenizer(), FACTS, mode, database, max_new_tokens=99)
    assert made == [(True, True)] * len(FACTS) and database.n_queries == len(FACTS)
    # What it read before it answered is what it would have been trained on.
    rows = list(chats(PEOPLE, mode))
    whole = [encode_prompts(tokenizer(), [row["messages"][:-1]], row.get("tools"))[0] for row in rows]
    assert sorted(seen[len(FACTS) :]) == sorted(map(tokenizer().decode, whole))


NAME, (BORN, *_) = PEOPLE.names[0], PEOPLE.columns["birth_place"]
RIGHT = {"attribute": "birth_place", "name": NAME}
FIRST_TURNS = {
    "a call": ("in-tool", _call(name="find", arguments=RIGHT), Outcome.ANSWER),
    "after some words": ("in-tool", "Let me see. " + _call(name="find", parameters=RIGHT), Outcome.ANSWER),
    "an unknown person": ("in-tool", _call(name="find", arguments=RIGHT | {"name": "No One"}), Outcome.NO_MATCH),
    "an unknown attribute": (
        "in-tool", _call(name="find", arguments=RIGHT | {"attribute": "shoe_size"}), Outcome.UNKNOWN_ATTRIBUTE
    ),
    "another function": ("in-tool", _call(name="search", arguments=RIGHT), Outcome.MALFORMED),
    "a missing argument": ("in-tool", _call(name="find", arguments={"name": NAME}), Outcome.MALFORMED),
    "a number for a name": ("in-tool", _call(name="find", arguments=RIGHT | {"name": 7}), Outcome.MALFORMED),
    "SQL for a name": (
        "in-tool", _call(name="find", arguments=RIGHT | {"name": "x'; DROP TABLE people"}), Outcome.NO_MATCH
    ),
    "no call": ("in-tool", "I do not know.", None),
    "half a call": ("in-tool", '<call>{"name": "find", "arguments": {"attr', None),
    "half a character": ("in-tool", r'<call>{"name": "find", "arguments": {"name": "\ud83d"}}</call>', None),
    "a request where a call is due": ("in-tool", tool_call(NAME, "birth_place"), None),
    "a request": ("in-tool-text", tool_call(NAME, "birth_place"), Outcome.ANSWER),
    "a request with more after it": ("in-tool-text", tool_call(NAME, "birth_place") + "\nSo?", None),
    "a call where a request is due": ("in-tool-text", _call(name="find", arguments=RIGHT), None),
}  # fmt: skip


@pytest.mark.parametrize("case", FIRST_TURNS)
def test_whatever_is_said_first_the_dialog_goes_on_or_ends(case, database):
    mode, first, outcome = FIRST_TURNS[case]
    model = ScriptedModel(lambda prompt: f"In {BORN}." if prompt.count("assistant\n") > 1 else first)
    (made,) = measure_recall(model, tokenizer(), [(NAME, "birth_place", BORN)], mode, database, max_new_tokens=200)
    assert made == (outcome is not None, outcome is Outcome.ANSWER)
    assert len(model.batches) == 1 + (outcome is Outcome.ANSWER)  # after another answer it does not speak again


# ---- Calls


FORMS = {
    "bare": '{"name": "find", "arguments": {"name": "Ann"}}',
    "llama": '{"type": "function", "name": "find", "parameters": {"name": "Ann"}}',
    "tags": '<tool_call>\n{"name": "find", "arguments": {"name": "Ann"}}\n</tool_call>',
    "python tag": '<|python_tag|>{"name": "find", "parameters": {"name": "Ann"}}',
    "a list": '[TOOL_CALLS][{"name": "find", "arguments": {"name": "Ann"}}]',
    "nested": '{"type": "function", "function": {"name": "find", "arguments": {"name": "Ann"}}}',
    "after braces": 'f(x) = {x} {"a": {}} {"name": "find", "arguments": {"name": "Ann"}}',
    "the first of two": '{"name": "find", "arguments": {"name": "Ann"}}{"name": "find", "arguments": {}}',
}


@pytest.mark.parametrize("form", FORMS)
def test_the_common_forms_of_a_call_are_read(form):
    assert read_call(FORMS[form]) == {"name": "find", "arguments": {"name": "Ann"}}


texts = st.text(st.sampled_from('{}[]":,\\u8d \nnamefidrgt') | st.characters(exclude_categories=["Cs"]), max_size=60)


@given(texts)
@example('{"name": "", "arguments": {"x": "\\ud83d"}}')
@example('{"a":' * 5000 + "[" * 5000)
def test_no_text_is_too_odd(text):
    call = read_call(text)
    if call is not None:
        assert isinstance(call["name"], str) and isinstance(call["arguments"], dict)
        json.dumps(call, ensure_ascii=False).encode()


@given(texts.filter(lambda text: "{" not in text), st.text(max_size=9), st.dictionaries(st.text(max_size=9), texts))
def test_whatever_is_called_is_read_back(before, name, arguments):
    said = before + json.dumps({"name": name, "arguments": arguments})
    assert read_call(said) == {"name": name, "arguments": arguments}


def test_the_tool_that_is_offered_has_the_attributes_of_the_database(database):
    offered = []
    options = tokenizer().apply_chat_template

    def spy(*args, tools=None, **rest):
        offered.append(tools)
        return options(*args, tools=tools, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer(), "apply_chat_template", spy)
        for mode in ("in-tool", "in-tool-text"):
            measure_recall(ScriptedModel(lambda _: "-"), tokenizer(), FACTS[:1], mode, database, max_new_tokens=9)
    assert offered == [[Find(PEOPLE.attributes).declaration], None]


@pytest.mark.parametrize("mode", ["in-tool", "in-tool-text"])
def test_no_reply_is_asked_for_where_the_tool_says_something_else_than_is_expected(mode, database):
    name, attribute, value = FACTS[0]
    call = _call(name="find", arguments={"attribute": attribute, "name": name})
    call = call if mode == "in-tool" else tool_call(name, attribute)
    model = ScriptedModel(lambda prompt: f"It is {value}." if prompt.count("assistant\n") > 1 else call)
    facts = [(name, attribute, expected) for expected in (value, "elsewhere", value)]
    made = measure_recall(model, tokenizer(), facts, mode, database, max_new_tokens=200)
    assert made == [(True, True), (True, False), (True, True)] and model.batches == [3, 2]
