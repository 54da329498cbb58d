"""People from CSV files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.base import InputError
from lib.facts.csv import read_people_csv, write_people_csv
from lib.facts.people import People

_cells = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map(str.strip).filter(
    lambda cell: cell and "```" not in cell
)  # fmt: skip


@given(st.lists(st.tuples(_cells, _cells, _cells), min_size=1, unique_by=lambda row: row[0]))
def test_people_are_read_from_a_csv_as_they_were_written(tmp_path_factory, rows):
    names, pets, towns = map(list, zip(*rows, strict=True))
    people, path = People(names, {"pet": pets, "town": towns}), tmp_path_factory.mktemp("people") / "people.csv"
    write_people_csv(people, path)
    assert read_people_csv(path) == people and read_people_csv(path).digest() == people.digest()


def test_people_come_from_a_csv_file_with_attributes_of_its_own(tmp_path):
    path = tmp_path / "people.csv"
    path.write_text('pet,name,first_car\n cat ,"Lee, Ann","a ""red"" Fiat"\ndog,Søren Æ,Saab\n\n', encoding="utf-8-sig")
    assert read_people_csv(path) == People(
        ["Lee, Ann", "Søren Æ"], {"pet": ["cat", "dog"], "first_car": ['a "red" Fiat', "Saab"]}
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no people"),
        ("name,pet\n", "no people"),
        ("who,pet\nAnn,cat\n", "no column 'name'"),
        ("name\nAnn\n", "no attributes"),
        ("name,pet\nAnn,cat\nAnn,dog\n", "'Ann' twice"),
        ("name,pet\nAnn,\n", "person 1"),
        ("name,pet\nAnn,cat\n  ,dog\n", "person 2"),
        ("name,pet\nAnn,cat\nBo\n", "person 2"),
        ("name,pet\nAnn,cat,dog\n", "person 1"),
        ('name,pet\n"Ann\nLee",cat\n', "line break"),
        ('name,pet\nAnn,"big\rcat"\n', "line break"),
        ("name,pet\nAnn,a```b\n", "```"),
        ("name,pet\nAnn,a\0b\n", "control character"),
        ("name,first car\nAnn,Fiat\n", "bad column name 'first car'"),
        ('name,"x"";--"\nAnn,Fiat\n', "bad column name"),
        ("name,\nAnn,Fiat\n", "bad column name ''"),
        ("name,pet,Pet\nAnn,cat,dog\n", "same name"),
        ('name,pet\nAnn,"cat', "cannot read"),
    ],
)
def test_a_bad_csv_file_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "people.csv"
    path.write_text(text, newline="")
    with pytest.raises(InputError, match=message) as caught:
        read_people_csv(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_csv_file_that_cannot_be_read_is_one_sentence(tmp_path):
    (tmp_path / "latin.csv").write_bytes("name,pet\nSøren,cat\n".encode("latin-1"))
    for path in [tmp_path / "missing.csv", tmp_path, tmp_path / "latin.csv"]:
        with pytest.raises(InputError, match=f"cannot read people from {path}"):
            read_people_csv(path)
