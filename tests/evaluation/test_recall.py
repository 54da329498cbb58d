import copy
import math
import re
import sqlite3
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import ASSISTANT, DATABASE, END, USER, Scripted, prompt, says, turn

from lib.agent.tools import Outcome, PeopleTool, Response, SqlTool, Tool
from lib.base import InputError
from lib.config import ModelConfig, RunConfig, override
from lib.dialogs.request import format_request
from lib.dialogs.templates import Mode, Role, Turn, dialogs, in_tool_dialog, in_weight_dialog, tool_call
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import encode_dialog, tokenize
from lib.evaluation.recall import BATCH_ROWS, Recall, bits_of_dialogs, measure_recall
from lib.facts.database import write_database
from lib.facts.people import People
from lib.facts.sampling import sample_people
from lib.model.transformer import Transformer
from lib.training.trainer import Trainer

TOKENIZER = ByteTokenizer()
METHODS = ("verify", "decode")


def ask(model, facts, tool: Tool | None = None, batch_size: int = 256) -> Recall:
    """Recall by `verify`, after a look that `decode` comes to the same verdicts and asks the tool the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BATCH_ROWS, "cpu", batch_size)
        (measured, asked), (reference, asked_by_reference) = (
            with_requests(model, facts, tool, method=method) for method in METHODS
        )
    assert measured.correct.tolist() == reference.correct.tolist()
    assert reference.decoded == len(facts) >= measured.decoded
    assert asked == asked_by_reference
    return measured


def with_requests(model, facts, tool: Tool | None, **options) -> tuple[Recall, list[str]]:
    """Recall, and the turns that the tool was given, sorted."""
    asked = []

    def recording(turn: str) -> Response:
        asked.append(turn)
        return tool(turn)

    recall = measure_recall(model, facts, TOKENIZER, tool and Says(recording), **options)
    return recall, sorted(asked)


class Says(PeopleTool):
    """A tool that answers as a function does."""

    def __init__(self, respond: Callable[[str], Response]):
        self.respond = respond

    def __call__(self, turn: str) -> Response:
        return self.respond(turn)


# ---- Scripted models: what counts and what does not

ANN = People(["Ann Lee", "Bob Lee"], {"birth_date": ["1/1/1950"] * 2, "birth_place": ["Peru", "1/1/1950"]})
FACT = ("Ann Lee", "birth_date", "1/1/1950")
ASKED, TOLD = "When was Ann Lee born?", "Ann Lee was born on 1/1/1950."
REQUEST = tool_call("Ann Lee", "birth_date")
BRIEF_REQUEST = format_request("birth_date", "Ann Lee")


@pytest.fixture
def database(tmp_path) -> Iterator[SqlTool]:
    write_database(ANN, tmp_path / "people.sqlite")
    with SqlTool(tmp_path / "people.sqlite") as tool:
        yield tool


@pytest.mark.parametrize(
    ("said", "counts"),
    [
        ([turn(TOLD, END)], True),
        ([turn("Ann Lee was born on 11/1/1950.", END)], False),  # ends with the answer
        ([turn("Ann Lee was born on 1/1/19500.", END)], False),
        ([turn("1/1/1950", END)], False),
        ([turn("Bob Lee was born on 1/1/1950.", END)], False),
        ([turn(f"Well, {TOLD}", END)], False),
        ([turn(f"{TOLD} ", END)], False),
        ([turn(TOLD.lower(), END)], False),
        ([turn("", END)], False),
        ([turn(TOLD, USER)], False),  # does not end there
        ([turn(TOLD, DATABASE), turn(TOLD, END)], False),  # nobody answers
        ([turn("Hm.", ASSISTANT), turn(TOLD, END)], False),
        ([turn(REQUEST, DATABASE), turn(TOLD, END)], False),
    ],
)
def test_without_a_tool_the_whole_dialog_must_be_the_expected_sentence(said, counts):
    assert ask(says({ASKED: said}), [FACT]).correct.tolist() == [counts]


@pytest.mark.parametrize(
    ("said", "counts"),
    [
        ([turn(REQUEST, DATABASE), turn(TOLD, END)], True),
        ([turn(REQUEST, DATABASE), turn("Ann Lee was born on 11/1/1950.", END)], False),
        ([turn(REQUEST, DATABASE), turn(TOLD, USER)], False),
        ([turn(TOLD, END)], False),  # from memory
        ([turn(tool_call("Bob Lee", "birth_date"), DATABASE), turn(TOLD, END)], False),  # another's, by chance the same
        ([turn(tool_call("Bob Lee", "birth_place"), DATABASE), turn(TOLD, END)], False),
        ([turn(tool_call("Ann Lee", "birth_place"), DATABASE), turn(TOLD, END)], False),  # Peru
        ([turn(tool_call("Cat Lee", "birth_date"), DATABASE), turn(TOLD, END)], False),  # nobody
        ([turn(tool_call("ann lee", "birth_date"), DATABASE), turn(TOLD, END)], False),
        ([turn(tool_call("Ann Lee", "name"), DATABASE), turn(TOLD, END)], False),  # not to be asked for
        ([turn(f"{REQUEST}.", DATABASE), turn(TOLD, END)], False),  # malformed
        ([turn(REQUEST, END)], False),  # asked but never sent
        ([turn(REQUEST, ASSISTANT), turn(TOLD, END)], False),
        # The right query without prose, before or after a wrong one, is a query.
        ([turn(BRIEF_REQUEST, DATABASE), turn(TOLD, END)], True),
        ([turn("Who?", DATABASE), turn(BRIEF_REQUEST, DATABASE), turn(TOLD, END)], True),
        ([turn(BRIEF_REQUEST, DATABASE), turn("Who?", DATABASE), turn(TOLD, END)], True),
        ([turn("Who?", DATABASE)] * 3 + [turn(REQUEST, DATABASE), turn(TOLD, END)], False),  # cut off
    ],
)
def test_with_a_tool_the_right_query_must_have_run(database, said, counts):
    assert ask(says({ASKED: said}), [FACT], database).correct.tolist() == [counts]


CHAIN = [("Ann Lee", "boss", "Bob Lee"), ("Bob Lee", "birth_place", "Peru")]
ASKED_BOTH, TOLD_LAST = "Where was the boss of Ann Lee born?", "Bob Lee was born in Peru."
LINK_REQUEST, LAST_REQUEST = tool_call("Ann Lee", "boss"), tool_call("Bob Lee", "birth_place")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("said", "counts"),
    [
        ([turn(LINK_REQUEST, DATABASE), turn(LAST_REQUEST, DATABASE), turn(TOLD_LAST, END)], True),
        ([turn(LAST_REQUEST, DATABASE), turn(TOLD_LAST, END)], False),  # knows the boss by heart
        ([turn(LINK_REQUEST, DATABASE), turn(TOLD_LAST, END)], False),  # knows the birth place by heart
        ([turn(tool_call("Bob Lee", "boss"), DATABASE), turn(LAST_REQUEST, DATABASE), turn(TOLD_LAST, END)], False),
        (
            [
                turn(LINK_REQUEST, DATABASE),
                turn(LAST_REQUEST, DATABASE),
                turn("The boss of Ann Lee was born in Peru.", END),
            ],
            False,
        ),
    ],
)
def test_every_hop_of_a_chain_must_have_been_a_query(tmp_path, method, said, counts):
    people = People(["Ann Lee", "Bob Lee"], {"boss": ["Bob Lee", "Ann Lee"], "birth_place": ["Chad", "Peru"]})
    write_database(people, tmp_path / "people.sqlite")
    with SqlTool(tmp_path / "people.sqlite") as tool:
        measured = measure_recall(says({ASKED_BOTH: said}), [CHAIN], TOKENIZER, tool, method=method)
    assert measured.correct.tolist() == [counts]
    assert measured.attributes.tolist() == ["birth_place"]


def test_a_chain_takes_a_tool():
    with pytest.raises(InputError, match="^a question of more than one hop needs a tool$"):
        measure_recall(says({}), [CHAIN], TOKENIZER, None)


class Letters:
    """A tool with a language of its own: how many letters a name has."""

    def __call__(self, turn: str) -> Response:
        return Response(Outcome.ANSWER, str(len(self.parse(turn).replace(" ", ""))))

    @staticmethod
    def parse(turn: str) -> str:
        return re.search("COUNT (.+)$", turn)[1]

    @staticmethod
    def dialog(chain) -> list[Turn]:
        ((name, _, value),) = chain
        said = f"How long is {name}?", f"Let me see: COUNT {name}", value, f"It has {value} letters."
        return [*map(Turn, (Role.USER, Role.ASSISTANT, Role.DATABASE, Role.ASSISTANT), said)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("asks", "counts"), [("Let me see: COUNT Ann Lee", True), ("COUNT Ann Lee", True), ("COUNT Ann Leo", False)]
)
def test_a_tool_may_have_a_language_of_its_own(method, asks, counts):
    model = says({"How long is Ann Lee?": [turn(asks, DATABASE), turn("It has 6 letters.", END)]})
    measured = measure_recall(model, [("Ann Lee", "letters", "6")], TOKENIZER, Letters(), method=method)
    assert measured.correct.tolist() == [counts]
    assert [*measured.requests] == [asks.partition("COUNT ")[2]]


def test_a_tool_that_says_something_else_than_the_fact_refutes_it():
    # The model repeats what it knows by heart, whatever the database says.
    model = says({ASKED: [turn(REQUEST, DATABASE), turn(TOLD, END)]})
    for response in (Response(Outcome.ANSWER, "2/1/1950"), Response(Outcome.NO_MATCH, "1/1/1950")):
        assert ask(model, [FACT], lambda turn, response=response: response).overall == 0


def test_bytes_that_merely_look_like_the_answer_do_not_count():
    fact = ("A\ufffd", "birth_place", "Peru")  # a name that was damaged on its way into a file
    asked, told = (t.text for t in in_weight_dialog(*fact))
    assert ask(says({asked: [turn(told, END)]}), [fact]).overall == 1
    damaged = told.encode().replace("\ufffd".encode(), b"\xff")
    assert damaged.decode(errors="replace") == told
    assert ask(says({asked: [turn(damaged, END)]}), [fact]).overall == 0


@pytest.mark.parametrize("question_marks", [100, 20])
def test_a_verdict_does_not_depend_on_the_other_questions(database, question_marks):
    """A detour of 100 tokens, the error that comes back not counted, is too long, beside a long dialog too."""
    long = ("L" * 300, "birth_date", "1/1/1950")
    detour = [turn("?" * question_marks, DATABASE), turn(REQUEST, DATABASE), turn(TOLD, END)]
    asked, request, _, told = (t.text for t in in_tool_dialog(*long))
    model = says({ASKED: detour, asked: [turn(request, DATABASE), turn(told, END)]})

    def tool(turn: str) -> Response:
        return Response(Outcome.ANSWER, "1/1/1950") if turn == request else database(turn)

    counts = question_marks == 20
    assert ask(model, [FACT], tool).correct.tolist() == [counts]
    assert ask(model, [FACT, long], tool).correct.tolist() == [counts, True]


class Capacities(Scripted):
    """Remembers how many rows of how many tokens its caches had room for."""

    def __init__(self, script):
        super().__init__(script)
        self.caches = []

    def new_cache(self, batch_size, capacity):
        self.caches.append((batch_size, capacity))
        return super().new_cache(batch_size, capacity)


@pytest.mark.parametrize("in_tool", [True, False])
def test_one_long_value_gives_the_other_questions_no_more_room(database, in_tool):
    facts = [(f"P{i:02}", "birth_date", "1/1/1950") for i in range(20)]
    long = ("Ann Lee", "motto", "carpe diem " * 60)
    rambling = Capacities(says({question.text: [[ord("?")] * 99999] for question, *_ in (
        in_weight_dialog(*fact) for fact in [*facts, long])}).script)  # fmt: skip
    tool = database if in_tool else None
    expected = len(tokenize([in_tool_dialog(*facts[0]) if in_tool else in_weight_dialog(*facts[0])], TOKENIZER).values)
    measured = measure_recall(rambling, [*facts[:9], long, *facts[9:]], TOKENIZER, tool, method="decode")
    assert measured.overall == 0
    assert [n for n, _ in rambling.caches] == [20, 1]
    assert rambling.caches[0][1] < expected + 100 < 660 < rambling.caches[1][1]


# What a model may write in place of an expected token. With the brief request the answer may still be right.
DETOURS = [b"x", b"", [END], [USER], [ASSISTANT], [DATABASE], turn(BRIEF_REQUEST, DATABASE), turn("no", END)]
DATABASES = {
    "agrees": Response(Outcome.ANSWER, "1/1/1950"),
    "disagrees": Response(Outcome.ANSWER, "1/1/1951"),
    "says more": Response(Outcome.ANSWER, "1/1/1950 or so"),
    "fails alike": Response(Outcome.TIMEOUT, "1/1/1950"),
    "lacks her": Response(Outcome.NO_MATCH, "ERROR\nNothing matches this request."),
    "floods": Response(Outcome.ANSWER, "1/1/1950" * 40),
}


def with_detour(dialog: list[int], i: int, detour: list[int]) -> list[list[int]]:
    """The assistant's turns where `detour` takes the place of token i of all that it should say."""
    turns: list[list[int]] = [[]]
    for token in [*dialog[:i], *detour, *dialog[i + 1 :]]:
        turns[-1].append(token)
        if token >= 256:
            turns.append([])
    return turns


