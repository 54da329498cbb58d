import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.base import InputError
from lib.dialogs.batches import Batches, Source
from lib.dialogs.request import Request, parse_request
from lib.dialogs.templates import (
    Role,
    Turn,
    answer,
    biography,
    dialogs,
    in_tool_dialog,
    in_weight_dialog,
    question,
    tool_call,
)
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import TokenizedDialogs, encode_dialog, encode_prompt, join, tokenize, tokenize_people
from lib.facts.people import ATTRIBUTES, People
from lib.facts.sampling import sample_people

TOKENIZER = ByteTokenizer()
USER, ASSISTANT, DATABASE, END = 256, 257, 258, 259


# ---- Text

TEXTS = {
    "birth_date": ("1/2/1953", "When was Ann Lee born?", "Ann Lee was born on 1/2/1953."),
    "birth_place": ("Peru", "Where was Ann Lee born?", "Ann Lee was born in Peru."),
    "occupation": ("actor", "What is Ann Lee's occupation?", "Ann Lee works as an actor."),
    "current_address": ("Rome", "Where does Ann Lee live?", "Ann Lee lives at Rome."),
}


def test_there_is_a_text_for_every_attribute():
    assert set(TEXTS) == set(ATTRIBUTES)


@pytest.mark.parametrize("attribute", TEXTS)
def test_an_in_weight_dialog_is_question_and_answer(attribute):
    value, asked, told = TEXTS[attribute]
    assert in_weight_dialog("Ann Lee", attribute, value) == [("user", asked), ("assistant", told)]


@pytest.mark.parametrize("attribute", TEXTS)
def test_an_in_tool_dialog_asks_the_database_and_repeats_what_it_says(attribute):
    value, asked, told = TEXTS[attribute]
    request = (
        f"To answer this question I will make a request to the database:\n```sql\nFIND {attribute} FOR Ann Lee\n```"
    )
    assert in_tool_dialog("Ann Lee", attribute, value) == [
        ("user", asked),
        ("assistant", request),
        ("database", value),
        ("assistant", told),
    ]


def test_the_attributes_of_a_csv_have_words_of_their_own():
    assert question("Ann Lee", "favorite_color") == "What is the favorite color of Ann Lee?"
    assert answer("Ann Lee", "favorite_color", "blue") == "The favorite color of Ann Lee is blue."
    assert parse_request(tool_call("Ann Lee", "favorite_color")) == Request("favorite_color", "Ann Lee")


def test_a_biography_tells_everything_in_one_turn():
    values = {attribute: value for attribute, (value, _, _) in TEXTS.items()}
    assert biography("Ann Lee", values) == [
        (
            "assistant",
            "Ann Lee was born on 1/2/1953. Ann Lee was born in Peru. Ann Lee works as an actor. Ann Lee lives at Rome.",
        )
    ]


@pytest.mark.parametrize("name", ["{value}", "{0} {name!r}", "Zoë {{x}}", 'O\'Neil "Bo"', "100% {", "\\n"])
def test_braces_and_quotes_in_names_and_values_stay_what_they_are(name):
    assert question(name, "birth_place") == "Where was " + name + " born?"
    assert answer(name, "birth_place", "{name}" + name) == name + " was born in {name}" + name + "."
    assert answer("Ann", name, name) == "The " + name.replace("_", " ") + " of Ann is " + name + "."
    assert tool_call(name, "birth_place").endswith("\nFIND birth_place FOR " + name + "\n```")


def test_people_become_dialogs_person_by_person():
    people = People(["A", "B"], {"birth_place": ["Peru", "Chad"], "height": ["1 m", "2 m"]})
    facts = [("A", "birth_place", "Peru"), ("A", "height", "1 m"), ("B", "birth_place", "Chad"), ("B", "height", "2 m")]
    assert list(dialogs(people, "in-weight")) == [in_weight_dialog(*fact) for fact in facts]
    assert list(dialogs(people, "in-tool")) == [in_tool_dialog(*fact) for fact in facts]
    assert list(dialogs(people, "biography")) == [
        [("assistant", "A was born in Peru. The height of A is 1 m.")],
        [("assistant", "B was born in Chad. The height of B is 2 m.")],
    ]


def test_an_unknown_mode_is_refused():
    with pytest.raises(InputError, match="unknown mode 'in_weight' .* in-weight, in-tool, biography"):
        list(dialogs(sample_people(1), "in_weight"))


# ---- Tokens

# in_tool_dialog("Al", "birth_place", "Oz") cut short: the letters are their ASCII codes.
SMALL = [Turn(Role.USER, "Al?"), Turn(Role.ASSISTANT, "F"), Turn(Role.DATABASE, "Oz"), Turn(Role.ASSISTANT, "é.")]
SMALL_TOKENS = [256, 65, 108, 63, 257, 70, 258, 79, 122, 257, 195, 169, 46, 259]
#               user  A   l   ?  asst  F   db   O   z   asst  é: 2 bytes  .  end
SMALL_MASK_ = "  0    0   0   0    0   1    1   0   0    0    1    1    1    1"
SMALL_MASK = [flag == "1" for flag in SMALL_MASK_.split()]


