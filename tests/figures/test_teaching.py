"""The picture of a dialog; that of a training's inside is tested with the probes."""

from lib.figures import style, teaching


def test_the_picture_of_a_dialog_says_which_characters_are_trained():
    tokens = [256, *b"Hi\n", 257, *b"Yes", 259]
    figure = teaching.trained_characters(tokens, [False] * 5 + [True] * 4)
    told = [(text.get_text(), text.get_bbox_patch().get_facecolor()[:3]) for text in figure.axes[0].texts]
    assert [character for character, _ in told] == ["U", "H", "i", "↵", "A", "Y", "e", "s", "E"]
    assert len({color for _, color in told[:5]}) == len({color for _, color in told[5:]}) == 1
    assert told[4][1] != told[5][1]
    assert style.alt_text(figure).endswith("in brackets: UHi↵A[YesE]")
