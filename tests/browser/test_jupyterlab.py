"""The notebooks in JupyterLab and a real browser: opened, changed and run the way a person does it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from waiting import processes

from lib import paths
from lib.dialogs.templates import tool_call
from lib.facts.people import VALUES
from lib.training.saved import open_conversation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first to come installs Chromium

#: What there is to see at smoke size, with nothing trained: at least so many pictures and tables.
SEEN = {
    "00_quickstart": (0, 1),
    "03_facts_and_tools": (2, 2),
    "05_1_parameter_bounds": (3, 3),
    "05_2_generalization": (2, 0),
    "05_3_compressibility": (1, 2),
    "99_all_figures": (6, 1),
}
INSTALL = Path(__file__).with_name("install.sh")
AS_ROOT = os.geteuid() == 0
OUTPUT = ".jp-OutputArea-output"
ERROR = f"{OUTPUT}[data-mime-type='application/vnd.jupyter.error'], {OUTPUT}[data-mime-type$='stderr']"


def wait_for(condition, seconds: float = 120):
    """The first result of `condition` that is true; an element that was just drawn anew is looked for again."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(StaleElementReferenceException):
            if result := condition():
                return result
        time.sleep(0.1)
    pytest.fail(f"waited {seconds} seconds in vain")


def committed() -> dict[Path, str]:
    """Every committed notebook, figure and table, and what is in it."""
    folders = (paths.NOTEBOOKS, paths.ROOT / "figures", paths.PAPER_DATA)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass
class Lab:
    """A running JupyterLab: its address, the folder it shows, the folder that takes the place of runs/, a browser."""

    url: str
    notebooks: Path
    runs: Path
    browser: webdriver.Chrome

    def find(self, selector: str) -> list:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def open(self, name: str) -> None:
        """Open a notebook in a workspace of its own, so that no other tab is there, and wait for its kernel."""
        self.browser.get(f"{self.url}lab/workspaces/{name}/tree/{name}.ipynb")
        wait_for(lambda: self.find(".jp-Notebook .jp-CodeCell .cm-content") and self.is_idle())

    def is_idle(self) -> bool:
        """Whether there is a kernel and it waits; the notebook's own indicator calls one idle that is yet to come."""
        return "(ipykernel) | Idle" in self.find("#jp-main-statusbar")[0].text

    def change(self, old: str, new: str) -> None:
        """In the parameters, double-click the word `old` and type `new` in its place."""

        def words(text: str) -> list:
            """Where a value stands; it is an element of its own as soon as it is colored, and in comments it is not."""
            parameters = self.find(".jp-Notebook .jp-CodeCell .cm-content")[0]
            return parameters.find_elements(By.XPATH, f".//span[text()='{text}' or text()='\"{text}\"']")

        def changed() -> bool:
            for word in words(old):
                ActionChains(self.browser).double_click(word).send_keys(new).perform()
            return bool(words(new))

        wait_for(changed)

    def menu(self, name: str, command: str) -> None:
        """Choose a command of the main menu."""
        self.browser.find_element(By.XPATH, f"//*[@class='lm-MenuBar-itemLabel' and text()='{name}']").click()
        wait_for(lambda: self.find(f".lm-Menu-item[data-command='{command}']"))[0].click()

    def run_all(self) -> None:
        """Run > Run All Cells."""
        self.menu("Run", "runmenu:run-all")

    def finish(self) -> None:
        """Wait until all cells have run, or one has failed."""
        wait_for(lambda: self.is_idle() and self.prompts()[0] == "[1]:" and "[*]:" not in self.prompts())

    def prompts(self) -> list[str]:
        """`[7]:` beside a cell that ran, `[*]:` beside one that will."""
        script = "return [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')]"
        return self.browser.execute_script(f"{script}.map(prompt => prompt.textContent)")

    def save(self, name: str) -> None:
        """File > Save Notebook."""
        file = self.notebooks / f"{name}.ipynb"
        before = file.read_bytes()
        self.menu("File", "docmanager:save")
        wait_for(lambda: file.read_bytes() != before)

    def complaints(self) -> list[str]:
        """What the browser's console calls severe, since the last time."""
        return [line["message"] for line in self.browser.get_log("browser") if line["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    """JupyterLab on a copy of notebooks/, as `make lab` starts it; afterwards nothing runs or has changed."""
    installed = subprocess.run([INSTALL], stderr=subprocess.PIPE, text=True)
    if installed.returncode:
        pytest.skip(installed.stderr.strip().splitlines()[-1])
    before = committed()
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(paths.NOTEBOOKS, folder / "notebooks")
    environment = {
        **os.environ,
        "ITL_RUNS": str(folder / "runs"),
        "ITL_PROGRESS": "",
        "TMPDIR": str(folder),  # Chromium leaves folders there
        "PYTHONPATH": str(paths.ROOT),
        "JUPYTER_CONFIG_PATH": str(paths.ROOT / ".jupyter"),
        **{f"JUPYTER_{kind}_DIR": str(folder / "jupyter" / kind) for kind in ("CONFIG", "DATA", "RUNTIME")},
    }
    mark = f"ITL_RUNS={folder / 'runs'}"
    options = ["--no-browser", "--ServerApp.port=0", "--IdentityProvider.token=", *["--allow-root"] * AS_ROOT]
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "jupyter", "lab", f"--ServerApp.root_dir={folder / 'notebooks'}", *options]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    browser = None
    try:
        told = folder / "jupyter" / "RUNTIME" / f"jpserver-{server.pid}.json"
        wait_for(lambda: server.poll() is not None or told.exists() and told.read_text().endswith("}"))
        assert server.poll() is None, (folder / "log").read_text()
        browser = chromium(environment)
        assert processes(mark)
        yield Lab(json.loads(told.read_text())["url"], folder / "notebooks", folder / "runs", browser)
    finally:
        if browser:
            browser.quit()
        server.terminate()
        server.wait(60)
    wait_for(lambda: not processes(mark))
    assert committed() == before


def chromium(environment: dict[str, str]) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for option in ["headless", "disable-dev-shm-usage", "window-size=1400,1000", *["no-sandbox"] * AS_ROOT]:
        options.add_argument(f"--{option}")
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"), env=environment))


@pytest.fixture
def notebook(lab, request) -> Iterator[str]:
    """A notebook by its name, opened in JupyterLab without its outputs; its kernel is shut down afterwards."""
    lab.open(request.param)
    lab.menu("Edit", "editmenu:clear-all")
    wait_for(lambda: set(lab.prompts()) == {"[ ]:"} and not lab.find(OUTPUT))
    yield request.param
    lab.menu("Kernel", "kernelmenu:shutdown")
    wait_for(lambda: not lab.is_idle())


def test_jupyterlab_is_set_up_for_reading(lab):
    """It asks nothing about news or updates, and contents are headings, without numbers."""
    lab.browser.get(f"{lab.url}lab/workspaces/reading/tree/04_theory.ipynb")
    wait_for(lambda: lab.find("#jp-main-statusbar") and lab.find("[title^='Table of Contents']"))[0].click()
    titles = wait_for(lambda: [item.text for item in lab.find(".jp-tocItem-content") if item.text])
    assert any(title.startswith("Section 4") for title in titles)
    assert not lab.find("[data-id='jp-debugger-sidebar'], [data-id='extensionmanager.main-view'], .Toastify__toast")


def talk_to_both(lab) -> None:
    """Ask about somebody whom nobody trained on, in the chat window, change the database and ask again."""
    window = wait_for(lambda: lab.find(".itl-live [role=log]")) and lab.find(".itl-live")[0]

    def labelled(name: str):
        """The field beside a label."""
        label = window.find_element(By.XPATH, f".//label[text()='{name}']")
        return lab.browser.find_element(By.ID, label.get_attribute("for"))

    def push(name: str) -> None:
        window.find_element(By.XPATH, f".//button[text()='{name}']").click()

    def told(n_questions: int) -> list[list[str]]:
        """Both models' turns about the last question, in-weight first, when so many were asked."""
        texts = lambda cell: [turn.text for turn in cell.find_elements(By.CSS_SELECTOR, "div")]  # noqa: E731
        asked = lambda: window.find_elements(By.CSS_SELECTOR, "[role=log] > div[style*=grid]")  # noqa: E731
        wait_for(lambda: len(asked()) == n_questions)
        return [texts(cell) for cell in asked()[-1].find_elements(By.XPATH, "./div")]

    with open_conversation(paths.CHECKPOINTS / "in-tool", device="cpu") as talk:
        new_people = talk.unseen()
    name, place = new_people.names[1], new_people.columns["birth_place"][1]
    other = next(country for country in VALUES["birth_place"] if country != place)
    told(1)
    field = labelled("question")
    field.clear()
    field.send_keys(f"Where was {name} born?\n")
    in_weight, in_tool = told(2)
    call = tool_call(name, "birth_place")
    assert in_tool == [f"tool call\n{call}", f"database\n{place}", f"reply\n{name} was born in {place}."]
    assert len(in_weight) == 1 and in_weight[0].startswith("reply\n")

    Select(labelled("who")).select_by_visible_text(name)
    Select(labelled("fact")).select_by_visible_text("birth_place")
    wait_for(lambda: labelled("new value").get_attribute("placeholder") == f"now: {place}")
    labelled("new value").send_keys(other)
    push("Change the database")
    wait_for(lambda: f"changed: birth_place of {name}, {place} → {other}" in window.text)
    push("Ask both")
    again, in_tool = told(3)
    assert in_tool == [f"tool call\n{call}", f"database\n{other}", f"reply\n{name} was born in {other}."]
    assert again == in_weight
    still = lab.find(".jp-OutputArea-output:not(.itl-live) [role=log]")
    assert not still[
        0
    ].is_displayed()  # the first of two that stand in for chat windows; no window is live for the other
    assert still[-1].is_displayed()


def move_a_slider(lab) -> None:
    """The figure follows, and the picture that stands in for it is not to be seen."""
    figure = lambda: lab.find(".itl-live img")[0].get_attribute("alt")  # noqa: E731
    before = figure()
    lab.find(".itl-live [role=slider]")[0].send_keys(Keys.ARROW_RIGHT)
    wait_for(lambda: figure() != before)


#: What there is to do in a notebook that has run.
TO_DO = {"00_quickstart": talk_to_both, "05_1_parameter_bounds": move_a_slider, "05_3_compressibility": move_a_slider}


@pytest.mark.parametrize("notebook", SEEN, indirect=True)
def test_a_notebook_works_by_hand(lab, notebook):
    pictures, tables = SEEN[notebook]
    lab.change("laptop" if notebook == "99_all_figures" else "quick", "smoke")
    if notebook.startswith("05"):
        lab.change("True", "False")
    trained = set(lab.runs.glob("smoke/05_*/*"))
    lab.run_all()
    lab.finish()

    assert lab.prompts() == [f"[{i + 1}]:" for i in range(len(lab.prompts()))]
    assert [error.text for error in lab.find(ERROR)] == []
    shown = lab.find(f"{OUTPUT} img")
    assert len(shown) >= pictures and all(picture.get_property("naturalWidth") > 300 for picture in shown)
    assert len(lab.find(f"{OUTPUT} table")) >= tables
    boxes = f"document.querySelectorAll('.jp-Notebook {OUTPUT}, .jp-Notebook .jp-MarkdownOutput')"
    too_wide = f"return [...{boxes}].filter(box => box.scrollWidth > box.clientWidth).map(box => box.innerText)"
    assert lab.browser.execute_script(too_wide) == []
    if notebook in TO_DO:
        TO_DO[notebook](lab)
    assert lab.complaints() == []
    assert set(lab.runs.glob("smoke/05_*/*")) == trained


@pytest.mark.parametrize("notebook", ["05_3_compressibility"], indirect=True)
def test_progress_is_a_widget_that_leaves_nothing_in_the_saved_notebook(lab, notebook):
    lab.change("quick", "smoke")
    lab.run_all()
    wait_for(lambda: lab.find(f"{OUTPUT} .widget-hprogress"))
    assert lab.find(f"{OUTPUT} .widget-hbox")[0].text.startswith("smoke\u200705_3:")  # tqdm pads with figure spaces
    lab.finish()
    assert list(lab.runs.glob("smoke/05_3/*/row.json"))

    lab.save(notebook)
    lab.open(notebook)
    wait_for(lambda: len(lab.find(OUTPUT)) >= 4)  # they are drawn after the cells
    closed, report = (output.text for output in lab.find(OUTPUT)[2:4])
    assert closed == "" and "runs done now, 0 before" in report
    assert lab.complaints() == []


@pytest.mark.parametrize("notebook", ["05_2_generalization"], indirect=True)
def test_a_mistyped_parameter_ends_in_one_sentence(lab, notebook):
    lab.change("quick", "quack")
    lab.run_all()
    lab.finish()
    (error,) = lab.find(ERROR)
    assert error.text.splitlines()[-1].startswith("InputError: there is no experiment 05_2 in the profile quack: ")
    assert lab.prompts()[-1] == "[ ]:"


def test_where_no_browser_can_be_installed_the_reason_is_told(tmp_path):
    command = [shutil.which("bash"), INSTALL]
    told = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert told.returncode == 1
    assert told.stderr == "chromium and chromedriver are missing; as root on Debian they are installed here\n"