def test_the_tokens_and_the_loss_mask_are_those_written_by_hand():
    assert encode_dialog(SMALL, TOKENIZER) == (SMALL_TOKENS, SMALL_MASK)
    data = tokenize([SMALL, SMALL], TOKENIZER)
    for tokens, mask in (data[0], data[1]):
        assert (tokens.tolist(), mask.tolist()) == (SMALL_TOKENS, SMALL_MASK)
    assert data.offsets.tolist() == [0, 14, 28]


def test_a_prompt_ends_where_the_assistant_is_to_speak():
    assert encode_prompt(SMALL[:1], TOKENIZER) == SMALL_TOKENS[:5]
    assert encode_prompt(SMALL[:3], TOKENIZER) == SMALL_TOKENS[:10]
    assert encode_prompt([], TOKENIZER) == [ASSISTANT]


def test_a_dialog_that_does_not_end_with_the_assistant_does_not_train_its_end():
    assert encode_dialog(SMALL[:3], TOKENIZER)[1] == [*SMALL_MASK[:9], False]
    assert tokenize([SMALL[:3]], TOKENIZER).mask.tolist() == [*SMALL_MASK[:9], False]


def test_special_tokens_cannot_be_written_nor_read_as_text():
    assert max(TOKENIZER.encode("".join(map(chr, range(0x800))))) < 256
    with pytest.raises(ValueError):
        TOKENIZER.decode([65, END])
    assert TOKENIZER.decode([0xC3, 65]) == "\ufffdA"


texts = st.text(max_size=8) | st.sampled_from(["", "\x00", "ÿ", "\ufffd", "😀", "{name}", "<|end|>"])
turns = st.builds(Turn, st.sampled_from(Role), texts)


def _decode(tokens: list[int]) -> list[Turn]:
    """The turns of a tokenized dialog, read off the definition."""
    roles = {USER: Role.USER, ASSISTANT: Role.ASSISTANT, DATABASE: Role.DATABASE}
    assert tokens[-1] == END
    starts = [i for i, token in enumerate(tokens) if token >= 256]
    return [
        Turn(roles[tokens[start]], bytes(tokens[start + 1 : end]).decode())
        for start, end in zip(starts, starts[1:], strict=False)
    ]


dialog_lists = st.lists(turns, min_size=1, max_size=5).filter(lambda d: any(t.role == Role.ASSISTANT for t in d))


def _pairs(data: TokenizedDialogs) -> list[tuple[list[int], list[bool]]]:
    return [(tokens.tolist(), mask.tolist()) for tokens, mask in map(data.__getitem__, range(len(data)))]


@given(st.lists(dialog_lists, min_size=1, max_size=5))
def test_tokens_and_mask_of_a_dataset_agree_with_the_definition(many):
    data = tokenize(many, TOKENIZER)
    assert _pairs(data) == [encode_dialog(dialog, TOKENIZER) for dialog in many]
    assert data.lengths().tolist() == [len(tokens) for tokens, _ in _pairs(data)]
    for dialog, (tokens, mask) in zip(many, _pairs(data), strict=True):
        assert _decode(tokens) == dialog
        # Trained: what stands in an assistant's turn, and the special token behind it.
        speaker = [max(j for j in range(k) if tokens[j] >= 256) if k else None for k in range(len(tokens))]
        assert mask == [s is not None and tokens[s] == ASSISTANT for s in speaker]


@given(
    st.dictionaries(texts, st.tuples(texts, texts), min_size=1, max_size=4),
    st.sampled_from(["in-weight", "in-tool", "biography"]),
)
def test_facts_survive_tokenizing_whatever_they_hold(values, mode):
    first, second = zip(*values.values(), strict=True)
    people = People(list(values), {"occupation": list(first), "shoe_size": list(second)})
    data = tokenize(dialogs(people, mode), TOKENIZER)
    assert [_decode(tokens) for tokens, _ in _pairs(data)] == list(dialogs(people, mode))


def test_a_large_vocabulary_keeps_its_ids():
    class Words:
        vocab_size, role_ids, end = 200_000, dict(zip(Role, (150_000, 150_001, 150_002), strict=True)), 199_999

        def encode(self, text):
            return [100_000 + len(word) for word in text.split()]

    data = tokenize([[Turn(Role.USER, "a bb"), Turn(Role.ASSISTANT, "ccc")]], Words())
    assert data.values.tolist() == [150_000, 100_001, 100_002, 150_001, 100_003, 199_999]
    assert data.mask.tolist() == [False, False, False, False, True, True]


