"""Skills of one question and one answer, and strings that nobody has seen.

Knowledge (capitals, opposites, plurals, units), rules (arithmetic, sorting, reversing, counting, instructions),
copying, and small talk.
"""

import random
from collections.abc import Callable
from functools import partial
from string import ascii_letters, ascii_lowercase, ascii_uppercase, digits, punctuation
from typing import NamedTuple

Random = random.Random


class Item(NamedTuple):
    """A question with its answer, and wrong answers of the same kind to choose three from."""

    question: str
    answer: str
    wrong: list[str]


# ---- Strings that nobody has seen

_ONSETS = (
    "b c d f g h j k l m n p r s t v w x z b c d f g h j k l m n p r s t v w y br ch cl cr dr fl fr gl gr kn ll "
    "ph pl qu rr sch sh sk sl sm sn sp ss st str th tr tt wh"
).split()
_NUCLEI = "a e i o u a e i o u y ai au ea ee ei eo ia ie io oa oo ou ue".split()
_CODAS = [
    *[""] * 20,
    *"b ck d f g ght k l ld ll lt m mp n nd ng nk nn ns nt p r rd rk rn rs rt s ss st t th x z".split(),
]
_STREETS = "Street Road Lane Alley Square Way".split()
#: JSON would write the others in another way, or they would begin a special token.
_SYMBOLS = "".join(symbol for symbol in punctuation if symbol not in '"\\<')


def _word(r: Random) -> str:
    if r.random() < 0.3:
        return "".join(r.choices(ascii_lowercase, k=r.randint(1, 9)))
    return "".join(r.choice(_ONSETS) + r.choice(_NUCLEI) for _ in range(r.randint(1, 3))) + r.choice(_CODAS)


def _title(r: Random) -> str:
    return _word(r).capitalize()


def _full_name(r: Random) -> str:
    middle = f"{r.choice(ascii_uppercase)}. " if r.random() < 0.15 else ""
    return f"{_title(r)} {middle}{_title(r)}"


def _number(r: Random) -> str:
    return str(r.randrange(10 ** r.randint(1, 4)))


def _code(r: Random) -> str:
    alphabets = (digits, digits, ascii_uppercase, ascii_letters + digits)
    parts = ["".join(r.choices(r.choice(alphabets), k=r.randint(1, 4))) for _ in range(r.randint(1, 3))]
    return r.choice("-/.:_ ").join(parts)


def _any_characters(r: Random) -> str:
    return "".join(r.choices(ascii_letters + digits + _SYMBOLS, k=r.randint(2, 10)))


def _few_characters(r: Random) -> str:
    """Hard to copy, for what comes next is not decided by the character before."""
    return "".join(r.choices(r.sample(ascii_letters + digits + _SYMBOLS, 3), k=r.randint(4, 8)))


def _words(of: Callable[[Random], str], r: Random) -> str:
    return " ".join(of(r) for _ in range(r.randint(2, 3)))


def _address(r: Random) -> str:
    return f"{_number(r)} {_title(r)} {r.choice(_STREETS)}"


def _accented(r: Random) -> str:
    return _word(r) + r.choice("äåçéíñøößüŁ李") + _word(r)


_KINDS = {
    _word: 3, _title: 3, _full_name: 6, _number: 2, _code: 3, partial(_words, _word): 2, partial(_words, _title): 2,
    _address: 1, _any_characters: 2, _few_characters: 2, _accented: 1,
}  # fmt: skip


def random_string(r: Random) -> str:
    """A word, name, number, code, address, or any characters: hardly ever the same twice."""
    return r.choices(list(_KINDS), list(_KINDS.values()))[0](r)


# ---- Skills of one question and one answer


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in text.split())


