"""The configuration object: strict, frozen, with an id that depends on nothing but what differs from the defaults."""

import hashlib
import json
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib import paths
from lib.base import Config, DamagedFile, InputError
from lib.config import ModelConfig, OptimConfig, RunConfig, override, read_config


def _positive(maximum: float = 1e6) -> st.SearchStrategy[float]:
    return st.floats(0, maximum, exclude_min=True, allow_subnormal=False)


@st.composite
def _models(draw) -> dict:
    n_heads, kv_groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return {
        "n_heads": n_heads * kv_groups,
        "n_kv_heads": draw(st.sampled_from([None, n_heads])),
        "d_model": n_heads * kv_groups * 2 * draw(st.integers(1, 16)),
        "n_layers": draw(st.integers(1, 4)),
        "rope": draw(st.sampled_from(["standard", "paper"])),
        "rope_theta": draw(st.floats(1.5, 1e6)),
    }


VALUES = st.fixed_dictionaries(
    {},
    optional={
        "mode": st.sampled_from(["in-weight", "in-tool"]),
        "seed": st.integers(0, 2**63 - 1),
        "facts": st.fixed_dictionaries(
            {"n_people": st.integers(1, 4_000_000)}, optional={"seed": st.integers(0, 9), "alpha": st.floats(0, 1)}
        ),
        "model": _models(),
        "optim": st.fixed_dictionaries(
            {},
            optional={
                "name": st.sampled_from(["adamw", "muon"]),
                "lr": _positive(),
                "weight_decay": st.floats(0, 10),
                "beta1": st.floats(0, 1, exclude_max=True),
                "clip_norm": st.none() | _positive(),
                "warmup_steps": st.integers(0, 100),
            },
        ),
        "training": st.fixed_dictionaries(
            {"steps": st.integers(1, 10**6)}, optional={"dtype": st.sampled_from(["float32", "bfloat16"])}
        ),
        "evaluation": st.fixed_dictionaries(
            {}, optional={"every": st.none() | st.integers(1, 99), "stop_at_recall": st.none() | _positive(1.0)}
        ),
    },
)


