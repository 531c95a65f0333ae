"""The table of the files in recipes/, made of the comments at their tops, for docs/recipes.md.

``python -m tests.docs.recipe_table`` writes it there.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "recipes.md"
FACTS = ("Hardware", "Settings", "Published", "Run by us")
BEGIN, END = "<!-- the table is written by tests/docs/recipe_table.py -->\n", "<!-- end of the table -->\n"


def recipes() -> list[Path]:
    return sorted((ROOT / "recipes").glob("*.yaml"))


def facts(path: Path) -> dict[str, str]:
    """The first paragraph of a recipe's comments, by "What", and its `FACTS`."""
    found, key = {"What": ""}, "What"
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        if start := re.match(rf"({'|'.join(FACTS)}): ", text):
            key, text = start[1], text[start.end() :]
        elif not text or text.startswith(("Otherwise than there:", "The weights")) or line.startswith("#   "):
            key = ""
        if key:
            found[key] = f"{found.get(key, '')} {text}".strip()
    return found


def table() -> str:
    rows = [
        "| recipe | what | hardware | settings | published | run by us |",
        "|---|---|---|---|---|---|",
    ]
    for path in recipes():
        known = facts(path)
        cells = [f"`{path.name}`", *(known[name].rstrip(".") for name in ("What", *FACTS))]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def page() -> str:
    """docs/recipes.md with the table as it should be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page())
