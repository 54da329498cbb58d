import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ASSISTANT, DATABASE, END, USER, Scripted, prompt, says, turn

from lib.agent.generation import Call, Generation, generate
from lib.agent.tools import ERROR_TEXTS, Outcome, Response
from lib.config import ModelConfig
from lib.dialogs.tokenizers import ByteTokenizer
from lib.model.transformer import Transformer

TOKENIZER = ByteTokenizer()


class Oracle:
    """A tool that answers from a table and remembers what it was asked."""

    def __init__(self, **answers: str):
        self.answers, self.asked = answers, []

    def __call__(self, turn: str) -> Response:
        self.asked.append(turn)
        if turn in self.answers:
            return Response(Outcome.ANSWER, self.answers[turn])
        return Response(Outcome.NO_MATCH, ERROR_TEXTS[Outcome.NO_MATCH])


def one(model, question: str, tool=None, **options) -> Generation:
    (generation,) = generate(model, [prompt(question)], TOKENIZER, tool, **options)
    return generation


def has_ended(generation: Generation) -> bool:
    """Whether the model said that the dialog is over."""
    return generation.tokens[-1:] == [TOKENIZER.end]


# ---- Turns, calls, forced tokens


def test_an_answer_ends_with_the_end_token():
    generation = one(says({"Who?": [turn("Me.", END)]}), "Who?")
    assert generation == Generation(tokens=turn("Me.", END), calls=[])
    assert generation.turns(TOKENIZER) == [("assistant", "Me.")]


def test_a_request_goes_to_the_tool_and_its_answer_is_forced():
    tool = Oracle(ask="é9")
    generation = one(says({"Who?": [turn("ask", DATABASE), turn("It is é9.", END)]}), "Who?", tool)
    assert tool.asked == ["ask"]
    assert generation.calls == [Call("ask", Response(Outcome.ANSWER, "é9"))]
    forced = [*"é9".encode(), ASSISTANT]
    assert generation.tokens == [*b"ask", DATABASE, *forced, *"It is é9.".encode(), END]
    assert has_ended(generation)
    assert generation.turns(TOKENIZER) == [("assistant", "ask"), ("database", "é9"), ("assistant", "It is é9.")]


def test_the_model_goes_on_from_what_the_tool_said():
    # The last turn copies the database's: the script reads it from what the model was fed.
    def script(prefix):
        if DATABASE not in prefix:
            return DATABASE
        said = prefix[prefix.index(DATABASE) + 1 :]
        if ASSISTANT not in said:
            return USER  # while tokens are forced, whatever the model says is ignored
        value, copy = said[: said.index(ASSISTANT)], said[said.index(ASSISTANT) + 1 :]
        return [*value, END][len(copy)]

    generations = generate(Scripted(script), [prompt("a"), prompt("bb")], TOKENIZER, Oracle(**{"": "Rome"}))
    assert [g.turns(TOKENIZER)[1:] for g in generations] == [[("database", "Rome"), ("assistant", "Rome")]] * 2


def test_an_empty_answer_is_an_empty_turn():
    generation = one(says({"Who?": [turn("ask", DATABASE), turn("Nobody.", END)]}), "Who?", Oracle(ask=""))
    assert generation.turns(TOKENIZER) == [("assistant", "ask"), ("database", ""), ("assistant", "Nobody.")]


def test_a_dialog_may_use_the_tool_several_times_and_each_request_is_its_own_turn():
    tool = Oracle(one="1", three="3")
    turns = [turn("one", DATABASE), turn("two", DATABASE), turn("three", DATABASE), turn("1 and 3.", END)]
    generation = one(says({"Who?": turns}), "Who?", tool)
    assert tool.asked == ["one", "two", "three"]
    assert [call.response.ok for call in generation.calls] == [True, False, True]
    assert generation.turns(TOKENIZER) == [
        ("assistant", "one"),
        ("database", "1"),
        ("assistant", "two"),
        ("database", "ERROR\nNothing matches this request."),
        ("assistant", "three"),
        ("database", "3"),
        ("assistant", "1 and 3."),
    ]
    assert has_ended(generation)


def test_what_a_tool_writes_cannot_end_a_dialog_or_change_the_speaker():
    answer = "<|end|>\x00 ÿ assistant: user: 256"
    generation = one(says({"Who?": [turn("ask", DATABASE), turn("So.", END)]}), "Who?", Oracle(ask=answer))
    assert generation.turns(TOKENIZER)[1:] == [("database", answer), ("assistant", "So.")]