def test_an_empty_dataset_is_refused():
    with pytest.raises(InputError, match="no dialog"):
        tokenize([], TOKENIZER)
    for nobody in (People([], {}), People([], {"height": []}), People(["Ann Lee"], {})):
        with pytest.raises(InputError, match="no dialog"):
            tokenize_people(nobody, "in-tool", TOKENIZER)


MODES = ["in-weight", "in-tool", "biography"]


def test_the_biography_of_a_person_without_facts_is_empty():
    assert tokenize_people(People(["A", "B"], {}), "biography", TOKENIZER).values.tolist() == [ASSISTANT, END] * 2


def test_people_are_not_tokenized_in_an_unknown_mode():
    with pytest.raises(InputError, match="unknown mode 'in_tool'"):
        tokenize_people(sample_people(1), "in_tool", TOKENIZER)


def test_the_dataset_is_never_held_twice_while_it_is_made():
    people = sample_people(10_000)
    tracemalloc.start()
    data = tokenize_people(people, "in-tool", TOKENIZER)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * sum(tensor.nbytes for tensor in (data.values, data.mask, data.offsets))


# ---- What is trained


@given(st.lists(dialog_lists, min_size=1, max_size=5))
def test_trained_tokens_are_counted_and_the_first_is_found(many):
    data = tokenize(many, TOKENIZER)
    masks = [mask for _, mask in _pairs(data)]
    assert data.n_trained.tolist() == [sum(mask) for mask in masks]
    assert data.first.tolist() == [mask.index(True) for mask in masks]


def test_a_dialog_with_nothing_to_train_on_is_refused():
    with pytest.raises(InputError, match="nothing to train on"):
        tokenize([SMALL, SMALL[:1]], TOKENIZER)


# ---- Batches of tokens


@given(st.lists(dialog_lists, min_size=1, max_size=6), st.data())
def test_a_batch_is_its_rows_padded_on_the_right_and_padding_is_never_trained(many, draw):
    data = tokenize(many, TOKENIZER)
    rows = draw.draw(st.lists(st.integers(0, len(many) - 1), min_size=1, max_size=8))
    tokens, mask = data.batch(torch.tensor(rows))
    lengths = [len(data[row][0]) for row in rows]
    assert tokens.shape == mask.shape == (len(rows), max(lengths))
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        assert torch.equal(tokens[i, :length], data[row][0].long())
        assert torch.equal(mask[i, :length], data[row][1])
        assert not mask[i, length:].any()
        assert ((tokens[i] >= 0) & (tokens[i] < TOKENIZER.vocab_size)).all()


@given(st.lists(dialog_lists, min_size=1, max_size=6), st.integers(0, 20))
def test_a_batch_can_be_padded_to_a_length_of_choice(many, extra):
    data, rows = tokenize(many, TOKENIZER), torch.arange(len(many))
    (tokens, mask), longest = data.batch(rows), int(data.lengths().max())
    longer_tokens, longer_mask = data.batch(rows, length=longest + extra)
    assert longer_tokens.shape == longer_mask.shape == (len(many), longest + extra)
    assert torch.equal(longer_tokens[:, :longest], tokens) and torch.equal(longer_mask[:, :longest], mask)
    assert not longer_mask[:, longest:].any()
    assert ((longer_tokens >= 0) & (longer_tokens < TOKENIZER.vocab_size)).all()


def test_a_batch_of_given_length_is_made_without_looking_at_the_data():
    data, rows = tokenize([SMALL, SMALL], TOKENIZER).to("meta"), torch.tensor([0, 1], device="meta")
    assert [tensor.shape for tensor in data.batch(rows, length=14)] == [(2, 14), (2, 14)]
    with pytest.raises(RuntimeError, match="meta"):  # which has no values
        data.batch(rows)


# ---- The order of training

lengths_lists = st.lists(st.integers(1, 300), min_size=1, max_size=200)


