"""The runner, on small notebooks and real kernels, and then on every notebook of the project."""

import errno
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from waiting import is_running, wait_for

from lib import paths
from lib.base import InputError, WorkError
from lib.figures import record, style
from lib.notebook import catalog, refresh, runner

PARAMETERS = 'profile: str = "quick"  # sizes\nseeds: int = 3  # repetitions\nrate: float = 0.5  # of learning'
SAVE_FIGURE = "from lib import paths\n(paths.figures(profile) / 'a.png').write_bytes(b'figure %d' % seeds)"


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ITL_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def forbid_kernels(monkeypatch):
    """A function after whose call the start of a kernel is an error."""
    failure = lambda *_, **__: pytest.fail("a kernel was started")  # noqa: E731
    return lambda: monkeypatch.setattr(papermill, "execute_notebook", failure)


@pytest.fixture
def no_kernel(forbid_kernels):
    forbid_kernels()


def write(path: Path, *cells: str, produces=(), parameters: str = PARAMETERS) -> Path:
    """A notebook with a title, a parameters cell and `cells`."""
    new = nbformat.v4
    code = [new.new_code_cell(parameters, metadata={"tags": ["parameters"]}), *map(new.new_code_cell, cells)]
    notebook = new.new_notebook(cells=[new.new_markdown_cell("# Title"), *code])
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "x", "language": "python"},
        "itl": {"produces": list(produces)},
    }
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return path


def outputs(path: Path) -> str:
    """All text that the cells of a notebook printed."""
    cells = nbformat.read(path, as_version=4).cells
    return "".join(out.get("text", "") for cell in cells for out in cell.get("outputs", []))


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_publishes_notebook_page_and_figures_and_a_second_one_re_uses_them(
    tmp_path, runs, monkeypatch, forbid_kernels
):
    # A kernelspec python3 that cannot start, first on Jupyter's search path.
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["/bin/false"], "display_name": "other", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("ITL_RUNS", os.path.relpath(runs))
    report = "import sys, os, lib, json\nprint(json.dumps([sys.executable, os.getcwd(), lib.__file__, profile, seeds]))"
    source = write(tmp_path / "$HOME" / "n.ipynb", report, SAVE_FIGURE, produces=["a.png"])

    first = runner.run(source, "smoke", {"seeds": 7})

    assert set(files(runs)) == {"smoke/notebooks/n.ipynb", "smoke/notebooks/n.html", "smoke/figures/a.png"}
    assert json.loads(outputs(first)) == [
        sys.executable, str(source.parent), str(paths.ROOT / "lib" / "__init__.py"), "smoke", 7,
    ]  # fmt: skip
    assert (runs / "smoke" / "figures" / "a.png").read_bytes() == b"figure 7"
    assert "<h1" in first.with_suffix(".html").read_text()

    before = files(runs)
    forbid_kernels()
    assert runner.run(source, "smoke", {"seeds": 7}, reuse=True) == first
    assert files(runs) == before

    # Whatever decides the outputs makes the earlier ones stale: a parameter, the profile, a missing output, a cell.
    def is_stale(profile: str = "smoke", **parameters) -> bool:
        try:
            runner.run(source, profile, parameters, reuse=True)
        except pytest.fail.Exception:
            return True
        return False

    assert not is_stale(seeds=7)
    assert is_stale() and is_stale("quick", seeds=7)
    page = first.with_suffix(".html")
    page.rename(tmp_path / "page")
    assert is_stale(seeds=7)
    (tmp_path / "page").rename(page)
    assert not is_stale(seeds=7)
    write(source, report + " ", SAVE_FIGURE, produces=["a.png"])
    assert is_stale(seeds=7)


