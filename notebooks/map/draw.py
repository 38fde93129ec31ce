"""Draw the map of the series, once for each part, with "you are here": part_1.png to part_5.png in this folder.

    python notebooks/map/draw.py      # after a notebook was added or renamed

Numbers and titles come from the notebooks' file names. The first notebook of each part shows its picture.
"""

from pathlib import Path

import matplotlib.pyplot as plt

FOLDER = Path(__file__).resolve().parent
PARTS = {  # title -> numbers of its notebooks, of which only those that exist are drawn
    "I: The classic walk": range(1, 8),
    "II: Real savings": range(8, 10),
    "III: Few bits for weights": range(10, 14),
    "IV: Activations and data": range(14, 20),
    "V: Deciding and doing": range(20, 22),
}
HERE, ELSEWHERE, INK, PALE = "#d55e00", "#f2f2f2", "#1b1b1b", "#666666"


def titles() -> dict[int, str]:
    """Number -> title of each notebook, from its file name."""
    found = {}
    for path in sorted(FOLDER.parent.glob("[0-9][0-9]_*.ipynb")):
        number, _, name = path.stem.partition("_")
        title = name.replace("_", " ").capitalize()
        found[int(number)] = {"Gguf": "GGUF", "Gptq": "GPTQ", "Awq": "AWQ", "Kv cache": "KV cache"}.get(title, title)
    return found


def draw(here: int, chapters: dict[int, str]) -> None:
    fig, ax = plt.subplots(figsize=(12.5, 3.4), dpi=100)
    for i, (part, numbers) in enumerate(PARTS.items()):
        left, now = i * 2.4, i + 1 == here
        colour = HERE if now else PALE
        box = plt.Rectangle((left, 0), 2.2, 3, facecolor="#fff3ea" if now else ELSEWHERE, edgecolor=colour)
        box.set_linewidth(3 if now else 0.8)
        ax.add_patch(box)
        roman, title = part.split(": ")
        ax.text(left + 0.1, 2.87, f"Part {roman}", fontsize=10, color=colour, va="top")
        ax.text(left + 0.1, 2.6, title, fontsize=9.8, fontweight="bold", color=colour, va="top")
        lines = [f"{n}  {chapters[n]}" for n in numbers if n in chapters]
        ax.text(left + 0.1, 2.2, "\n".join(lines), fontsize=10, color=INK, va="top", linespacing=1.5)
        if now:
            ax.text(left + 1.1, -0.12, "▲ you are here", fontsize=11, color=HERE, ha="center", va="top")
        if i:
            ax.annotate("", (left, 1.5), (left - 0.2, 1.5), arrowprops={"arrowstyle": "->", "color": PALE})
    ax.set(xlim=(-0.05, 11.85), ylim=(-0.4, 3.05))
    ax.axis("off")
    fig.savefig(FOLDER / f"part_{here}.png", bbox_inches="tight", facecolor="white", pad_inches=0.05)
    plt.close(fig)


if __name__ == "__main__":
    for part in range(1, len(PARTS) + 1):
        draw(part, titles())