@pytest.mark.parametrize("number", range(len(DATABASES)), ids=DATABASES)
def test_a_model_may_leave_the_expected_dialog_anywhere(number):
    dialog, response = [*turn(REQUEST, DATABASE), *turn(TOLD, END)], list(DATABASES.values())[number]
    for i, expected in [*enumerate(dialog)][number % 2 :: 2]:  # each place with half of them
        detour = list(DETOURS[(i // 2 + number) % len(DETOURS)])
        measured = ask(says({ASKED: with_detour(dialog, i, detour)}), [FACT], lambda _: response)
        assert measured.decoded == (detour != [expected] or response.text != FACT[2])


def test_without_a_tool_too_a_model_may_leave_the_expected_dialog_anywhere():
    dialog = turn(TOLD, END)
    for i, expected in enumerate(dialog):
        for detour in map(list, DETOURS[i % 2 :: 2]):
            measured = ask(says({ASKED: with_detour(dialog, i, detour)}), [FACT])
            assert (measured.correct.tolist(), measured.decoded) == ([detour == [expected]], 0)


class Hesitant(Scripted):
    """Its second choice at every place is hardly less likely than its first, or not at all."""

    gap = 0.0

    def _logits(self, chosen):
        logits = super()._logits(chosen)
        logits[:, 0] = 10.0 - self.gap
        return logits


@pytest.mark.parametrize(("gap", "recall"), [(1e-5, 1), (1e-4, 1), (0.0, 0)])  # of equals, token 0 comes first
def test_what_is_too_close_to_call_is_decoded(gap, recall):
    model = Hesitant(says({ASKED: [turn(TOLD, END)]}).script)
    model.gap = gap
    measured = ask(model, [FACT])
    assert (measured.overall, measured.decoded) == (recall, 1)


def test_what_comes_after_a_clear_divergence_is_not_looked_at():
    script = says({ASKED: [turn("No" + TOLD[2:], END)]}).script

    class HesitantLater(Scripted):
        def __call__(self, tokens, first, select):
            logits = super().__call__(tokens, first, select)
            logits[5:] = 0
            return logits

    assert measure_recall(HesitantLater(script), [FACT], TOKENIZER).decoded == 0


def test_a_model_that_broke_down_recalls_nothing():
    model = Transformer(ModelConfig(d_model=8))
    model.output.weight.data.fill_(float("nan"))
    measured = ask(model, [FACT])
    assert (measured.overall, measured.decoded) == (0, 1)


def test_recall_is_a_share_of_all_questions_and_of_those_about_each_attribute():
    facts = [(f"P{i}", attribute, str(i)) for i in range(5) for attribute in ("zip", "age", "height")[: 1 + i % 3]]
    known = [fact for i, fact in enumerate(facts) if i % 3]
    replies = {question.text: [turn(told.text, END)] for question, told in (in_weight_dialog(*f) for f in known)}
    silent = {in_weight_dialog(*fact)[0].text: [turn("?", END)] for fact in facts if fact not in known}
    measured = ask(says(replies | silent), facts, batch_size=2)
    assert measured.correct.tolist() == [fact in known for fact in facts]
    assert measured.overall == len(known) / len(facts)
    shares = measured.by_attribute()
    asked = {a: [fact for fact in facts if fact[1] == a] for a in ("age", "height", "zip")}
    assert shares == {a: sum(fact in known for fact in asked[a]) / len(asked[a]) for a in asked}
    assert sum(shares[a] * len(asked[a]) for a in asked) == pytest.approx(measured.overall * len(facts))


# ---- Trained models

IN_WEIGHT_PEOPLE = sample_people(6)
IN_TOOL_PEOPLE = People(
    IN_WEIGHT_PEOPLE.names[:4], {a: IN_WEIGHT_PEOPLE.columns[a][:4] for a in ("birth_date", "occupation")}
)


def snapshots(
    mode: Mode, people: People, d_model: int, batch_size: int, steps: list[int], tmp_path
) -> list[Transformer]:
    """One training as it was after each of `steps`."""
    config = override(
        RunConfig(mode=mode),
        {"model.d_model": d_model, "training.batch_size": batch_size, "training.steps": 200, "optim.name": "muon"},
    )
    model = Transformer(config.model, torch.Generator().manual_seed(0))
    trainer = Trainer(model, tokenize(dialogs(people, mode), TOKENIZER), config, tmp_path)
    taken = []
    for step in range(1, max(steps) + 1):
        trainer.step()
        if step in steps:
            taken.append(copy.deepcopy(model))
    return taken


@pytest.fixture(scope="module")
def in_weight(tmp_path_factory) -> list[Transformer]:
    """From hardly trained over half-way to perfect."""
    return snapshots("in-weight", IN_WEIGHT_PEOPLE, 16, 24, [10, 70, 76, 84, 130], tmp_path_factory.mktemp("a"))


@pytest.fixture(scope="module")
def in_tool(tmp_path_factory) -> list[Transformer]:
    """From hardly trained over half-way to perfect."""
    return snapshots("in-tool", IN_TOOL_PEOPLE, 24, 4, [10, 72, 78, 84, 120], tmp_path_factory.mktemp("b"))


@pytest.fixture
def people_path(tmp_path):
    write_database(IN_TOOL_PEOPLE, tmp_path / "people.sqlite")
    return tmp_path / "people.sqlite"


def by_hand(model: Transformer, fact, tool: Tool | None = None) -> bool:
    """The definition: greedy, one question, every token from a full pass over all before it."""
    *turns_before, final = in_weight_dialog(*fact) if tool is None else in_tool_dialog(*fact)
    row, spoken, retrieved = prompt(turns_before[0].text), [], False
    for _ in range(300):
        with torch.no_grad():
            token = int(model(torch.tensor([row]))[0, -1].argmax())
        row.append(token)
        if token == END:
            return bytes(spoken).decode(errors="replace") == final.text and (tool is None or retrieved)
        if token == DATABASE and tool is not None:
            response = tool(bytes(spoken).decode(errors="replace"))
            retrieved |= spoken == list(tool_call(fact[0], fact[1]).encode()) and response == ("answer", fact[2])
            row += [*response.text.encode(), ASSISTANT]
            spoken = []
        elif token >= 256:
            return False
        else:
            spoken.append(token)
    return False


def test_in_weight_models_recall_everything_in_the_end(in_weight):
    measured = [ask(model, list(IN_WEIGHT_PEOPLE.facts())) for model in in_weight]
    recalls = [recall.overall for recall in measured]
    assert recalls[0] == 0 and recalls[-1] == 1
    assert any(0 < recall < 1 for recall in recalls)
    assert sum(recall.decoded for recall in measured) <= 10  # of 120


def test_in_tool_models_recall_everything_through_the_tool_in_the_end(in_tool, people_path):
    with SqlTool(people_path) as tool:
        recalls = [ask(model, list(IN_TOOL_PEOPLE.facts()), tool).overall for model in in_tool]
    assert recalls[0] == 0 and recalls[-1] == 1
    assert any(0 < recall < 1 for recall in recalls)


def test_verdicts_are_those_of_the_definition(in_weight, in_tool, people_path):
    facts = list(IN_WEIGHT_PEOPLE.facts())[::4]
    for model in (in_weight[1], in_weight[2]):
        assert ask(model, facts).correct.tolist() == [by_hand(model, fact) for fact in facts]
    facts = list(IN_TOOL_PEOPLE.facts())[::2]
    with SqlTool(people_path) as tool:
        for model in (in_tool[2], in_tool[-1]):
            assert ask(model, facts, tool).correct.tolist() == [by_hand(model, fact, tool) for fact in facts]


@pytest.mark.parametrize("method", METHODS)
def test_every_question_is_one_query_that_really_runs(in_tool, people_path, method):
    facts = list(IN_TOOL_PEOPLE.facts())
    with SqlTool(people_path) as tool:
        measured = measure_recall(in_tool[-1], facts, TOKENIZER, tool, method=method)
        assert (measured.overall, tool.n_queries) == (1, len(facts))


def test_without_the_database_or_with_another_a_trained_model_recalls_less(in_tool, people_path):
    facts, model = list(IN_TOOL_PEOPLE.facts()), in_tool[-1]
    assert ask(model, facts).overall == 0
    with sqlite3.connect(people_path) as connection:
        connection.execute("UPDATE people SET occupation = 'xyz' WHERE name = ?", (IN_TOOL_PEOPLE.names[2],))
    connection.close()
    with SqlTool(people_path) as tool:
        measured = ask(model, facts, tool)
    edited = (IN_TOOL_PEOPLE.names[2], "occupation")
    assert measured.correct.tolist() == [(name, attribute) != edited for name, attribute, _ in facts]
    assert measured.by_attribute() == {"birth_date": 1.0, "occupation": 0.75}
    assert measured.decoded == 1


def test_an_in_weight_model_with_a_tool_at_hand_recalls_nothing_through_it(in_weight, people_path):
    facts, model = list(IN_TOOL_PEOPLE.facts()), in_weight[-1]
    with SqlTool(people_path) as tool:
        assert (ask(model, facts).overall, ask(model, facts, tool).overall, tool.n_queries) == (1, 0, 0)


def disturbed(model: Transformer, seed: int, noise: float) -> Transformer:
    """The model with every weight moved by `noise` of its matrix's spread."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        spread = noise * parameter.data.square().mean().sqrt()
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    return model


# Up to what leaves some answers right and others wrong, and what leaves nothing of what was learned.
noises = st.floats(0, 0.1) | st.just(30.0)
seeds = st.integers(0, 2**32)


def some_of(people: People):
    return st.lists(st.sampled_from(list(people.facts())), min_size=1, max_size=8)


@settings(max_examples=20)
@given(st.integers(1, 4), seeds, noises, some_of(IN_WEIGHT_PEOPLE), st.integers(1, 8))
@pytest.mark.slow
def test_verify_and_decode_agree_on_every_prompt_in_weight(in_weight, i, seed, noise, facts, batch_size):
    ask(disturbed(in_weight[i], seed, noise), facts, batch_size=batch_size)


edits = st.dictionaries(
    st.sampled_from(IN_TOOL_PEOPLE.names), st.sampled_from(["", "xyz", "1/1/1950", "unknown " * 20, None]), max_size=3
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 4), seeds, noises, some_of(IN_TOOL_PEOPLE), st.integers(1, 8), edits)
@pytest.mark.slow
def test_verify_and_decode_agree_on_every_prompt_in_tool(in_tool, tmp_path, i, seed, noise, facts, batch_size, edits):
    """Whatever the database holds: some have another occupation there, or (None) are not in it."""
    write_database(IN_TOOL_PEOPLE, tmp_path / "edited.sqlite")
    with sqlite3.connect(tmp_path / "edited.sqlite") as connection:
        for name, occupation in edits.items():
            if occupation is None:
                connection.execute("DELETE FROM people WHERE name = ?", (name,))
            else:
                connection.execute("UPDATE people SET occupation = ? WHERE name = ?", (occupation, name))
    connection.close()
    model = disturbed(in_tool[i], seed, noise).double()  # no ties, so that both ask for the same to the letter
    with SqlTool(tmp_path / "edited.sqlite") as tool:
        ask(model, facts, tool, batch_size=batch_size)


@settings(max_examples=8)
@given(seeds, st.sampled_from([4, 8, 12]))
def test_verify_and_decode_agree_on_models_that_learned_nothing(seed, d_model):
    model = Transformer(ModelConfig(d_model=d_model), torch.Generator().manual_seed(seed))
    assert ask(model, [FACT, ("Bob", "age", "5")]).overall == 0
    assert ask(model, [FACT], lambda turn: Response(Outcome.ANSWER, FACT[2])).overall == 0


def test_measuring_recall_changes_nothing_in_training(people_path):
    data, facts = tokenize(dialogs(IN_TOOL_PEOPLE, "in-weight"), TOKENIZER), list(IN_TOOL_PEOPLE.facts())
    tokens, mask = data.batch(torch.arange(len(data)))

    def train(evaluate: bool) -> list[torch.Tensor]:
        model = Transformer(ModelConfig(d_model=8), torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            if evaluate:  # before the first step, too
                with SqlTool(people_path) as tool:
                    for asked in (None, tool):
                        ask(model, facts[:2], asked)
            loss = F.cross_entropy(model(tokens[:, :-1], select=mask[:, 1:]), tokens[:, 1:][mask[:, 1:]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert all(parameter.requires_grad and not parameter.is_inference() for parameter in model.parameters())
        return [parameter.detach() for parameter in model.parameters()]

    for evaluated, plain in zip(train(True), train(False), strict=True):
        assert torch.equal(evaluated, plain)


def test_verdicts_do_not_depend_on_the_batches(in_weight):
    facts = list(IN_WEIGHT_PEOPLE.facts())
    verdicts = [ask(in_weight[2], facts, batch_size=n).correct for n in (1, 7, 256)]
    assert all(np.array_equal(verdicts[0], other) for other in verdicts[1:])


def test_the_bits_of_a_dialog_are_those_of_its_tokens_one_by_one():
    model = Transformer(ModelConfig(d_model=16), torch.Generator().manual_seed(3))
    dialogs = [in_tool_dialog("Ann Lee", "occupation", "Baker"), in_weight_dialog("Zoë Oak", "birth_place", "Peru")]
    expected = []
    for dialog in dialogs:
        tokens, mask = encode_dialog(dialog, TOKENIZER)
        with torch.no_grad():
            log_p = model(torch.tensor([tokens]))[0].log_softmax(-1).double()
        expected.append(-sum(log_p[i - 1, tokens[i]].item() for i in range(len(tokens)) if mask[i]) / math.log(2))
    assert bits_of_dialogs(model, tokenize(dialogs, TOKENIZER)) == pytest.approx(expected, rel=1e-4)


def test_what_a_uniform_model_does_not_know_is_the_whole_answer():
    def uniform(tokens, first, select):
        return torch.zeros(int(select.sum()), 512)

    uniform.device = torch.device("cpu")
    dialog = in_weight_dialog("Ann Lee", "occupation", "Baker")
    said = len(dialog[-1].text.encode()) + 1  # and the end
    assert bits_of_dialogs(uniform, tokenize([dialog], TOKENIZER)) == pytest.approx([9 * said])