def test_a_change_in_code_or_paper_data_makes_outputs_stale(tmp_path, monkeypatch):
    source = write(tmp_path / "notebooks" / "n.ipynb")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "PAPER_DATA", tmp_path / "paper_data")
    (tmp_path / "paper_data").mkdir()
    (tmp_path / "lib").mkdir()
    hashes = [runner.source_hash(source, {})]
    for name in ("lib/a.py", "paper_data/a.csv", "notebooks/benchmarks.py"):
        for text in ("1", "2"):
            (tmp_path / name).write_text(text)
            hashes.append(runner.source_hash(source, {}))
    (tmp_path / "lib" / "a.pyc").write_text("compiled")
    assert len(set(hashes)) == 7
    assert runner.source_hash(source, {}) == hashes[-1]


def test_a_full_disk_is_a_failure_that_leaves_earlier_results_alone(tmp_path, runs, monkeypatch):
    source = write(tmp_path / "n.ipynb", "2")
    (runs / "quick" / "notebooks").mkdir(parents=True)
    (runs / "quick" / "notebooks" / "n.ipynb").write_bytes(b"earlier")

    def cut(_, copy, *rest, **options):
        copy.write_text(source.read_text()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(papermill, "execute_notebook", cut)
    with pytest.raises(WorkError, match=r"n failed and left no copy: OSError: .*No space left"):
        runner.run(source)
    assert files(runs) == {"quick/notebooks/n.ipynb": b"earlier"}


@pytest.mark.parametrize(
    "cells, message",
    [
        (["x = 1 / (seeds - 7)", "2"], "in cell [4] (x = 1 / (seeds - 7)): ZeroDivisionError: division by zero"),
        (["import os, signal", "os.kill(os.getpid(), signal.SIGKILL)", "2"], "in cell [5] (os.kill(os.getpid(), sig"),
        (["import os", "os._exit(0)"], "in cell [5] (os._exit(0)): DeadKernelError"),
        (["import sys; sys.exit()", "2"], "in cell [4] (import sys; sys.exit()): execution stopped there"),
        (["2"], "to produce a.png, although every cell was executed"),
    ],
    ids=["exception", "killed", "dies in its last cell", "leaves early", "does not produce its figure"],
)
def test_a_failed_run_says_why_keeps_a_copy_and_leaves_earlier_results_alone(tmp_path, runs, cells, message):
    earlier = {"quick/notebooks/n.ipynb": b"1", "quick/notebooks/n.html": b"2", "quick/figures/a.png": b"3"}
    for name, content in earlier.items():
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_bytes(content)
    other_figure = "from lib import paths; (paths.figures(profile) / 'b.png').touch()"
    source = write(tmp_path / "n.ipynb", other_figure, *cells, produces=["a.png"])

    with pytest.raises(WorkError) as caught:
        runner.run(source, parameters={"seeds": 7})

    sentence = str(caught.value)
    assert sentence.startswith(f"n failed {message}") and "\n" not in sentence
    copy = Path(sentence.rsplit(" ", 1)[1])
    assert copy.name == "n.failed.ipynb" and len(nbformat.read(copy, as_version=4).cells) >= len(cells) + 3
    assert files(runs) == {**earlier, "quick/notebooks/n.failed.ipynb": copy.read_bytes()}


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, runs):
    source = write(tmp_path / "n.ipynb", "import os, time; open('pid', 'w').write(str(os.getpid()))", "time.sleep(60)")
    code = f"from lib.notebook import runner; runner.run({str(source)!r})"
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=paths.ROOT, stderr=subprocess.PIPE, text=True)
    pid = tmp_path / "pid"
    wait_for(lambda: pid.exists() and pid.read_text())
    runner.send_signal(signal.SIGINT)
    _, errors = runner.communicate(timeout=150)
    assert runner.returncode != 0 and "KeyboardInterrupt" in errors
    assert [path for path in runs.rglob("*") if path.name != "notebooks"] == [runs / "quick"]
    wait_for(lambda: not is_running(int(pid.read_text())))