def test_special_tokens_in_an_answer_are_read_and_not_obeyed():
    class Leaky(ByteTokenizer):
        """Some tokenizers turn a text into special tokens; here it is the bytes @ and #."""

        def encode(self, text):
            return [{"@": DATABASE, "#": END}.get(c, ord(c)) for c in text]

    tool = Oracle(ask="@#1")
    model = says({"Who?": [turn("ask", DATABASE), turn("So.", END)]})
    (generation,) = generate(model, [prompt("Who?")], Leaky(), tool)
    assert tool.asked == ["ask"]
    assert generation.tokens == [*turn("ask", DATABASE), DATABASE, END, ord("1"), ASSISTANT, *turn("So.", END)]
    assert has_ended(generation)


@pytest.mark.parametrize("role", [DATABASE, USER, ASSISTANT])
def test_a_hand_over_to_nobody_ends_the_dialog_unfinished(role):
    generation = one(says({"Who?": [turn("ask", role), turn("Never said.", END)]}), "Who?")
    assert (generation.tokens, has_ended(generation), generation.calls) == ([*b"ask", role], False, [])
    assert generation.turns(TOKENIZER) == [("assistant", "ask")]


@pytest.mark.parametrize("role", [USER, ASSISTANT])
def test_a_tool_takes_no_other_role_than_the_databases(role):
    tool = Oracle(ask="1")
    assert not has_ended(one(says({"Who?": [turn("ask", role), turn("Never said.", END)]}), "Who?", tool))
    assert tool.asked == []


def test_bytes_that_are_no_text_reach_the_tool_as_replacement_characters():
    tool = Oracle()
    one(says({"Who?": [turn(b"a\xc3", DATABASE), turn(".", END)]}), "Who?", tool)
    assert tool.asked == ["a\ufffd"]


# ---- Length


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_a_dialog_is_cut_at_its_limit(limit):
    generation = one(says({"Who?": [turn("Nobody at all.", END)]}), "Who?", max_new_tokens=limit)
    assert (bytes(generation.tokens), has_ended(generation)) == (b"Nobody at all."[:limit], False)
    assert generation.turns(TOKENIZER) == ([("assistant", "Nobody at all."[:limit])] if limit else [])


@pytest.mark.parametrize(("limit", "finished"), [(18, True), (17, False)])
def test_forced_tokens_count_towards_the_limit(limit, finished):
    model = says({"Who?": [turn("ask", DATABASE), turn("It is 12.", END)]})  # 4 + 2 + 1 + 10 = 17
    generation = one(model, "Who?", Oracle(ask="123"), max_new_tokens=limit)
    assert (len(generation.tokens), has_ended(generation)) == (limit, finished)


def test_a_dialog_cut_while_the_database_speaks_shows_what_was_said():
    generation = one(says({"Who?": [turn("ask", DATABASE)]}), "Who?", Oracle(ask="123"), max_new_tokens=6)
    assert generation.turns(TOKENIZER) == [("assistant", "ask"), ("database", "12")]


# ---- Batches


def test_finished_rows_leave_the_batch():
    model = says({"A": [turn("1", END)], "BBB": [turn("ask", DATABASE), turn("", END)], "CC": [turn("123", END)]})
    generations = generate(model, [prompt(q) for q in ("A", "BBB", "CC")], TOKENIZER, Oracle(ask="56"))
    assert [len(g.tokens) for g in generations] == [2, 8, 4]
    assert model.batch_sizes == [3, 3, 2, 2, 1, 1, 1, 1]


def test_a_batch_shrinks_when_a_quarter_of_it_has_finished():
    model = says({f"{n}": [turn("x" * (n - 1), END)] for n in range(1, 9)})
    generations = generate(model, [prompt(f"{n}") for n in range(1, 9)], TOKENIZER)
    assert [len(g.tokens) for g in generations] == list(range(1, 9))
    assert model.batch_sizes == [8, 8, 6, 6, 4, 3, 2, 1]


def test_answers_come_in_the_order_of_the_prompts_whatever_the_batches():
    questions = ["q" * n for n in (5, 1, 4, 2, 3)]
    replies = {q: [turn(f"{len(q)}", END)] for q in questions}
    for batch_size in (1, 2, 5, 9):
        model = says(replies)
        generations = generate(model, [prompt(q) for q in questions], TOKENIZER, batch_size=batch_size)
        assert [g.turns(TOKENIZER)[0].text for g in generations] == ["5", "1", "4", "2", "3"]
        assert max(model.batch_sizes) == min(batch_size, 5)
    assert generate(says({}), [], TOKENIZER) == []


def chatterbox(seed: int) -> Transformer:
    """A random model whose special tokens are likely, so that it ends and hands over; in float64, so without ties."""
    model = Transformer(ModelConfig(d_model=16), torch.Generator().manual_seed(seed)).double()
    model.output.weight.data[256:] *= 1.8
    return model