_CAPITALS = _pairs(
    "Albania:Tirana Armenia:Yerevan Australia:Canberra Bahamas:Nassau Bahrain:Manama Barbados:Bridgetown "
    "Belize:Belmopan Bhutan:Thimphu Botswana:Gaborone Burundi:Gitega Chad:Ndjamena Cyprus:Nicosia Dominica:Roseau "
    "Eritrea:Asmara Fiji:Suva Gabon:Libreville Gambia:Banjul Guinea:Conakry Guyana:Georgetown Kazakhstan:Astana "
    "Kyrgyzstan:Bishkek Laos:Vientiane Lesotho:Maseru Liberia:Monrovia Libya:Tripoli Liechtenstein:Vaduz "
    "Macedonia:Skopje Madagascar:Antananarivo Malta:Valletta Mauritania:Nouakchott Moldova:Chisinau "
    "Mongolia:Ulaanbaatar Montenegro:Podgorica Morocco:Rabat Mozambique:Maputo Namibia:Windhoek Nicaragua:Managua "
    "Niger:Niamey Oman:Muscat Pakistan:Islamabad Samoa:Apia Somalia:Mogadishu Sudan:Khartoum Switzerland:Bern "
    "Tanzania:Dodoma Uzbekistan:Tashkent"
)
_OPPOSITES = _pairs(
    "big:small hot:cold fast:slow old:young early:late high:low light:dark hard:soft wet:dry full:empty open:closed "
    "happy:sad rich:poor strong:weak loud:quiet clean:dirty heavy:airy deep:shallow wide:narrow thick:thin near:far "
    "up:down left:right inside:outside before:after always:never first:last win:lose give:take buy:sell push:pull "
    "remember:forget begin:end love:hate question:answer day:night summer:winter north:south east:west brave:afraid"
)
_PLURALS = _pairs(
    "cat:cats dog:dogs tree:trees house:houses box:boxes wish:wishes city:cities baby:babies leaf:leaves "
    "knife:knives wolf:wolves man:men child:children foot:feet tooth:teeth mouse:mice goose:geese sheep:sheep "
    "fish:fish berry:berries church:churches glass:glasses potato:potatoes hero:heroes key:keys boy:boys "
    "lady:ladies loaf:loaves wife:wives ox:oxen person:people story:stories fox:foxes brush:brushes apple:apples "
    "river:rivers stone:stones"
)
_UNITS = {
    ("hour", "minutes"): 60, ("minute", "seconds"): 60, ("day", "hours"): 24, ("week", "days"): 7,
    ("year", "months"): 12, ("meter", "centimeters"): 100, ("kilometer", "meters"): 1000, ("dozen", "pieces"): 12,
    ("century", "years"): 100, ("decade", "years"): 10, ("foot", "inches"): 12, ("yard", "feet"): 3,
}  # fmt: skip


def _related(questions: list[str], pairs: dict[str, str], r: Random) -> Item:
    """What belongs to a key; wrong is what belongs to others."""
    key, answer = r.choice(list(pairs.items()))
    return Item(r.choice(questions).format(key), answer, sorted(set(pairs.values()) - {answer}))


def _plural(r: Random) -> Item:
    """Wrong is what another rule would make of the word."""
    key, answer = r.choice(list(_PLURALS.items()))
    question = r.choice(
        ["Plural of {}?", "One {}, two", "Name the plural of {}.", "More than one {}?", "Many of {} are"]
    )
    regular = {key, key + "s", key + "es", key[:-1] + "ies", key[:-1] + "ves", key + "en"}
    return Item(question.format(key), answer, sorted(regular - {answer}))


def _unit(r: Random) -> Item:
    (large, small), factor = r.choice(list(_UNITS.items()))
    n = r.randint(1, 9)
    many = {"century": "centuries", "foot": "feet", "dozen": "dozen"}.get(large, f"{large}s") if n > 1 else large
    question = r.choice(["How many {1} are in {0}?", "{0} in {1}:", "Convert {0} to {1}."])
    wrong = sorted({factor * k for k in range(1, 10)} - {factor * n})
    return Item(question.format(f"{n} {many}", small), str(factor * n), [str(w) for w in wrong])


def _arithmetic(r: Random) -> Item:
    a, b = r.randint(0, 20), r.randint(0, 20)
    if r.random() < 0.5:
        (a, b), sign, result = (max(a, b), min(a, b)), "-", abs(a - b)
    else:
        sign, result = "+", a + b
    question = r.choice(["What is {} {} {}?", "{} {} {} =", "Calculate {} {} {}."]).format(a, sign, b)
    near = [result + d for d in (-10, -3, -2, -1, 1, 2, 3, 10) if len(str(result + d)) == len(str(result))]
    return Item(question, str(result), [str(n) for n in near])


def _symbols(r: Random, k: int) -> list[str]:
    """`k` different letters, or as many digits."""
    return r.sample(r.choice((ascii_lowercase, ascii_uppercase, digits)), k)


def _other_orders(symbols: list[str], but: list[str], r: Random) -> list[str]:
    orders = {" ".join(r.sample(symbols, len(symbols))) for _ in range(30)} - {" ".join(but)}
    return sorted(orders)