def test_outputs_are_written_back_into_the_source_and_nothing_else_is(tmp_path, forbid_kernels):
    source = write(tmp_path / "n.ipynb", "print(seeds, repr(rate))", "", "seeds + 1")
    before = nbformat.read(source, as_version=4)
    executed = runner.run(source, parameters={"seeds": 5, "rate": 2.0}, in_place=True)
    after = nbformat.read(source, as_version=4)

    assert [cell.get("execution_count") for cell in after.cells] == [None, 1, 2, None, 3]
    assert outputs(source) == "5 2.0\n" and after.cells[4].outputs[0].data["text/plain"] == "6"
    assert after.cells[4].outputs[0].execution_count == 3
    for cell in after.cells[1:]:
        cell.update(outputs=[], execution_count=None)
    assert after == before

    # Earlier outputs neither make a re-run necessary nor change what it writes.
    text = source.read_text()
    forbid_kernels()
    assert runner.run(source, parameters={"seeds": 5, "rate": 2.0}, in_place=True, reuse=True) == executed
    assert source.read_text() == text


def test_the_progress_of_a_notebook_is_told_while_it_runs_and_nothing_else_of_it(tmp_path, capsys):
    work = "from lib import progress\nprogress.LINE_INTERVAL = 1e-6\nprint('said')\n"
    work += "with progress.progress(3, 'asking') as bar:\n    bar.update()\n    bar.update()"
    runner.run(write(tmp_path / "n.ipynb", work), "smoke")
    running, first, second, done = capsys.readouterr().err.splitlines()
    assert (running, done.split(" in ")[0]) == ("n: running (smoke)", "n: done")
    assert first.startswith("asking: 1/3 [00:00<") and second.startswith("asking: 2/3 [00:00<")


def test_many_notebooks_are_run_to_the_end_failures_are_told_together_and_success_forgets_earlier_ones(
    tmp_path, runs, capsys
):
    bad = write(tmp_path / "bad.ipynb", "raise ValueError('no\\nreason')")
    good, failed_before = write(tmp_path / "good.ipynb"), runs / "smoke" / "notebooks" / "good.failed.ipynb"
    failed_before.parent.mkdir(parents=True)
    failed_before.touch()
    with pytest.raises(WorkError, match=r"^1 of 2 notebooks failed: bad failed .*ValueError: no reason"):
        runner.run_many([bad, good], "smoke")
    assert set(files(runs)) == {f"smoke/notebooks/{name}" for name in ("bad.failed.ipynb", "good.ipynb", "good.html")}
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[1/2] bad: running (smoke)"
    assert "[2/2] good: running (smoke)" in lines
    assert re.fullmatch(r"good: done in \d+ s", lines[-1])


def test_many_notebooks_are_all_checked_before_the_first_one_starts(tmp_path, runs, no_kernel):
    good = write(tmp_path / "good.ipynb")
    bad = write(tmp_path / "bad.ipynb", parameters='profile: str = "quick"')
    with pytest.raises(InputError, match="^bad has no parameter 'seeds': it accepts profile: str$"):
        runner.run_many([good, bad], parameters={"seeds": 1})
    assert not runs.exists()


@pytest.mark.parametrize(
    "profile, values, message",
    [
        ("quick", {"sedes": 3}, "n has no parameter 'sedes': it accepts profile: str, seeds: int, rate: float"),
        ("quick", {"profile": "paper"}, "n: the profile is chosen with the option for it, not as a parameter"),
        ("huge", {}, "unknown profile 'huge': there are smoke, quick, laptop, paper"),
    ],
)
def test_what_a_notebook_does_not_accept_is_refused_before_a_kernel_starts(
    tmp_path, runs, no_kernel, profile, values, message
):
    with pytest.raises(InputError) as caught:
        runner.run(write(tmp_path / "n.ipynb"), profile, values)
    assert str(caught.value) == message
    assert not runs.exists()


def test_a_notebook_without_parameters_is_refused(tmp_path):
    kernel = {"name": "python3", "display_name": "x", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(metadata={"kernelspec": kernel}), tmp_path / "empty.ipynb")
    with pytest.raises(InputError, match="^empty has no parameter 'profile': it accepts none"):
        runner.run(tmp_path / "empty.ipynb")


