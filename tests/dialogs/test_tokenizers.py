"""Vocabularies from files: every kind passes the same tests, from single texts to a trained model that is talked to."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from vocabularies import N_TEXT, train_bpe, write_ranks, write_tokenizer_json

from lib.agent.generation import generate
from lib.base import InputError
from lib.config import RunConfig, override
from lib.dialogs.files import read_dialogs
from lib.dialogs.templates import Role, Turn, dialogs, in_tool_dialog
from lib.dialogs.tokenizers import load_tokenizer
from lib.dialogs.tokens import encode_dialog, encode_prompt, tokenize, tokenize_people
from lib.experiments import summaries
from lib.experiments.plan import searches
from lib.experiments.sweep import sweep
from lib.facts.people import People
from lib.facts.sampling import sample_people
from lib.model.transformer import Transformer
from lib.training.run import run
from lib.training.saved import load_model, open_conversation, save_model

BPE = train_bpe()
KINDS = ["bytes", "tiktoken", "huggingface", "folder"]
MODES = ["in-weight", "in-tool", "biography"]


@pytest.fixture(scope="session")
def specs(tmp_path_factory) -> dict[str, str]:
    """What `RunConfig.tokenizer` says for every kind."""
    folder = tmp_path_factory.mktemp("vocabularies")
    in_folder = write_tokenizer_json(folder / "folder" / "tokenizer.json", BPE)
    files = write_ranks(folder / "bpe.tiktoken", BPE), write_tokenizer_json(folder / "bpe.json", BPE), in_folder.parent
    return dict(zip(KINDS, ["bytes", *map(str, files)], strict=True))


@pytest.fixture(scope="session")
def loaded(specs) -> dict:
    return {kind: load_tokenizer(spec) for kind, spec in specs.items()}


@pytest.fixture(scope="session", params=["bytes", "tiktoken", "huggingface"])
def tokenizer(request, loaded):
    return loaded[request.param]


# ---- Texts

#: Pieces that tokenizers have opinions about, and all else.
pieces = st.sampled_from(
    [
        "<|end|>",
        "<|endoftext|>",
        "<s>",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "é",
        "e\u0301",
        "李",
        "😀",
        "👩‍🚀",
        "▁",
        "\ufffd",
    ]
    + ["Ann Lee", "'s", "1/2/1953", "```sql\n", "FIND birth_place FOR ", "Ġ", "##", "\x00", "ÿ", "{name}"]
)
texts = st.lists(pieces | st.text(max_size=4), max_size=8).map("".join)
turns = st.builds(Turn, st.sampled_from(Role), texts)


@given(texts)
def test_texts_survive_and_write_no_special_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    special = {*tokenizer.role_ids.values(), tokenizer.end}
    assert len(special) == 4 and not special & set(ids)
    assert all(0 <= token < tokenizer.vocab_size for token in [*special, *ids])


@given(st.lists(turns, min_size=1, max_size=5))
def test_dialogs_can_be_read_off_their_tokens_and_trained_is_what_the_assistant_says(tokenizer, dialog):
    tokens, mask = encode_dialog(dialog, tokenizer)
    roles = {token: role for role, token in tokenizer.role_ids.items()}
    read, trained, speaker, start = [], [], None, 0
    for i, token in enumerate(tokens):
        trained.append(speaker == Role.ASSISTANT)  # of who was speaking before this token, which may end the turn
        if token in roles or token == tokenizer.end:
            if speaker is not None:
                read.append(Turn(speaker, tokenizer.decode(tokens[start:i])))
            speaker, start = roles.get(token), i + 1
    assert (read, trained) == (dialog, mask)
    assert tokens.count(tokenizer.end) == 1 and tokens[-1] == tokenizer.end
    if any(mask):
        (values, of_dataset) = tokenize([dialog], tokenizer)[0]
        assert (values.tolist(), of_dataset.tolist()) == (tokens, mask)


@pytest.mark.parametrize("mode", MODES)
def test_datasets_of_people_and_of_files_hold_the_tokens_of_their_dialogs(tokenizer, mode, tmp_path):
    people = sample_people(7) + People(["Zoë 李"], {a: ["1 <|end|>"] for a in sample_people(1).attributes})
    many = list(dialogs(people, mode))
    (tmp_path / "d.jsonl").write_text("".join(f"{json.dumps(dialog)}\n" for dialog in many))
    from_file, _ = read_dialogs(tmp_path / "d.jsonl", tokenizer)
    for data in (tokenize_people(people, mode, tokenizer), from_file):
        pairs = [(tokens.tolist(), mask.tolist()) for tokens, mask in map(data.__getitem__, range(len(data)))]
        assert pairs == [encode_dialog(dialog, tokenizer) for dialog in many]


def test_special_tokens_are_no_text(tokenizer):
    for token in (*tokenizer.role_ids.values(), tokenizer.end, -1):
        with pytest.raises(ValueError):
            tokenizer.decode([*tokenizer.encode("a"), token])


@given(texts)
def test_two_libraries_make_the_same_tokens_of_one_vocabulary(loaded, text):
    ours = [loaded[kind].encode(text) for kind in ("tiktoken", "huggingface", "folder")]
    assert ours == [BPE.encode(text).ids] * 3


def test_a_learnt_vocabulary_makes_fewer_tokens_than_bytes(loaded):
    people = sample_people(100, seed=1)
    assert {kind: made.vocab_size for kind, made in loaded.items()} == dict.fromkeys(KINDS, N_TEXT + 4) | {"bytes": 260}
    n_tokens = {kind: len(tokenize_people(people, "in-tool", loaded[kind]).values) for kind in ("bytes", "tiktoken")}
    assert n_tokens["tiktoken"] < n_tokens["bytes"] / 2


class Says:
    """A model that says given tokens."""

    def __init__(self, tokens, vocab_size):
        self.tokens, self.vocab_size, self.device = iter(tokens), vocab_size, torch.device("cpu")

    def new_cache(self, *_):
        return None

    def decode(self, *_):
        return torch.nn.functional.one_hot(torch.tensor([next(self.tokens)]), self.vocab_size).float()


def answer(text: str, tokenizer) -> list[Turn]:
    """The turns of a model that says a text."""
    said = [*tokenizer.encode(text), tokenizer.end]
    prompt = encode_prompt([Turn(Role.USER, "Who?")], tokenizer)
    (generation,) = generate(Says(said, tokenizer.vocab_size), [prompt], tokenizer, max_new_tokens=len(said))
    return generation.turns(tokenizer)


# ---- Files


def test_names_tell_tokenizers_by_what_their_files_hold(specs, tmp_path):
    names = {kind: load_tokenizer(spec).name for kind, spec in specs.items()}
    assert names["bytes"] == "bytes"
    assert names["folder"] == names["huggingface"] and len(set(names.values())) == 3
    copy = tmp_path / "copy.tiktoken"
    copy.write_bytes(Path(specs["tiktoken"]).read_bytes())
    assert load_tokenizer(str(copy)).name == names["tiktoken"]
    write_ranks(copy, train_bpe(n_people=20))  # at the same place: nothing of the former is remembered
    other = load_tokenizer(str(copy))
    assert other.name not in names.values()
    assert other.encode("Zoë Petrov") != load_tokenizer(specs["tiktoken"]).encode("Zoë Petrov") or (
        other.encode("painter") != load_tokenizer(specs["tiktoken"]).encode("painter")
    )


def test_what_a_hugging_face_file_asks_for_beside_its_tokens_is_left_out(tmp_path):
    """Truncation, padding, tokens around every text, random merges and special tokens in texts."""
    tokenizer = Tokenizer.from_str(BPE.to_str())
    tokenizer.add_special_tokens(["<s>", "<|endoftext|>"])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", N_TEXT)])
    model = {**json.loads(BPE.to_str())["model"], "dropout": 0.9}
    loaded = load_tokenizer(str(write_tokenizer_json(tmp_path / "t.json", tokenizer, model=model)))
    text = "Where was <|endoftext|> Ann Lee<s> born?"
    assert loaded.encode(text) == BPE.encode(text).ids
    assert loaded.decode([N_TEXT + 1, *loaded.encode("!")]) == "<|endoftext|>!"  # a model may say them
    assert set(loaded.role_ids.values()) == {N_TEXT + 2, N_TEXT + 3, N_TEXT + 4} and loaded.end == N_TEXT + 5


def test_a_tokenizer_like_llama_2_which_turns_blanks_into_marks_is_taken(tmp_path):
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    letters = {letter: 256 + i for i, letter in enumerate("▁abcdefghijklmnopqrstuvwxyz")}
    tokenizer = Tokenizer(models.BPE(bytes_ | letters, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    loaded = load_tokenizer(str(write_tokenizer_json(tmp_path / "t.json", tokenizer)))
    for dialog in dialogs(sample_people(5), "in-tool"):
        for turn in dialog:
            assert loaded.decode(loaded.encode(turn.text)) == turn.text
    assert answer("at 李 é", loaded) == [(Role.ASSISTANT, "at 李 é")]


def _forgetful(path: Path) -> None:
    tokenizer = Tokenizer.from_str(BPE.to_str())
    tokenizer.normalizer = normalizers.Lowercase()
    write_tokenizer_json(path, tokenizer)


def _words(path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"FIND": 0, "[UNK]": 1}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    write_tokenizer_json(path, tokenizer)


def _ranks(change):
    def write(path: Path) -> None:
        path.write_text(change(write_ranks(path, BPE).read_text()))

    return write


BAD = {
    "nothing.tiktoken": (lambda path: None, ["is no tokenizer", "nothing is downloaded", "*.tiktoken"]),
    "empty": (Path.mkdir, ["is no tokenizer", "folder that holds one"]),
    "9" * 5_000 + ".json": (lambda path: None, ["is no tokenizer"]),
    "model.bin": (lambda path: path.write_bytes(b"\x00"), ["is no tokenizer"]),
    "text.tiktoken": (lambda path: path.write_text("Hello, you\n"), ["base64", "rank"]),
    "blank.tiktoken": (lambda path: path.write_text(""), ["256 bytes needs a rank"]),
    "gap.tiktoken": (_ranks(lambda text: text.replace(" 300\n", " 1300\n")), ["ranks count from 0"]),
    "twice.tiktoken": (_ranks(lambda text: text + text.splitlines()[0] + "\n"), ["ranks count from 0"]),
    "no H.tiktoken": (
        _ranks(lambda text: text.replace("SA== ", "SEg= ")), ["256 bytes needs a rank"]
    ),
    "text.json": (lambda path: path.write_text("Hello"), ["cannot read the tokenizer", "line 1"]),
    "binary.json": (lambda path: path.write_bytes(b"{\xff"), ["cannot read the tokenizer", "utf-8"]),
    "lower.json": (_forgetful, ["changes a text", "zoë"]),
    "words.json": (_words, ["changes a text", "[UNK]"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD, ids=lambda name: name[-20:])
def test_what_is_no_tokenizer_is_one_sentence(name, tmp_path):
    write, words = BAD[name]
    write(tmp_path / name)
    config = override(RunConfig(), {"tokenizer": str(tmp_path / name)})
    with pytest.raises(InputError) as caught:
        run(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    for word in [name, *words]:
        assert word in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "package"), [("tiktoken", "tiktoken"), ("huggingface", "tokenizers")])
def test_a_library_that_is_not_installed_is_one_sentence(specs, kind, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs the package {package}: pip install -e '\.\[scale\]'"):
        load_tokenizer(specs[kind])
    assert load_tokenizer("bytes").encode("a") == [97]


# ---- Runs


def _config(spec: str, mode: str = "in-weight", vocab_size: int = N_TEXT + 4, **training) -> RunConfig:
    fields = {"training": {"steps": 5, **training}, "evaluation": {"every": None}, "facts": {"n_people": 2}}
    return RunConfig.parse(
        {"mode": mode, "tokenizer": spec, "model": {"d_model": 8, "vocab_size": vocab_size}, **fields}
    )


@pytest.mark.parametrize("vocab_size", [260, N_TEXT + 5])
def test_a_model_has_as_many_tokens_as_the_tokenizer(specs, vocab_size, tmp_path):
    sentence = f"model.vocab_size = {vocab_size} must be 404: the tokens of .*bpe.tiktoken"
    with pytest.raises(InputError, match=sentence):
        run(_config(specs["tiktoken"], vocab_size=vocab_size), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_learns_facts_in_tokens_from_a_file_and_is_talked_to(specs, tmp_path):
    steps = {"training.steps": 150, "training.batch_size": 8, "optim.name": "muon", "optim.muon_lr": 2e-2}
    config = override(_config(specs["folder"], "in-tool"), {"model.d_model": 32, "optim.lr": 1e-2, **steps})
    row = run(config, tmp_path / "run")
    assert row["recall"] == 1 and row["tokenizer"] == load_tokenizer(specs["folder"]).name
    assert row["n_params"] == 2 * 404 * 32 + 32 * 32**2 + 5 * 32
    with open_conversation(tmp_path / "run") as talk:
        name, attribute, value = next(sample_people(2).facts())
        turns = in_tool_dialog(name, attribute, value)
        assert talk.turns(turns[0].text) == turns


def test_a_run_belongs_to_what_the_tokenizer_file_held(specs, tmp_path):
    file = tmp_path / "bpe.tiktoken"
    before = Path(specs["tiktoken"]).read_bytes()
    file.write_bytes(before)
    config = _config(str(file))
    row = run(config, tmp_path / "run")
    claim = json.loads((tmp_path / "run" / "config.json").read_text())
    assert claim["tokenizer"] == load_tokenizer(str(file)).name
    assert run(config, tmp_path / "run") == row

    write_ranks(file, train_bpe(n_people=20))  # as many tokens, but others
    with pytest.raises(InputError, match="another tokenizer"):
        run(config, tmp_path / "run")
    model, _ = load_model(tmp_path / "run")  # the folder has a copy
    file.unlink()
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        again, saved = load_model(folder)
        assert saved == config and torch.equal(again.embedding.weight, model.embedding.weight)
    with open_conversation(tmp_path / "run") as talk:
        assert talk.tokenizer.name == row["tokenizer"]

    file.write_bytes(before)
    shutil.copytree(tmp_path / "run" / "model", tmp_path / "alone")  # without the copy, and nothing outside is read
    with pytest.raises(InputError, match="is no tokenizer"):
        load_model(tmp_path / "alone")
    write_ranks(tmp_path / "alone" / "tokenizer.tiktoken", train_bpe(n_people=20))
    with pytest.raises(InputError, match="is not what the model in .* was trained with"):
        load_model(tmp_path / "alone")
    (tmp_path / "alone" / "tokenizer.tiktoken").write_bytes(before)
    assert run(config, tmp_path / "run") == row and load_model(tmp_path / "alone")[1] == config


def test_folders_and_weights_from_before_there_was_a_choice_are_of_bytes(tmp_path):
    config = _config("bytes", vocab_size=260)
    row = run(config, tmp_path / "run")
    assert "tokenizer" not in row
    claim = json.loads((tmp_path / "run" / "config.json").read_text())
    assert claim.pop("tokenizer") == "bytes"
    del claim["config"]["tokenizer"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(claim))
    assert run(config, tmp_path / "run") == row
    save_model(Transformer(config.model), tmp_path / "weights", config)
    assert load_model(tmp_path / "weights")[1] == config


def test_bpe_reaches_the_runs_of_a_section(specs, tmp_path, monkeypatch):
    monkeypatch.setenv("ITL_RUNS", str(tmp_path / "runs"))
    file = tmp_path / "bpe.tiktoken"
    file.write_bytes(Path(specs["tiktoken"]).read_bytes())
    plan, of_bytes = searches("05_1", "smoke", str(file)), searches("05_1", "smoke")
    assert [s.base.model.vocab_size for s in plan] == [404] * len(of_bytes)
    back = {"tokenizer": "bytes", "model.vocab_size": 260}
    assert [override(s.base, back) for s in plan] == [s.base for s in of_bytes]

    assert sweep("05_1", "smoke", plan=plan, in_process=True).done_now == 2
    assert len(summaries.bounds_rows("smoke")) == 0
    rows = summaries.bounds_rows("smoke", str(file))
    assert sorted(rows["mode"]) == ["in-tool", "in-weight"]
    assert set(rows.n_params) == {2 * 404 * 4 + 32 * 4**2 + 5 * 4}
    write_ranks(file, train_bpe(n_people=20))  # rows of other tokens do not count, and their folders are not free
    assert len(summaries.bounds_rows("smoke", str(file))) == 0
    report = sweep("05_1", "smoke", plan=plan, in_process=True)
    assert report.done_now == 0 and all("another tokenizer" in reason for reason in report.failed.values())
    assert len(report.failed) == 2


@pytest.mark.parametrize("profile", ["laptop", "paper"])
def test_profiles_that_publish_are_of_bytes(specs, profile):
    with pytest.raises(InputError, match=f"the profile {profile} publishes, so its runs take only 'bytes'"):
        searches("05_1", profile, specs["tiktoken"])
    assert searches("05_1", profile, "bytes") == searches("05_1", profile)