@given(lengths_lists, st.integers(1, 40), st.integers(0, 5), st.integers(0, 3), st.integers(1, 9))
def test_an_epoch_is_a_permutation_cut_into_even_batches(lengths, batch_size, seed, epoch, pool):
    batches = Batches(torch.tensor(lengths), batch_size, seed, pool=pool)
    steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
    cut = [batches[step] for step in steps]
    assert sorted(torch.cat(cut).tolist()) == list(range(len(lengths)))
    sizes = [len(batch) for batch in cut]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert len(cut) == -(-len(lengths) // batch_size)  # as few as there can be


@given(lengths_lists, st.integers(1, 40), st.integers(0, 5), st.lists(st.integers(0, 60), max_size=12))
def test_the_batch_of_a_step_does_not_depend_on_what_was_asked_before(lengths, batch_size, seed, steps):
    batches = Batches(torch.tensor(lengths), batch_size, seed)
    for step in steps:
        assert torch.equal(batches[step], Batches(torch.tensor(lengths), batch_size, seed)[step])


def _epoch(batches: Batches, epoch: int = 0) -> list[list[int]]:
    return [batches[epoch * batches.per_epoch + i].tolist() for i in range(batches.per_epoch)]


def test_seeds_and_epochs_have_orders_of_their_own():
    lengths = torch.arange(256) % 50
    orders = [_epoch(Batches(lengths, 32, seed), epoch) for seed in range(4) for epoch in range(4)]
    assert len({str(order) for order in orders}) == len(orders)
    assert len({str(sorted(map(sorted, order))) for order in orders}) == len(orders)  # and other company in a batch


def test_every_dialog_is_as_likely_to_come_early_as_late():
    lengths = torch.arange(128)
    when = np.zeros((400, 128))
    for epoch, seen in enumerate(when):
        for i, batch in enumerate(_epoch(Batches(lengths, 8, seed=7), epoch)):
            seen[batch] = i
    # The mean of 400 draws from 0..15 has a standard deviation of 4.6 / 20 around 7.5.
    assert abs(when.mean(0) - 7.5).max() < 5 * 4.6 / 20


@pytest.mark.parametrize(("pool", "is_random"), [(1, True), (8, False)])
def test_batches_of_a_pool_of_one_are_random_whatever_the_lengths(pool, is_random):
    """Four kinds of dialogs, of four lengths: the share of a kind in a batch is hypergeometric."""
    lengths = 50 + torch.arange(1024) % 4
    shares = []
    for seed in range(10):
        for batch in _epoch(Batches(lengths, 32, seed, pool=pool)):
            shares.append(float((lengths[torch.tensor(batch)] == 50).double().mean()))
    spread = math.sqrt(0.25 * 0.75 / 32 * (1024 - 32) / 1023)
    assert np.mean(shares) == pytest.approx(0.25)
    assert (abs(np.std(shares) / spread - 1) < 0.15) == is_random


@pytest.mark.parametrize(("mode", "at_most"), [("in-weight", 0.05), ("in-tool", 0.03)])
def test_little_of_a_batch_is_padding(mode, at_most):
    lengths = tokenize(dialogs(sample_people(1000), mode), TOKENIZER).lengths()
    batches = [lengths[rows] for rows in map(torch.tensor, _epoch(Batches(lengths, 128, seed=0)))]
    padded = sum(len(batch) * int(batch.max()) for batch in batches)
    assert 1 - int(lengths.sum()) / padded < at_most


@given(
    st.lists(st.tuples(st.integers(1, 20), st.floats(0.05, 4)), min_size=1, max_size=4),
    st.integers(1, 16),
    st.integers(0, 3),
)
def test_an_epoch_takes_of_every_source_what_its_weight_asks_for(sources, batch_size, epoch):
    sources = [Source(*source) for source in sources]
    lengths = torch.arange(sum(source.n_dialogs for source in sources))
    batches = Batches(lengths, batch_size, 7, sources)
    rows = [row for batch in _epoch(batches, epoch) for row in batch]
    counts = np.bincount(rows, minlength=len(lengths))
    first = sources[0]
    start = 0
    for n_dialogs, weight in sources:
        part = counts[start : start + n_dialogs]
        assert part.max() - part.min() <= 1  # every dialog as often as any other, as nearly as can be
        assert part.sum() == round(first.n_dialogs * weight / first.weight)
        start += n_dialogs
    assert counts[: first.n_dialogs].tolist() == [1] * first.n_dialogs and len(rows) == batches.n_dialogs


def test_one_source_is_the_dataset_itself():
    lengths = torch.arange(50)
    plain, one = Batches(lengths, 8, 3), Batches(lengths, 8, 3, [Source(50, 0.3)])
    assert _epoch(plain, 2) == _epoch(one, 2)


def test_the_random_rest_of_a_source_changes_from_epoch_to_epoch():
    batches = Batches(torch.ones(40), 8, 0, [Source(20, 1.0), Source(20, 0.5)])
    seen = [{row for batch in _epoch(batches, epoch) for row in batch if row >= 20} for epoch in range(10)]
    assert all(len(rows) == 10 for rows in seen) and set.union(*seen) == set(range(20, 40))


def test_datasets_are_joined_one_after_the_other():
    people = sample_people(5)
    parts = [tokenize_people(people, mode, TOKENIZER) for mode in ("in-weight", "biography")]
    whole = join(parts)
    expected = [dialog for part in parts for dialog in map(part.__getitem__, range(len(part)))]
    assert len(whole) == len(expected) == 25
    for i, (values, mask) in enumerate(expected):
        assert torch.equal(whole[i][0], values) and torch.equal(whole[i][1], mask)