@given(VALUES)
def test_a_configuration_survives_being_written_and_read(values):
    config = RunConfig.parse(values)
    assert RunConfig.parse(config.model_dump()) == config
    assert RunConfig.parse(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    assert RunConfig.parse(json.loads(config.canonical_json())) == config


@given(VALUES, VALUES)
def test_ids_are_equal_exactly_if_configurations_are(one, other):
    first, second = RunConfig.parse(one), RunConfig.parse(other)
    assert (first.run_id == second.run_id) == (first == second)


@given(VALUES, st.integers(1, 50))
def test_one_changed_field_changes_the_id_and_changing_it_back_restores_it(values, more):
    config = RunConfig.parse(values)
    changed = override(config, {"training.batch_size": config.training.batch_size + more})
    assert changed.run_id != config.run_id
    assert override(changed, {"training.batch_size": config.training.batch_size}).run_id == config.run_id


def test_the_id_is_the_hash_of_what_differs_from_the_defaults():
    assert RunConfig().canonical_json() == "{}"
    config = RunConfig.parse(
        {"seed": 3, "facts": {"seed": 0, "n_people": 8}, "model": {"d_model": ModelConfig().d_model}}
    )
    assert config.canonical_json() == '{"facts":{"n_people":8},"seed":3}'
    assert config.run_id == hashlib.sha256(b'{"facts":{"n_people":8},"seed":3}').hexdigest()[:12]


def test_a_later_field_at_its_default_changes_no_id():
    class Later(RunConfig):
        a_later_field: int = 7

    values = {"mode": "in-tool", "optim": {"lr": 0.5}}
    assert Later.parse(values).run_id == RunConfig.parse(values).run_id
    assert Later.parse({**values, "a_later_field": 8}).run_id != RunConfig.parse(values).run_id


def nested(depth: int) -> list:
    """A list in a list in a list, and so on."""
    inner: list = []
    for _ in range(depth):
        inner = [inner]
    return inner


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epochs": 3}, ["unknown configuration key 'epochs'", "mode", "training"]),
        ({"training": {"epochs": 3}}, ["unknown configuration key 'training.epochs'", "batch_size"]),
        ({"training": 3}, ["training takes an object", "3"]),
        ({"training": {"steps": "many"}}, ["training.steps", "integer", "'many'"]),
        ({"training": {"steps": 10.0}}, ["training.steps", "integer", "10.0"]),
        ({"training": {"steps": 0}}, ["training.steps", "greater than or equal to 1", "0"]),
        ({"training": {"dtype": "float16"}}, ["training.dtype", "'float32' or 'bfloat16'", "'float16'"]),
        ({"optim": {"lr": math.inf}}, ["optim.lr", "finite", "inf"]),
        ({"facts": {"alpha": 0.5, "csv": "a.csv"}}, ["facts.alpha", "must be 0", "facts.csv"]),
        ({"model": {"d_model": 10, "n_heads": 4}}, ["model.d_model = 10", "n_heads = 4", "multiple of 8"]),
        ({"model": {"n_heads": 4, "n_kv_heads": 3}}, ["model.n_kv_heads = 3", "n_heads = 4", "a divisor"]),
        ({"model": {"vocab_size": 100}}, ["model.vocab_size = 100", "at least 260"]),
        ({"seed": 2**63}, ["seed", "less than", str(2**63)]),
        ([1], ["object with fields", "[1]"]),
        ({"model": {"n_layers": 10**7}}, ["model.n_layers", "less than or equal to 1000", str(10**7)]),
        ({"model": {"d_model": 10**4000}}, ["model.d_model", "below 2^63"]),
        ({"training": {"steps": 2**63}}, ["training.steps", "below 2^63", str(2**63)]),
        ({"facts": {"csv": "a\0b"}}, ["facts.csv", "without NUL"]),
        ({"training": {"files": {"a\0b": 0.5}}}, ["training.files", "without NUL"]),
        (nested(10_000), ["object with fields", "[[["]),
        ({"training": {"files": {"a": nested(10_000)}}}, ["training.files", "number", "[[["]),
    ],
)
def test_what_cannot_be_used_is_one_sentence_that_names_the_field(values, words):
    with pytest.raises(InputError) as caught:
        RunConfig.parse(values)
    message = str(caught.value)
    assert "\n" not in message and "RunConfig" not in message and "pydantic" not in message and len(message) < 500
    for word in words:
        assert word in message


def test_a_group_alone_names_its_fields_the_same_way():
    with pytest.raises(InputError, match=r"^optim\.lr: .* greater than 0, got -1\.0$"):
        OptimConfig(lr=-1.0)


def test_a_configuration_cannot_be_changed():
    config = RunConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValueError, match="frozen"):
        config.model.d_model = 1


def test_an_impossible_default_is_noticed():
    class Broken(Config):
        rate: float = -math.inf

    with pytest.raises(InputError, match="rate"):
        Broken()


@pytest.mark.parametrize(
    ("steps", "n_dialogs", "batch_size", "expected"),
    [(7, 10**6, 64, 7), (None, 8, 64, 600), (None, 256, 64, 600), (None, 25_600, 64, 60_000), (None, 641, 64, 1_503)],
)
def test_without_steps_a_run_makes_150_passes_and_at_least_600_steps(steps, n_dialogs, batch_size, expected):
    training = RunConfig.parse({"training": {"steps": steps, "batch_size": batch_size}}).training
    assert training.total_steps(n_dialogs) == expected


def test_override_replaces_fields_by_dotted_name_and_leaves_the_rest():
    config = RunConfig.parse({"seed": 3, "model": {"d_model": 64, "n_heads": 4}})
    changed = override(config, {"model.d_model": 128, "mode": "in-tool", "evaluation.every": None})
    assert changed == RunConfig.parse(
        {"seed": 3, "mode": "in-tool", "model": {"d_model": 128, "n_heads": 4}, "evaluation": {"every": None}}
    )
    assert config.model.d_model == 64


