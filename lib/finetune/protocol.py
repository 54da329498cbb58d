"""How a chat model looks something up by a question of its own, as in the paper's appendix on TriviaQA.

Natively it calls the function `search`, which `SEARCH` describes. As text, for models without such calls, the system
prompt asks it to write <query>...</query>, and the user's next turn holds <result>...</result>.
"""

import re

#: What the system says of the textual protocol.
SYSTEM_PROMPT = (
    "Answer the user's question in a few words. You cannot know the answer: first look it up by writing "
    "<query>the question</query>, wait for <result>...</result>, then say the result."
)
#: The function, as chat templates and OpenAI-compatible servers know it.
SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Look up the answer to a question.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "The question."}},
            "required": ["query"],
        },
    },
}


def write_query(question: str) -> str:
    """The textual request."""
    return f"<query>{question}</query>"


def read_query(text: str) -> str | None:
    """The question of the first textual request in what a model said, None if there is none."""
    found = re.search(r"<query>(.*?)</query>", text, re.DOTALL)
    return found[1].strip() if found else None


def write_result(answer: str) -> str:
    """What the textual protocol answers."""
    return f"<result>{answer}</result>"


def query_of_call(call: dict) -> str | None:
    """The question of a call of `SEARCH`, its name and arguments; None if it is none."""
    match call:
        case {"name": "search", "arguments": {"query": str(query)}}:
            return query
    return None
