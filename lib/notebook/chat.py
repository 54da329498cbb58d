"""Two models side by side in a notebook: they answer the same questions, and the database of one can be changed."""

from asyncio import get_running_loop
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from html import escape
from pathlib import Path

import ipywidgets
from IPython.display import HTML

from lib.base import InputError
from lib.dialogs.templates import Role, Turn, question
from lib.facts.people import VALUES, People
from lib.notebook import widgets
from lib.training.saved import open_conversation

#: The color of each kind of turn, dark enough for white letters.
COLORS = {"question": "#595959", "tool call": "#0072B2", "database": "#8F3D77", "reply": "#00734F"}
_BOX = "border-left: 4px solid {0}; padding: 2px 8px; margin: 6px 0; line-height: 1.4"
_LABEL = "background: {0}; color: white; padding: 0 6px; border-radius: 3px; font-size: 85%"
_TEXT = "display: block; white-space: pre-wrap; overflow-wrap: anywhere"
_COLUMNS = "display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 16px"
#: A window that stays scrolled to its end.
_WINDOW = "display: flex; flex-direction: column-reverse; max-height: 32em; overflow-y: auto"
#: The browser sends the Enter key, and then the text: how long to wait for it.
ENTER_SECONDS = 0.2


def label(turn: Turn) -> str:
    """Return the kind of a turn, a key of `COLORS`; a backtick opens a request to the database."""
    if turn.role == Role.ASSISTANT:
        return "tool call" if "`" in turn.text else "reply"
    return {Role.USER: "question", Role.DATABASE: "database"}[turn.role]


def transcript(turns: Sequence[Turn]) -> str:
    """Return a dialog as HTML: each turn with its label, in the label's color."""
    return "".join(_told(label(turn), turn.text) for turn in turns)


def _told(kind: str, text: str) -> str:
    color = COLORS[kind]
    return (
        f'<div style="{_BOX.format(color)}"><b style="{_LABEL.format(color)}">{kind}</b>'
        f'<span style="{_TEXT}">{escape(text)}</span></div>'
    )


class Chat:
    """An in-weight and an in-tool model that answer the same questions. As the value of a cell it is a chat window.

    in_weight, in_tool: folders of runs. people: added to the in-tool model's database, a copy of the run's own that
    `close` deletes. Raises `InputError` as `open_conversation` does, for a folder of the other mode, and
    for people with other attributes.
    """

    def __init__(self, in_weight: Path, in_tool: Path, people: People):
        self.people = people
        self._talks, self._log = {}, []
        with ExitStack() as stack:
            for mode, folder in (("in-weight", in_weight), ("in-tool", in_tool)):
                talk = stack.enter_context(open_conversation(folder, editable=True))
                if talk.config.mode != mode:
                    raise InputError(f"the model in {folder} is {talk.config.mode}: one that is {mode} is expected")
                self._talks[mode] = talk
            self.tool = self._talks["in-tool"].tool
            self.tool.add(people)
            self._open = stack.pop_all()

    def close(self) -> None:
        """Delete the copy of the database."""
        self._open.close()

    def ask(self, text: str) -> dict[str, list[Turn]]:
        """Return both models' dialogs about a question, by mode."""
        dialogs = {mode: talk.turns(text) for mode, talk in self._talks.items()}
        columns = "".join(
            f"<div><b>{mode}</b>, {self._talks[mode].model.config.n_params:,} parameters{transcript(turns[1:])}</div>"
            for mode, turns in dialogs.items()
        )
        self._log.append(f'{_told("question", text)}<div style="{_COLUMNS}">{columns}</div>')
        return dialogs

    def change(self, name: str, attribute: str, value: str) -> str:
        """Change a fact in the copy of the database, see `lib.facts.database.change_fact`; return the old value."""
        old = self.tool.change(name, attribute, value)
        self._log.append(_told("database", f"changed: {attribute} of {name}, {old} → {value}"))
        return old

    def html(self) -> str:
        """Return all that was asked and changed, answers in a column for each model."""
        told = "".join(self._log) or "<p>Nothing was asked yet.</p>"
        return f'<div role="log" aria-label="conversation with two models" style="max-width: 70em">{told}</div>'

    def _ipython_display_(self) -> None:
        widgets.show(self.widget(), HTML(self.html()))

    def widget(self) -> ipywidgets.Widget:
        """Return the chat window: what was said, a field to ask, and fields to change a fact of the database."""
        log, told = ipywidgets.HTML(), ipywidgets.HTML()
        known = self._talks["in-weight"].people.names[:3]
        names = [name for name in dict.fromkeys([*self.people.names, *known]) if self.tool.facts(name)]
        name = _field(ipywidgets.Dropdown, "who", options=names)
        attribute = _field(ipywidgets.Dropdown, "fact", options=self.tool.attributes)
        value = _field(ipywidgets.Combobox, "new value")
        text = _field(ipywidgets.Text, "question", width="32em", continuous_update=False)
        ask = ipywidgets.Button(description="Ask both", button_style="primary")
        change = ipywidgets.Button(description="Change the database", layout={"width": "auto"})

        def update(sentence: str = "") -> None:
            log.value, told.value = f'<div tabindex="0" style="{_WINDOW}">{self.html()}</div>', sentence

        def choose(_=None) -> None:
            text.value = question(name.value, attribute.value)
            value.value, value.placeholder = "", f"now: {self.tool.facts(name.value)[attribute.value]}"
            value.options = sorted(VALUES.get(attribute.value, ()))[:300]  # all but birth dates, which are thousands

        def do_ask(_=None) -> None:
            if text.value.strip():
                self.ask(text.value.strip())
                update()

        def do_change(_) -> None:
            try:
                self.change(name.value, attribute.value, value.value.strip())
            except InputError as error:
                told.value = f'<span role="alert">{escape(str(error))}</span>'
                return
            update("Ask again: does the answer change?")
            choose()

        def on_enter(_, content: dict, __) -> None:
            if content.get("event") == "submit":
                get_running_loop().call_later(ENTER_SECONDS, do_ask)

        for chosen in (name, attribute):
            chosen.observe(choose, "value")
        text.on_msg(on_enter)
        ask.on_click(do_ask)
        change.on_click(do_change)
        update()
        choose()
        row = partial(ipywidgets.HBox, layout={"flex_flow": "row wrap"})
        return ipywidgets.VBox([log, row([text, ask]), row([name, attribute, value, change]), told])


def _field(kind: type[ipywidgets.Widget], name: str, width: str = "auto", **options) -> ipywidgets.Widget:
    return kind(description=name, style={"description_width": "initial"}, layout={"width": width}, **options)
