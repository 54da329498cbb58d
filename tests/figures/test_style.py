"""What a figure says to who cannot see it."""

from IPython.core.interactiveshell import InteractiveShell
from matplotlib import pyplot as plt

from lib.figures import style


def test_a_figure_says_in_words_what_is_in_it():
    figure, (left, right) = plt.subplots(1, 2)
    figure.suptitle("Two\nlines")
    left.plot([1], label="a")
    left.set(title="L", xlabel="steps", ylabel="loss")
    right.plot([1], label="b")
    right.set(xlabel="facts")
    left.legend()
    right.legend(title="size")
    assert (
        style.alt_text(figure)
        == "Figure: Two lines. L: loss against steps; loss against facts. Shown: a. Shown: size: b."
    )
    figure.set_label("a curve")
    assert style.alt_text(figure) == "a curve"


def test_pictures_in_a_notebook_carry_these_words(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    shell = InteractiveShell.instance()
    try:
        style._describe_in_notebooks()
        figure, axes = plt.subplots()
        axes.set(xlabel="facts")
        _, metadata = shell.display_formatter.format(figure)
    finally:
        InteractiveShell.clear_instance()
    assert metadata["image/png"] == {"alt": "Figure: facts."}