def test_override_replaces_a_whole_group():
    config = RunConfig.parse({"optim": {"lr": 0.5, "beta1": 0.5}})
    assert override(config, {"optim": {"lr": 0.1}}).optim == OptimConfig(lr=0.1)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("modle.d_model", "unknown configuration key 'modle'"),
        ("model.width", "unknown configuration key 'model.width'"),
        ("mode.x", "unknown configuration key 'mode.x'"),
        ("model.d_model.x", "model.d_model"),
    ],
)
def test_override_refuses_names_that_are_no_field(name, word):
    with pytest.raises(InputError, match=word):
        override(RunConfig(mode="in-tool"), {name: 3})


def test_read_config_reads_what_canonical_json_wrote(tmp_path):
    config = RunConfig.parse({"mode": "in-tool", "optim": {"lr": 1 / 3}})
    path = tmp_path / "config.json"
    path.write_text(config.canonical_json())
    assert read_config(path) == config


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot read", "No such file"]),
        (b'{"seed": 1', ["cannot read the configuration", "a file of JSON"]),
        (b"\xff\xfe", ["cannot read the configuration", "a file of JSON"]),
        (b'{"seeds": 1}', ["unknown configuration key 'seeds'"]),
        (b'{"seed": 1, "seed": 2}', ["cannot read the configuration", "'seed' is there twice"]),
        (b'{"model": {"d_model": 8, "d_model": 16}}', ["'d_model' is there twice"]),
    ],
)
def test_read_config_says_what_is_wrong_with_a_file(tmp_path, content, words):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_config(path)
    for word in words:
        assert word in str(caught.value)


def test_no_default_has_changed_since_there_are_rows():
    """Ids leave defaults out, so a changed default would give the ids of committed rows another meaning."""
    since_2026_11_23 = {
        "mode": "in-weight", "seed": 0,
        "facts": {"n_people": 64, "seed": 0, "alpha": 0.0, "csv": None},
        "model": {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": None, "vocab_size": 260,
                  "rope_theta": 10_000.0, "rope": "standard", "norm_eps": 1e-5},
        "optim": {"name": "muon", "lr": 0.01, "muon_lr": 0.02, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.95,
                  "schedule": "cosine", "warmup_steps": 0, "clip_norm": 1.0},
        "training": {"steps": None, "batch_size": 64, "grad_accumulation": 1, "dtype": "float32",
                     "checkpoint_every": 500, "keep_checkpoints": 2},
        "evaluation": {"every": 100, "questions": 1024, "stop_at_recall": 1.0},
    }  # fmt: skip

    def unchanged(then, now):
        return all(
            unchanged(value, now[name]) if isinstance(value, dict) else now[name] == value
            for name, value in then.items()
        )

    assert unchanged(since_2026_11_23, RunConfig().model_dump())


def test_a_file_whose_name_would_be_stored_as_another_is_refused():
    with pytest.raises(InputError, match=r"training.files: 'utf-8' codec can't encode character '\\udcc3'"):
        RunConfig.parse({"training": {"files": {"d\udcc3.jsonl": 0.5}}})
    config = RunConfig.parse({"facts": {"csv": "p\udcc3.csv"}})
    assert RunConfig.parse(json.loads(json.dumps(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize("fields", [{"tokenizer": "bpe.tiktoken"}, {"training.files": {"more.jsonl": 0.5}}])
def test_the_loss_leaves_out_repeated_values_only_where_they_can_be_found(fields):
    with pytest.raises(InputError, match="training.repeats = False needs tokenizer = bytes, and no training.files"):
        override(RunConfig(), {"mode": "in-tool", "training.repeats": False, **fields})


def test_an_error_reaches_other_processes_as_the_same_sentence():
    error = DamagedFile(paths.ROOT, "cut short")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
