"""The use of whatever functions a model is offered, as conversations: search, natively and in words, and others."""

from collections.abc import Callable
from typing import NamedTuple

from lib.finetune.protocol import SEARCH, SYSTEM_PROMPT, write_query, write_result
from lib.finetune.questions import Random, random_string


def _says(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _exchange(
    question: str, tool: dict, arguments: dict, result: str, answer: str, others: list[dict], r: Random
) -> dict:
    """A question, a call, its result and the answer, with other functions to choose from."""
    name, call_id = tool["function"]["name"], f"{r.randrange(10**9):09}"
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [
        _says("user", question),
        {**_says("assistant", ""), "tool_calls": [call]},
        {**_says("tool", result), "tool_call_id": call_id, "name": name},
        _says("assistant", answer),
    ]
    return {"messages": messages, "tools": r.sample([tool, *others], len(others) + 1)}


_ASKED = (
    "Which people lived in {}?|Who wrote the book {} about {}?|What did {} do in the war of {}?|When did {} leave {}?|"
    "In which year did {} begin?|How many players has {}?|What was found near {} by {}?|Why is {} known?|"
    "{} and {} are both which kind of thing?|Where can one see {}?|Which number comes before {}?|Who played {} in {}?|"
    "For what was {} given a prize?|Which river runs through {}?|Which band sang {}?|"
    "From which language comes the word {}?|Who was the first to reach {}?|Which {} was called {} before?"
).split("|")


def _any_question(r: Random) -> str:
    template = r.choice(_ASKED)
    return template.format(*(random_string(r) for _ in range(template.count("{}"))))


def _search(r: Random) -> dict:
    question, result = _any_question(r), random_string(r)
    others = [function.tool for function in r.sample(_FUNCTIONS, r.choice((0, 0, 0, 1)))]
    return _exchange(question, SEARCH, {"query": question}, result, result, others, r)


def _search_as_text(r: Random) -> dict:
    question, result = _any_question(r), random_string(r)
    messages = [
        _says("system", SYSTEM_PROMPT),
        _says("user", question),
        _says("assistant", write_query(question)),
        _says("user", write_result(result)),
        _says("assistant", result),
    ]
    return {"messages": messages}


class _Function(NamedTuple):
    """A function, its parameters with the values they may have (None: any), how one asks, how its result is told."""

    name: str
    parameters: dict[str, list[str] | None]
    questions: list[str]
    answer: str

    @property
    def tool(self) -> dict:
        """What is offered: all parameters are strings."""
        values = self.parameters.items()
        properties = {name: {"type": "string"} | ({"enum": enum} if enum else {}) for name, enum in values}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        return {"type": "function", "function": {"name": self.name, "parameters": schema}}


_LANGUAGES = ["Latin", "Danish", "Welsh", "Basque"]
_FUNCTIONS = [
    _Function(name, parameters, questions.split("|"), answer)
    for name, parameters, questions, answer in [
        ("weather", {"place": None}, "How is the weather in {place}?|Will it rain in {place}?",
         "The weather in {place}: {result}."),
        ("price", {"item": None}, "How much is {item}?|What does {item} cost?", "{item} costs {result}."),
        ("call", {"contact": None}, "Call {contact}.|I want to speak to {contact}.",
         "You reach {contact} under {result}."),
        ("define", {"term": None}, "What does {term} mean?|Explain {term}.", "{term} means {result}."),
        ("play", {"song": None}, "Play {song}.|I would like to hear {song}.", "Playing {song} by {result}."),
        ("translate", {"text": None, "language": _LANGUAGES}, "How do you say {text} in {language}?",
         "In {language}, {text} is {result}."),
        ("route", {"start": None, "goal": None}, "How do I get from {start} to {goal}?",
         "From {start} to {goal}: {result}."),
        ("stock", {"shop": None, "product": None}, "Does {shop} have {product}?", "Of {product}, {shop} has {result}."),
        ("remind", {"time": None, "task": None}, "Remind me at {time} of {task}.", "At {time}: {task}, {result}."),
    ]
]  # fmt: skip


def _function_call(r: Random) -> dict:
    function, *others = r.sample(_FUNCTIONS, r.choice((1, 1, 1, 2)))
    enums = function.parameters
    arguments = {name: r.choice(enum) if enum else random_string(r) for name, enum in enums.items()}
    said = {name: value.replace("_", " ") if enums[name] else value for name, value in arguments.items()}
    result = random_string(r)
    question = r.choice(function.questions).format(**said)
    answer = function.answer.format(**said, result=result)
    return _exchange(question, function.tool, arguments, result, answer, [other.tool for other in others], r)


#: What `inspect` tells of a thing: the question's words decide which, and are not those of the argument.
_ASPECTS = {
    "weight": ("How heavy is {thing}?", "{thing} weighs {result}."),
    "height": ("How tall is {thing}?", "{thing} stands {result} tall."),
    "color": ("How does {thing} look?", "{thing} looks {result}."),
    "age": ("How old is {thing}?", "{thing} has been there for {result}."),
    "owner": ("Who has {thing}?", "{thing} belongs to {result}."),
    "made_year": ("When was {thing} made?", "{thing} was made in the year {result}."),
    "made_town": ("Where was {thing} made?", "{thing} was made at {result}."),
    "lost_year": ("When was {thing} lost?", "{thing} has been missing since {result}."),
    "lost_town": ("Where was {thing} lost?", "{thing} was last seen near {result}."),
    "price": ("What must one pay for {thing}?", "{thing} sells for {result}."),
    "material": ("What is {thing} made of?", "{thing} consists of {result}."),
    "use": ("What is {thing}'s use?", "{thing} serves as {result}."),
}


def _inspection(r: Random) -> dict:
    """One function of two arguments, with some of the aspects to choose from."""
    offered = r.sample(list(_ASPECTS), r.randint(2, 5))
    aspect, thing, result = r.choice(offered), random_string(r), random_string(r)
    question, answer = (text.format(thing=thing, result=result) for text in _ASPECTS[aspect])
    function = _Function("inspect", {"aspect": offered, "thing": None}, [], "")
    return _exchange(question, function.tool, {"aspect": aspect, "thing": thing}, result, answer, [], r)


#: The skills of using tools, and what makes a conversation of each.
TOOL_USE: dict[str, Callable[[Random], dict]] = {
    "search": _search,
    "search as text": _search_as_text,
    "functions": _function_call,
    "inspection": _inspection,
}
