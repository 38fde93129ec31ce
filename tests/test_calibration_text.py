"""The text that methods calibrate on, notebooks/pocket-gpt2/calibration.txt."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "notebooks" / "pocket-gpt2"
TEXT = (FOLDER / "calibration.txt").read_text(encoding="utf-8")


def runs(text: str, length: int = 8) -> set[tuple[str, ...]]:
    """All runs of so many neighbouring words."""
    words = text.split()
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_it_is_prose_of_80_000_characters_one_paragraph_a_line():
    assert len(TEXT) >= 80_000 and TEXT.isascii() and TEXT.endswith("\n")
    assert all(line and line == line.strip() for line in TEXT.splitlines())


def test_no_run_of_eight_words_is_in_the_evaluation_text_too():
    evaluation = runs((FOLDER / "evaluation.txt").read_text(encoding="utf-8"))
    assert evaluation and not runs(TEXT) & evaluation
    assert runs(TEXT[1000:2000]) & runs(TEXT)  # so it would be noticed