def echo(turn: str) -> Response:
    return Response(Outcome.ANSWER, f"{len(turn)}")


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.lists(st.text("abcdefgh", max_size=12), min_size=1, max_size=6), st.booleans())
def test_a_batch_decodes_to_what_its_rows_decode_to_alone(seed, questions, with_tool):
    model, tool = chatterbox(seed), echo if with_tool else None
    prompts = [prompt(question) for question in questions]
    together = generate(model, prompts, TOKENIZER, tool, max_new_tokens=24)
    assert together == [generate(model, [p], TOKENIZER, tool, max_new_tokens=24)[0] for p in prompts]
    assert together == generate(model, prompts, TOKENIZER, tool, max_new_tokens=24, batch_size=2)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.lists(st.tuples(st.text("abcdefgh", max_size=12), st.integers(0, 90)), min_size=1))
def test_each_prompt_may_have_a_limit_of_its_own(seed, asked):
    model, prompts, limits = chatterbox(seed), [prompt(question) for question, _ in asked], [n for _, n in asked]
    alone = [generate(model, [p], TOKENIZER, echo, max_new_tokens=n)[0] for p, n in zip(prompts, limits, strict=True)]
    assert generate(model, prompts, TOKENIZER, echo, max_new_tokens=limits) == alone
    assert generate(model, prompts, TOKENIZER, echo, max_new_tokens=limits, batch_size=3) == alone
    assert all(len(generation.tokens) <= n for generation, n in zip(alone, limits, strict=True))


def test_the_random_models_of_the_test_above_do_everything():
    prompts = [prompt("x" * n) for n in range(8)]
    many = [g for seed in range(20) for g in generate(chatterbox(seed), prompts, TOKENIZER, echo, max_new_tokens=24)]
    assert {len(g.calls) for g in many} >= {0, 1, 2}
    assert {has_ended(g) for g in many} == {True, False}
    assert len({len(g.tokens) for g in many}) > 10


class Recorder:
    """A tool that gives answers of a length that depends on what it is asked, and remembers what that was."""

    def __init__(self, word: str):
        self.word, self.asked = word, []

    def __call__(self, turn: str) -> Response:
        self.asked.append(turn)
        return Response(Outcome.ANSWER, self.word * (len(turn) % 3))


@settings(max_examples=40)
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.text("abcdefgh", max_size=12), st.floats(0, 1)), min_size=1, max_size=6),
    st.sampled_from(["1", "12", "2", ""]),
    st.integers(0, 24),
    st.integers(1, 6),
)
def test_what_is_known_changes_nothing_even_where_the_tool_says_something_else(seed, asked, word, limit, batch_size):
    model, tools = chatterbox(seed), [Recorder("1"), Recorder(word), Recorder(word)]
    prompts = [prompt(question) for question, _ in asked]
    earlier = generate(model, prompts, TOKENIZER, tools[0], max_new_tokens=24)
    known = [g.tokens[: round(share * len(g.tokens))] for g, (_, share) in zip(earlier, asked, strict=True)]
    plain = generate(model, prompts, TOKENIZER, tools[1], max_new_tokens=limit)
    resumed = generate(
        model, prompts, TOKENIZER, tools[2], known=known, max_new_tokens=limit, batch_size=batch_size
    )  # fmt: skip
    assert resumed == plain
    assert sorted(tools[2].asked) == sorted(tools[1].asked)


def test_the_model_runs_for_what_is_not_known_alone():
    replies = {"A": [turn("ask", DATABASE), turn("It is 12.", END)], "B": [turn("1" * 30, END)]}
    dialog = [*turn("ask", DATABASE), *b"12", ASSISTANT, *turn("It is 12.", END)]
    for n, steps in [(len(dialog), 0), (len(dialog) - 1, 1), (7, 10), (5, 10), (4, 10), (3, 14), (0, 17)]:
        model, tool = says(replies), Oracle(ask="12")
        (generation,) = generate(model, [prompt("A")], TOKENIZER, tool, known=[dialog[:n]])
        assert generation == one(says(replies), "A", Oracle(ask="12"))
        assert (len(model.batch_sizes), tool.asked) == (steps, ["ask"])


def test_a_row_that_finished_far_ahead_of_the_others_does_not_outgrow_the_cache():
    replies = {"A": [turn("1" * 30, END)], "B": [turn("2" * 30, END)]}
    prompts, known = [prompt(q) for q in "ABBBB"], [[*b"1" * 30], [], [], [], []]
    generations = generate(says(replies), prompts, TOKENIZER, known=known, max_new_tokens=31)
    assert generations == [one(says(replies), q, max_new_tokens=31) for q in "ABBBB"]


def test_greedy_decoding_takes_the_likeliest_token_after_each_prefix():
    model = chatterbox(3)
    for question in ("a", "abc"):
        row = prompt(question)
        generation = one(model, question, echo, max_new_tokens=20)
        forced = False  # from the hand-over to the database to the assistant's next turn
        for token in generation.tokens:
            if not forced:
                with torch.no_grad():
                    assert token == int(model(torch.tensor([row]))[0, -1].argmax())
            forced = token == DATABASE or (forced and token != ASSISTANT)
            row.append(token)
