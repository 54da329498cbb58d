"""Which notebooks there are, and what they accept: read from small notebooks, without a kernel."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_runner import write

from lib import paths
from lib.base import InputError
from lib.notebook import catalog


def test_parameters_tells_types(tmp_path):
    text = "a: int = 8  # of a\nb: bool = True\nc: str = 'x'\nd: float = -1"
    found = catalog.parameters(write(tmp_path / "n.ipynb", parameters=text))
    assert found == {"a": "int", "b": "bool", "c": "str", "d": "float"}


def test_notebooks_are_found_by_number_name_or_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    known = [write(tmp_path / f"{name}.ipynb") for name in ("00_start", "05_1_bounds", "05_10_more", "05_1_bounds_2")]
    assert catalog.all_notebooks() == sorted(known)
    assert capsys.readouterr().err == ""
    assert catalog.find("00") == catalog.find("00_start.ipynb") == catalog.find(known[0]) == known[0]
    assert catalog.find("05_1_bounds") == known[1]
    with pytest.raises(InputError, match="^'05_1' is not a notebook: choose one of 05_1_bounds, 05_1_bounds_2$"):
        catalog.find("05_1")
    with pytest.raises(InputError, match="^'7' is not a notebook: choose one of 00_start, 05_10_more, "):
        catalog.find("7")


@pytest.mark.parametrize("kind", ["a copy", "a folder", "a pipe", "a circle of links", "a name that steers a terminal"])
def test_what_is_not_called_like_a_notebook_or_is_no_file_is_passed_over(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    ours = write(tmp_path / "05_1_bounds.ipynb")
    match kind:
        case "a copy":
            for name in ("05_1_bounds-Copy1", "Untitled", "05_1_bounds (1)"):
                write(tmp_path / f"{name}.ipynb")
        case "a folder":
            (tmp_path / "07_x.ipynb").mkdir()
        case "a pipe":
            os.mkfifo(tmp_path / "07_x.ipynb")
        case "a circle of links":
            (tmp_path / "07_x.ipynb").symlink_to("07_x.ipynb")
        case _:
            write(tmp_path / "07_x\x1b[31m.ipynb")
    assert catalog.all_notebooks() == catalog.all_notebooks("paper") == [catalog.find("05_1")] == [ours]
    assert catalog.all_notebooks("scale") == []


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, '{"cells": 5, "metadata": {}, "nbformat": 4}'], ids=len)
def test_a_broken_notebook_is_one_sentence(tmp_path, monkeypatch, content):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    (tmp_path / "07_x.ipynb").write_text(content)
    for read in (catalog.parameters, catalog.read):
        with pytest.raises(InputError, match="cannot read the notebook .*07_x.ipynb: ") as caught:
            read(catalog.find("07"))
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def typed(tmp_path_factory) -> Path:
    """A notebook with a parameter of each type, called like it."""
    lines = ["int: int = 1", "float: float = 1.0", "bool: bool = True", "str: str = ''"]
    return write(tmp_path_factory.mktemp("typed") / "n.ipynb", parameters="\n".join(lines))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(value=st.integers() | st.floats(allow_nan=False) | st.booleans() | st.text())
def test_a_parameter_reads_back_from_what_python_prints(typed, value):
    name = type(value).__name__
    assert catalog.parse_assignments([typed], [f"{name}={value}"]) == {name: value}


@pytest.mark.parametrize("text, name", [("three", "int"), ("1.5", "int"), ("2", "bool"), ("", "float")])
def test_a_parameter_that_cannot_be_read_names_the_type(typed, text, name):
    with pytest.raises(InputError, match=re.escape(f"n: parameter {name} takes {name}, got {text!r}")):
        catalog.parse_assignments([typed], [f"{name}={text}"])


def test_assignments_are_read_by_the_types_the_notebooks_declare(tmp_path):
    source = write(tmp_path / "n.ipynb")
    assert catalog.parse_assignments([source], ["seeds=3", "rate=3", "rate=1e-2"]) == {"seeds": 3, "rate": 0.01}
    text = write(tmp_path / "text.ipynb", parameters='a: str = "x"')
    assert catalog.parse_assignments([text], ["a=b=c"]) == {"a": "b=c"}
    for wrong, message in {
        "seeds": "'seeds' does not set a parameter: write name=value",
        "seeds=many": "n: parameter seeds takes int, got 'many'",
        "sedes=3": "n has no parameter 'sedes': it accepts profile: str, seeds: int, rate: float",
    }.items():
        with pytest.raises(InputError) as caught:
            catalog.parse_assignments([source], [wrong])
        assert str(caught.value) == message
