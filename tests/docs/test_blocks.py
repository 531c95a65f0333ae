"""Documents name nothing that does not exist: languages, syntax, keys, values, flags, commands, files and links."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.blocks import DOCUMENTS, ROOT, problems


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_is_right_as_far_as_it_can_be_read(document: Path) -> None:
    assert problems(document) == []


WRONG = """# Title
```
no language
```
```sh
bigvision trian recipes/digits.yaml
bigvision train recipes/none.yaml --train.stesp 3
bigvision checkpoint rename --keepp 2
bigvision train --train.steps many && make tset
torchrun launch/trian.py
```
```sh
for quotes in "
```
```python
import bigvision as
```
```yaml
train: {stesp: 3}
```
```json
{"a": }
```
  ```text
  indented
`bigvision trian`, `--train.stesp 3`, `optim.lrr`, `recipes/none.yaml`, [a](none.md), [b](#none), [c](#title)
"""


def test_what_is_wrong_in_a_document_is_found(tmp_path: Path) -> None:
    document = tmp_path / "wrong.md"
    document.write_text(WRONG)
    found = "\n".join(problems(document))
    for words in (
        "wrong.md:2: the language",
        "looking for matching",
        "a fence that is not closed",
        "no command trian",
        "no file recipes/none.yaml",
        "train.steps",
        "no command rename",
        "no flag --keepp",
        "no command tset",
        "no file launch/trian.py",
        "SyntaxError",
        "JSONDecodeError",
        "`bigvision trian`",
        "no key train.stesp",
        "no key optim.lrr",
        "`recipes/none.yaml`",
        "link to none.md",
        "link to #none",
    ):
        assert words in found, f"{words}:\n{found}"
    assert "#title" not in found