@pytest.mark.parametrize("title, network", [("# Price", []), ("# $x^2$", ["mathjax"])])
def test_a_page_asks_the_network_for_nothing_but_equations(tmp_path, title, network):
    notebook = nbformat.read(write(tmp_path / "n.ipynb"), as_version=4)
    notebook.cells[0].source = title
    page = runner.render(notebook, tmp_path / "n.ipynb")
    loaded = re.findall(r"""(?:<script[^>]*src=|<link[^>]*href=|import\()["']?(http[^"'> ]*)""", page)
    assert len(loaded) == len(network) and all(name in url for name, url in zip(network, loaded, strict=True))


# --- the notebooks of the project

ALL = catalog.all_notebooks()


def test_every_notebook_is_of_the_paper_or_of_its_large_models_but_section_7_and_the_benchmark():
    paper, scale = catalog.all_notebooks("paper"), catalog.all_notebooks("scale")
    others = [path for path in ALL if path not in paper + scale]
    assert [path.stem[:4] for path in others] == ["07_1", "07_2", "A2_p"] and not {*paper} & {*scale}
    assert {path.stem[:2] for path in scale} == {"06", "A1"}


each_notebook = pytest.mark.parametrize("path", ALL, ids=[path.stem for path in ALL])


@each_notebook
def test_notebook_is_prose_with_calls(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    prose = sum(len(cell.source) for cell in cells if cell.cell_type == "markdown")
    assert prose >= sum(len(cell.source) for cell in code)
    assert statistics.median(len(cell.source.splitlines()) for cell in code) <= 10
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]


@each_notebook
def test_notebook_begins_with_commented_parameters_and_declares_its_figures(path):
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.metadata.tags == ["parameters"]
    assert catalog.parameters(path)["profile"] == "str"
    assert papermill.inspect_notebook(path)["profile"]["default"].strip('"') in paths.PROFILES
    assert all("#" in line for line in first.source.splitlines())
    assert isinstance(notebook.metadata.itl.produces, list)


@pytest.mark.slow
@each_notebook
def test_notebook_runs_at_smoke_size(path, runs):
    runner.run(path, "smoke")
    declared = nbformat.read(path, as_version=4).metadata.itl.produces
    assert all((runs / "smoke" / "figures" / name).stat().st_size for name in declared)


def _text(output) -> str:
    data = output.get("data", {})
    return output.get("text") or data.get("text/markdown") or data["text/plain"]


def _from_tables(path: Path) -> dict[str, list[str]]:
    """The text of the outputs of the cells tagged `from-tables`, by the cells' sources."""
    shown = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if "from-tables" in cell.metadata.get("tags", []):
            shown[cell.source] = [_text(output) for output in cell.outputs]
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("path", refresh.drawing_notebooks(), ids=lambda path: path.stem)
def test_a_committed_notebook_shows_what_the_tables_say_and_recomputing_nothing_trains_nothing(
    path, tmp_path, monkeypatch
):
    monkeypatch.setenv("ITL_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("ITL_FIGURES", str(tmp_path / "figures"))
    executed = runner.run(path, refresh.PROFILE, {"recompute": False})
    assert _from_tables(executed) == _from_tables(path), "stale: itl refresh runs it again"
    trained = [name for name in files(tmp_path / "runs") if name.endswith(("metrics.jsonl", "row.json"))]
    assert trained == []
    drawn = {product.stem for product in (tmp_path / "figures").glob("*")} & set(record.FIGURES)
    monkeypatch.setenv("ITL_FIGURES", str(tmp_path / "expected"))
    for name in drawn:
        style.save(record.draw(name, refresh.PROFILE), name, refresh.PROFILE)
        assert (tmp_path / f"expected/{name}.png").read_bytes() == (tmp_path / f"figures/{name}.png").read_bytes()