def _sorting(r: Random) -> Item:
    symbols = _symbols(r, r.randint(3, 5))
    question = r.choice(["Sort: {}", "Put in order: {}", "Sort {} please."]).format(" ".join(symbols))
    return Item(question, " ".join(sorted(symbols)), _other_orders(symbols, sorted(symbols), r))


def _reversing(r: Random) -> Item:
    symbols = _symbols(r, r.randint(3, 5))
    question = r.choice(["Reverse: {}", "Say backwards: {}", "Reverse {} please."]).format(" ".join(symbols))
    return Item(question, " ".join(symbols[::-1]), _other_orders(symbols, symbols[::-1], r))


def _counting(r: Random) -> Item:
    letter, others = r.choice(ascii_lowercase), r.choices(ascii_lowercase, k=2)
    row = r.choices([letter, *others], k=r.randint(3, 7))
    question = r.choice(["How many {} in: {}", "Count the {} in: {}"]).format(letter, " ".join(row))
    n = row.count(letter)
    return Item(question, str(n), [str(k) for k in range(8) if k != n])


def _copying(r: Random) -> Item:
    text = r.choice([" ", ", ", " - "]).join(random_string(r) for _ in range(r.choice((1, 1, 1, 2, 3))))
    question = r.choice(["Repeat: {}", "Say {}", "Copy this: {}", "Repeat after me: {}", "Echo {}"]).format(text)
    return Item(question, text, _changed(text, r))


def _changed(text: str, r: Random) -> list[str]:
    """`text` with one of its characters replaced by one of its kind."""
    kinds = (digits, ascii_uppercase, ascii_lowercase)
    changed = set()
    for _ in range(12):
        i = r.randrange(len(text))
        changed.add(text[:i] + r.choice(next((kind for kind in kinds if text[i] in kind), ".-+#")) + text[i + 1 :])
    return sorted(changed - {text})


def _instruction(r: Random) -> Item:
    words = [_word(r) for _ in range(r.randint(2, 4))]
    place, name = r.choice([(0, "first"), (-1, "last"), (1, "second")])
    question = r.choice(["Which word is {}: {}", "Say only the {} word: {}", "The {} word of: {}"])
    wrong = {*words, _word(r), _word(r), _word(r)} - {words[place]}
    return Item(question.format(name, " ".join(words)), words[place], sorted(wrong))


_TALK = {
    "Hello! How can I help?": "Hello|Hi|Hi there|Good morning|Good evening|Hey|Greetings|Hello again",
    "You are welcome.": "Thanks|Thank you|Many thanks|Thank you very much|Thanks a lot|That was helpful|Well done",
    "Goodbye!": "Bye|Goodbye|See you later|Good night|I have to go|Until tomorrow|Take care|So long",
    "I am fine, thank you.": "How are you|How do you do|How is it going|Are you well|How do you feel",
    "I am a small language model.": "Who are you|What are you|Tell me about yourself|Are you human|Present yourself",
    "I can answer, count and copy.": "What can you do|How can you help|Can you help me|What do you know|I need help",
    "I am sorry to hear that.": "I am sad|I am ill|I feel bad|I lost my keys|It rains again|I am tired|My day was bad",
    "That is great news!": "I won|I am happy|I found it|We did it|I passed the test|The sun shines|I feel great",
}


def _small_talk(r: Random) -> Item:
    answer = r.choice(list(_TALK))
    said = r.choice(_TALK[answer].split("|"))
    question = (
        r.choice(["", "", "Well, ", "So, ", "Now, ", "Oh, ", "Dear model, "]) + said + r.choice(["!", ".", "?", ""])
    )
    return Item(question, answer, [other for other in _TALK if other != answer])


#: The skills of `multiple_choice`.
QUESTIONS: dict[str, Callable[[Random], Item]] = {
    "capitals": partial(
        _related,
        [
            "Name the capital of {}.",
            "Which city is the capital of {}?",
            "Capital of {}?",
            "The capital of {} is",
            "{} has which capital?",
        ],
        _CAPITALS,
    ),
    "opposites": partial(
        _related,
        [
            "Opposite of {}?",
            "What is {} the opposite of?",
            "Name the opposite of {}.",
            "Not {} but",
            "{} is the contrary of",
        ],
        _OPPOSITES | {b: a for a, b in _OPPOSITES.items()},
    ),
    "plurals": _plural,
    "units": _unit,
    "arithmetic": _arithmetic,
    "sorting": _sorting,
    "reversing": _reversing,
    "counting": _counting,
    "copying": _copying,
    "instructions": _instruction,
    "small talk": _small_talk,
}
