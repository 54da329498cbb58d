"""People from CSV files."""

import hashlib
import os
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.agent.tools import SqlTool
from lib.base import InputError
from lib.dialogs.templates import question, tool_call
from lib.facts.csv import read_people_csv, write_people_csv
from lib.facts.database import write_database
from lib.facts.people import People, comparable

_cells = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map(str.strip).filter(
    lambda cell: cell and "```" not in cell
)  # fmt: skip


@given(st.lists(st.tuples(_cells, _cells, _cells), min_size=1, unique_by=lambda row: comparable(row[0])))
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
        ("name,pet\nAnn,cat\nBo\n", "person 2"),
        ('name,pet\n"Ann\nLee",cat\n', "line break"),
        ('name,pet\nAnn,"big\rcat"\n', "line break"),
        ("name,pet\nAnn,a```b\n", "```"),
        ("name,pet\nAnn,a\0b\n", "control character"),
        ("name,first car\nAnn,Fiat\n", "bad column name 'first car'"),
        ("name,\nAnn,Fiat\n", "no attributes"),
        (",name,pet\n7,Ann,cat\n", "bad column name ''"),
        ("name,first car\nAnn,Fiat\n", "rename it first_car"),
        ("name,pet,car\nAnn,cat,Fiat,x,,\n", "person 1"),
        ("Ann,cat\nBo,dog\n", "no column 'name' among Ann, cat: the first line names the columns"),
        ("name;pet,car\nAnn;cat,Fiat\n", "no column 'name' among name;pet, car"),
        ("Name,NAME,pet\nAnn,Bo,cat\n", "same name"),
        ('name,pet\nAnn,"cat" x\nBo,dog\n', "line 2, is there a quote too many"),
        ("name,pet\nAnn," + 200_000 * "x", "field larger than field limit"),
        ('name,pet\nAnn,"cat\n' + 20_000 * "Bo,dog\n", "is there a quote too many"),
        ('name,pet\nAnn,"cat', "cannot read"),
    ],
)
def test_a_bad_csv_file_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "people.csv"
    path.write_text(text, newline="")
    with pytest.raises(InputError, match=message) as caught:
        read_people_csv(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


ANN_AND_BO = People(["Ann Lee", "Bo Ek"], {"pet": ["cat", "dog"], "car": ["Fiat", "Saab"]})
LINES = [["name", "pet", "car"], ["Ann Lee", "cat", "Fiat"], ["Bo Ek", "dog", "Saab"]]


def table(delimiter: str = ",", end: str = "\n", before: str = "", after: str = "") -> str:
    return "".join(f"{before}{delimiter.join(line)}{after}{end}" for line in LINES)


@pytest.mark.parametrize(
    "content",
    [
        table(";"),
        table("\t"),
        table("|"),
        table(";", "\r\n"),
        "\n \n" + table(";"),
        "sep=,\n" + table(),
        '"sep=\t"\n' + table("\t"),
        table(after=",,,") + ",,,,,\n\n , \n,\n",
        table().replace("Bo", ",,\nBo"),
        table().replace("name", "Name"),
        table(before=",").replace("\n,", "\n0,", 1).replace("\n,", "\n1,", 1),
        table(before=",").replace("\n,", "\n0,", 1).replace("\n,", "\n1,", 1).replace(",", "Unnamed: 0,", 1),
        table().encode("utf-16"),
        b"\xfe\xff" + table(";").encode("utf-16-be"),
    ],
)
def test_what_spreadsheets_make_of_a_table_is_read_as_the_same_people(tmp_path, content):
    path = tmp_path / "people.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_people_csv(path) == ANN_AND_BO


@pytest.mark.parametrize("column", ["prénom", "pre\u0301nom", "2020_income", "größe", "имя", "नाम", "名"])
def test_a_column_may_have_letters_and_digits_of_any_script(tmp_path, column):
    """It is one word of a request and a column of SQL: the database is asked for it."""
    (tmp_path / "people.csv").write_text(f"name,{column}\nAnn,cat\n", encoding="utf-8")
    people = read_people_csv(tmp_path / "people.csv")
    (attribute,) = people.attributes
    assert attribute == unicodedata.normalize("NFC", column)
    write_database(people, tmp_path / "people.sqlite")
    with SqlTool(tmp_path / "people.sqlite", people.attributes) as tool:
        assert tool(tool_call("Ann", attribute)).text == "cat"
    assert attribute.replace("_", " ") in question("Ann", attribute)


@pytest.mark.parametrize(
    ("one", "other"),
    [("René", "Rene\u0301"), ("Ann Lee", "Ann\xa0Lee"), ("Ann Lee", "Ann  Lee"), ("Ann\u2009 Lee", "Ann\u3000Lee")],
)
def test_two_people_whose_names_read_the_same_are_one_too_many(tmp_path, one, other):
    path = tmp_path / "people.csv"
    path.write_text(f"name,pet\n{one},cat\nBo,eel\n{other},dog\n", encoding="utf-8")
    with pytest.raises(InputError, match="twice: names must be unique") as caught:
        read_people_csv(path)
    assert all(ascii(name) in str(caught.value) for name in (one, other))
    path.write_text(f"name,pet\nBo,eel\n{other},dog\n", encoding="utf-8")
    assert read_people_csv(path).names == ["Bo", other]  # as it is written: models are trained on it


@pytest.mark.parametrize(
    ("content", "cure"),
    [
        ("name,pet\nRené,cat\n".encode("cp1252"), "a file of CSV UTF-8: "),
        (b"\xff\xfen\0a", "a file of CSV UTF-8: "),
        (b"PK\x03\x04\x14\0\x06\0", "workbook, which the program that made it can save as CSV UTF-8"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "workbook, which the program that made it can save as CSV UTF-8"),
        *(
            (text.encode(code), "UTF-16 without a byte order mark does: save it as CSV UTF-8")
            for text in ("name,pet\nAnn,cat\n", "name,pet\nZoë,Łoś\n")
            for code in ("utf-16-le", "utf-16-be")
        ),
        (b"\x89PNG\r\n\x1a\n", "a file of CSV UTF-8: "),
    ],
)
def test_a_file_of_another_kind_is_told_with_the_cure(tmp_path, content, cure):
    (tmp_path / "people.csv").write_bytes(content)
    with pytest.raises(InputError, match=cure):
        read_people_csv(tmp_path / "people.csv")


@pytest.mark.parametrize("path", ["a\0b", "\ud800", ""])
def test_a_path_that_cannot_be_one_is_one_sentence(path):
    with pytest.raises(InputError, match="cannot read people from"):
        read_people_csv(path)


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/dev/full", "no file"), ("/dev/zero", "no file"), ("pipe", "no file"), ("large", "larger than 256 MB")],
)
def test_people_are_not_read_without_end(tmp_path, monkeypatch, path, reason):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with open("large", "wb") as large:
        large.truncate(1 << 40)  # takes no room
    with pytest.raises(InputError, match=f"^cannot read people from {path}, a file of CSV UTF-8: it is {reason}$"):
        read_people_csv(path)


def test_the_people_of_a_file_keep_their_digest(tmp_path):
    """Runs are known by it. The digest was computed by hand from the bytes that it stands for."""
    path = tmp_path / "people.csv"
    path.write_text("pet,name\ncat,Ann\xa0Lee\ndog,Rene\u0301\n", encoding="utf-8")
    content = "name\tpet\n\nAnn\xa0Lee\nRene\u0301\n\ncat\ndog".encode()
    assert read_people_csv(path).digest() == hashlib.sha256(content).hexdigest()[:16]
