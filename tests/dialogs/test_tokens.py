"""Tokens, loss masks and datasets against their definition."""

import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.base import InputError
from lib.dialogs.templates import Role, Turn
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import TokenizedDialogs, encode_dialog, encode_prompt, tokenize, tokenize_people
from lib.facts.people import People
from lib.facts.sampling import sample_people

TOKENIZER = ByteTokenizer()
USER, ASSISTANT, DATABASE, END = 256, 257, 258, 259

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


def test_without_repeats_the_last_repetition_of_a_result_is_not_trained():
    dialog = [*SMALL[:3], Turn(Role.ASSISTANT, "Ozzy: Oz.")]
    tokens, mask = encode_dialog(dialog, TOKENIZER, repeats=False)
    assert tokens == encode_dialog(dialog, TOKENIZER)[0]
    untrained = [bytes([t]).decode() for t, trained in zip(tokens[10:-1], mask[10:-1], strict=True) if not trained]
    assert "".join(untrained) == "Oz" and mask[10:19] == [*[True] * 6, False, False, True] and mask[-1]
    for whole in (SMALL, dialog[:2]):  # nothing is repeated: "é." does not hold "Oz"
        assert encode_dialog(whole, TOKENIZER, repeats=False) == encode_dialog(whole, TOKENIZER)


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
    masks = [mask for _, mask in _pairs(data)]
    assert data.n_trained.tolist() == [sum(mask) for mask in masks]
    assert data.first.tolist() == [mask.index(True) for mask in masks]


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


def test_the_biography_of_a_person_without_facts_is_empty():
    assert tokenize_people(People(["A", "B"], {}), "biography", TOKENIZER).values.tolist() == [ASSISTANT, END] * 2


def test_the_dataset_is_never_held_twice_while_it_is_made():
    people = sample_people(10_000)
    tracemalloc.start()
    data = tokenize_people(people, "in-tool", TOKENIZER)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * sum(tensor.nbytes for tensor in (data.values, data.mask, data.offsets))


def test_a_dialog_with_nothing_to_train_on_is_refused():
    with pytest.raises(InputError, match="nothing to train on"):
        tokenize([SMALL, SMALL[:1]], TOKENIZER)


@given(st.lists(dialog_lists, min_size=1, max_size=6), st.none() | st.integers(0, 20), st.data())
def test_a_batch_is_its_rows_padded_on_the_right_to_any_length_and_padding_is_never_trained(many, extra, draw):
    data = tokenize(many, TOKENIZER)
    rows = draw.draw(st.lists(st.integers(0, len(many) - 1), min_size=1, max_size=8))
    lengths = [len(data[row][0]) for row in rows]
    tokens, mask = data.batch(torch.tensor(rows), length=None if extra is None else max(lengths) + extra)
    assert tokens.shape == mask.shape == (len(rows), max(lengths) + (extra or 0))
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        assert torch.equal(tokens[i, :length], data[row][0].long())
        assert torch.equal(mask[i, :length], data[row][1])
        assert not mask[i, length:].any()
        assert ((tokens[i] >= 0) & (tokens[i] < TOKENIZER.vocab_size)).all()


def test_a_batch_of_given_length_is_made_without_looking_at_the_data():
    data, rows = tokenize([SMALL, SMALL], TOKENIZER).to("meta"), torch.tensor([0, 1], device="meta")
    assert [tensor.shape for tensor in data.batch(rows, length=14)] == [(2, 14), (2, 14)]
    with pytest.raises(RuntimeError, match="meta"):  # which has no values
        data.batch(rows)
