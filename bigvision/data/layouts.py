"""Where the class folders of a split are, in a folder as people have them.

`Finder` refuses in one line what can be read in two ways; a list of the classes that is known before (the training data's,
``data.classes``) settles it.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bigvision.data.decode import EXTENSIONS
from bigvision.data.sources.base import Opening
from bigvision.data.splits import VAL_FOLDERS, Role, first_val, is_within, part_for, split_name
from bigvision.errors import UserError, either

GENERIC = ("images", "image", "imgs", "img", "jpegimages", "photos", "pictures", "data", "dataset", "datasets")
"""Names of a folder around the class folders, which are no names of classes."""
COMPANIONS = ("labels", "label", "annotations", "annotation", "groundtruth", "ground_truth", "bboxes", "metadata", "docs")
"""Names of folders that lie beside images and describe them."""
SYSTEM = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "__pycache__", "thumbs.db",
          "desktop.ini")  # fmt: skip
"""What operating systems and servers leave in folders."""


class Kind(NamedTuple):
    """What the files of a folder are."""

    dataset: str
    """for messages, as *noun*"""
    noun: str
    extensions: tuple[str, ...]
    """in lower case"""


IMAGES = Kind("imagefolder", "image", EXTENSIONS)


class Listing(NamedTuple):
    """What is in a folder."""

    folders: list[str]
    """sorted; neither hidden nor an operating system's own"""
    files: list[str]
    """those of the right kind"""
    links: frozenset[str]
    """which of the folders are symbolic links"""
    skipped: list[tuple[str, str]]
    """everything else: the reason and the name"""


class Tree:
    """Folders as they are on the disk, each listed once."""

    def __init__(self, extensions: tuple[str, ...]) -> None:
        """Args: *extensions* of the files that are looked for."""
        self.extensions = extensions
        self._listings: dict[str, Listing] = {}
        self.linked = False
        """Whether any symbolic link was met, so that a file may be in two places."""

    def list(self, folder: str) -> Listing:
        if folder not in self._listings:
            self._listings[folder] = self._read(folder)
        return self._listings[folder]

    def _read(self, folder: str) -> Listing:
        folders, files, links, skipped = [], [], [], []
        with os.scandir(folder) as entries:
            for entry in entries:
                name, link = entry.name, entry.is_symlink()
                self.linked |= link
                if name.startswith("."):
                    skipped.append(("hidden", name))
                elif name.casefold() in SYSTEM:
                    skipped.append(("of the operating system", name))
                elif entry.is_dir():
                    if link and is_within(os.path.realpath(folder), os.path.realpath(entry.path)):
                        skipped.append(("a circular link", name))
                        continue
                    folders.append(name)
                    links += [name] if link else []
                elif not name.lower().endswith(self.extensions):
                    skipped.append((self._kind(name), name))
                elif link or entry.is_file():
                    files.append(name)  # a link that leads nowhere is an unreadable sample
                else:
                    skipped.append(("of no regular file", name))
        return Listing(sorted(folders), files, frozenset(links), sorted(skipped))

    def _kind(self, name: str) -> str:
        """Its extension: of "cat.gif.txt" both."""
        stem, extension = os.path.splitext(name.lower())
        if not extension:
            return "without an extension"
        return next((other for other in self.extensions if stem.endswith(other)), "") + extension

    def walk(self, folder: str) -> Iterator[tuple[str, Listing]]:
        """Each folder from *folder* down and what is in it. Symbolic links are followed, but not back to a folder above."""
        waiting: list[tuple[str, tuple[str, ...]]] = [(folder, (os.path.realpath(folder),))]
        while waiting:
            path, chain = waiting.pop()
            listing = self.list(path)
            circular = []
            for name in listing.folders:
                inner = os.path.join(path, name)
                if name not in listing.links:
                    waiting.append((inner, (*chain, os.path.join(chain[-1], name))))
                    continue
                target = os.path.realpath(inner)
                if any(is_within(real, target) for real in chain):
                    circular.append(("a circular link", name))
                else:
                    waiting.append((inner, (*chain, target)))
            yield path, listing._replace(skipped=listing.skipped + circular) if circular else listing

    def holds(self, folder: str) -> bool:
        """Whether there is a file of the right kind at any depth."""
        try:
            return any(listing.files for _, listing in self.walk(folder))
        except OSError:
            return True  # it cannot be known; whoever needs its files gets the error

    def holding(self, folder: str) -> list[str]:
        """The folders in *folder* that hold files of the right kind."""
        return [name for name in self.list(folder).folders if self.holds(os.path.join(folder, name))]


class Layout(NamedTuple):
    """Where the class folders of a split are."""

    folder: str
    classes: list[str]
    """The class folders in *folder*, sorted."""
    known: list[str]
    """All classes in the order of their labels: the training data's."""
    inner: dict[str, str]
    """For class folders that hold the splits: the split's folder in each."""
    hold_out: bool
    """Whether training and validation share the files, so that a part of each class is to be held out."""
    skipped: list[tuple[str, str]]
    """The reasons and paths of what lies beside the class folders."""


class Finder:
    """Finds the class folders of a split. In the order in which they are looked for:

    - folders named like splits, of class folders: ``train/CLASS/FILE`` and ``val/CLASS/FILE``,
    - a single folder that holds everything, in which the search goes on,
    - class folders of folders named like splits, ``CLASS/train/FILE`` and ``CLASS/val/FILE``,
    - class folders, ``CLASS/FILE``. They are used whole, or divided where training and validation share them.
    """

    def __init__(self, tree: Tree, opening: Opening, kind: Kind) -> None:
        self.tree, self.opening, self.kind = tree, opening, kind
        self.split, self.known, self.key, self.noun = opening.split, opening.classes, opening.key, kind.noun
        self.skipped: list[tuple[str, str]] = []

    def find(self, root: str) -> Layout:
        """Look in the folder *root*. Raises `UserError`, or `OSError` where a folder cannot be listed."""
        holding = self.tree.holding(root)
        if not self._are_classes(holding) and (splits := self._splits(root, holding)) is not None:
            return self._in_splits(root, *splits)
        if (inner := self._wrapped(root, holding)) is not None:
            self._skip_beside(root, [inner])
            return self.find(os.path.join(root, inner))
        return self._class_folders(root, self.opening.shared, may_hold_splits=True)

    def _are_classes(self, names: Sequence[str]) -> bool:
        """Whether the folders *names* are known to be classes."""
        return self.known is not None and bool(names) and set(names) <= set(self.known)

    # train/CLASS/FILE

    def _splits(self, root: str, holding: list[str]) -> tuple[str | None, str | None] | None:
        """The folders of the training and of the validation split in *root*, None for one that is missing; None for neither."""
        named = {name: found for name in self.tree.list(root).folders if (found := split_name(name)) is not None}
        # Those with folders in them: a class that happens to be called "train" holds its images itself.
        named = {name: found for name, found in named.items() if self.tree.list(os.path.join(root, name)).folders}
        rests = [
            rest for rest in dict.fromkeys(found.rest for found in named.values())
            if not rest or {"train"} < {found.role for found in named.values() if found.rest == rest}
        ]  # fmt: skip
        if not rests:
            return None
        if len(rests) > 1 and "" not in rests:
            both = [f"{root}/{next(name for name, found in named.items() if found.rest == rest)}" for rest in rests]
            raise self._ambiguous(root, f"the splits {both[0]} or {both[1]}", both[:2])
        chosen = "" if "" in rests else rests[0]
        train = self._one(root, [name for name, found in named.items() if found == ("train", chosen)])
        vals, tests = ([name for name, found in named.items() if found == (role, chosen)] for role in ("val", "test"))
        val = first_val(vals) or self._one(root, vals) or self._one(root, tests)
        if val in vals and "test" in tests and val not in VAL_FOLDERS:
            self._one(root, [val, "test"])  # earlier versions took test/
        self._one(root, [name for name in named if val and name.casefold() == val.casefold()])
        others = [name for name in holding if split_name(name) is None]
        mixed = [name for name in (train, val) if name is not None and self.tree.list(os.path.join(root, name)).files]
        if train is not None and val is not None:
            in_train, in_val = (self.tree.list(os.path.join(root, name)) for name in (train, val))
            alike = len({*in_train.folders} & {*in_val.folders})
            exact = train == "train" and val in VAL_FOLDERS
            if not mixed and (exact or not others or alike > 1):
                return train, val
            if mixed and max(len(in_train.files), len(in_val.files)) < alike:
                return train, val  # a few stray images beside the class folders
            if mixed and not alike:
                return None
        elif not others and not mixed:
            return train, val
        elif others and (mixed or (train or val) not in ("train", *VAL_FOLDERS)):
            return None  # a class among others
        paths = [os.path.join(root, name) for name in (train, val) if name is not None]
        raise self._ambiguous(root, f"{_named(holding)} as classes or {train or val}/ as a split", paths)

    def _one(self, root: str, names: list[str]) -> str | None:
        """The only one of *names*."""
        if len(names) > 1:
            paths = [os.path.join(root, name) for name in names]
            raise self._ambiguous(root, f"{names[0]}/ or {names[1]}/ as a split", paths)
        return names[0] if names else None

    def _in_splits(self, root: str, train: str | None, val: str | None) -> Layout:
        has, fix = f"{root!r} has {val or train}/", "add one, or name this split's folder itself"
        name, hold_out = part_for(self.opening, train, val, has=has, fix=fix, slash="/")
        if self.split == "train" or val is None:
            self._skip_beside(root, [name for name in (train, val) if name is not None])
        else:
            self.skipped.clear()  # the training split reports it
        folder = self._unwrapped(os.path.join(root, name))
        found = self._class_folders(folder, hold_out, may_hold_splits=False)
        if self.split == "val" and train is not None and val is not None and self.known is None:
            # Labels follow the training folder's classes, also where validation lacks one.
            labelled = Finder(self.tree, self.opening._replace(split="train"), self.kind)
            names = labelled._class_folders(labelled._unwrapped(os.path.join(root, train)), False, may_hold_splits=False).known
            found = found._replace(known=names)
        return found

    # A single folder that holds everything

    def _unwrapped(self, folder: str) -> str:
        while (inner := self._wrapped(folder, self.tree.holding(folder))) is not None:
            self._skip_beside(folder, [inner])
            folder = os.path.join(folder, inner)
        return folder

    def _wrapped(self, root: str, holding: list[str]) -> str | None:
        """The folder in *root* that holds everything, where there are several class folders or splits in it."""
        if self._are_classes(holding):
            return None
        generic = [name for name in holding if name.casefold() in GENERIC and self._leads_on(os.path.join(root, name))]
        if len(holding) > 1:
            if generic:
                paths = [os.path.join(root, name) for name in generic]
                raise self._ambiguous(root, f"{_named(holding)} as classes or the classes in {generic[0]}/", paths)
            return None
        if not holding or not self._leads_on(os.path.join(root, holding[0])):
            return None
        name, path = holding[0], os.path.join(root, holding[0])
        listing, inside = self.tree.list(path), self.tree.holding(path)
        empty = [other for other in self.tree.list(root).folders if other != name and other.casefold() not in COMPANIONS]
        splits = [inner for inner in inside if split_name(inner) is not None]
        if (empty and not generic) or (listing.files and not splits):
            raise self._ambiguous(root, f"{name} as a class or {_named(inside)} as classes", [path])
        return name

    def _leads_on(self, folder: str) -> bool:
        """Whether there are several class folders, or splits, in *folder* or in the only folder in it."""
        inside = self.tree.holding(folder)
        if len(inside) != 1:
            return len(inside) > 1
        inner = os.path.join(folder, inside[0])
        if split_name(inside[0]) is not None and self.tree.holding(inner):
            return True
        return not self.tree.list(folder).files and self._leads_on(inner)

    # Class folders

    def _class_folders(self, folder: str, hold_out: bool, *, may_hold_splits: bool) -> Layout:
        listing, holding = self.tree.list(folder), self.tree.holding(folder)
        companions = [name for name in listing.folders if name.casefold() in COMPANIONS]
        unused = [name for name in companions if name not in holding]
        names = [name for name in listing.folders if name not in unused]
        if not names:
            raise UserError(
                f"{self.key}: {folder!r} holds no class folder; put each class's {self.noun}s in a folder named after it"
            )
        if empty := next((name for name in names if name not in holding), None):
            raise UserError(
                f"{self.key}: class folder {os.path.join(folder, empty)!r} holds no {self.noun} "
                f"({', '.join(self.tree.extensions)}); add some, or remove it"
            )
        self._check_names(folder, names, companions, unused)
        inner = self._splits_of_classes(folder, names) if may_hold_splits else {}
        self._check_insides(folder, [os.path.join(name, inner.get(name, "")) for name in names])
        self._skip_beside(folder, names)
        known = list(self.known) if self.known is not None else names
        return Layout(folder, names, known, inner, hold_out and not inner, self.skipped)

    def _check_names(self, folder: str, names: list[str], companions: list[str], unused: list[str]) -> None:
        """Raise `UserError` where the folders may be something else than classes."""
        if self._are_classes(names):
            return
        found = [name.role for name in map(split_name, names) if name is not None and not name.rest]
        if len(names) == len(found) and "train" in found and len(set(found)) > 1:
            raise UserError(
                f"{self.key}: {folder!r} could hold splits without class folders, or the classes {_named(names)}: put a folder "
                "for each class in them, or list the classes in data.classes"
            )
        flat = [name for name in names if name.casefold() in GENERIC]
        if len(names) == 1 and flat and unused:
            raise UserError(
                f"{self.key}: {os.path.join(folder, flat[0])!r} holds {self.noun}s without class folders, and {unused[0]}/ is "
                f"not read: put each class's {self.noun}s in a folder named after it"
            )
        if len(names) > 1 and (used := [name for name in companions if name in names]):
            raise UserError(
                f"{self.key}: {os.path.join(folder, used[0])!r} could be a class or describe the others: move it away, or list "
                "the classes in data.classes"
            )
        same: dict[str, str] = {}
        for name in names:
            # Two forms of one name that look the same, as Macs and others write them, or a link to another class.
            forms = [unicodedata.normalize("NFC", name)]
            forms += [os.path.realpath(os.path.join(folder, name))] if self.tree.list(folder).links else []
            for form in forms:
                if (other := same.setdefault(form, name)) != name:
                    raise UserError(f"{self.key}: {folder!r} has one class as {other!r} and {name!r}: remove one of them")

    def _check_insides(self, folder: str, names: list[str]) -> None:
        """Raise `UserError` where the folders *names*, of classes, all hold the same folders: they may be folds or domains."""
        if self.known is not None or len(names) < 2:
            return
        paths = [os.path.join(folder, name).rstrip(os.sep) for name in names]
        inside = [set() if self.tree.list(path).files else set(self.tree.holding(path)) for path in paths]
        if len(alike := sorted(set.intersection(*inside))) > 1:
            plain = _named([name.rstrip(os.sep) for name in names])
            raise self._ambiguous(folder, f"{plain} as classes or {_named(alike)}, which are in each of them", paths[:1])

    def _splits_of_classes(self, folder: str, names: list[str]) -> dict[str, str]:
        """The folder of the split in each class folder, where all of them hold the splits."""
        found: dict[str, dict[Role, list[str]]] = {}
        for name in names:
            path = os.path.join(folder, name)
            roles: dict[Role, list[str]] = {}
            inside = [] if self.tree.list(path).files else self.tree.holding(path)
            for inner in inside:
                if (role := split_name(inner)) is not None and not role.rest:
                    roles.setdefault(role.role, []).append(inner)
            if "train" in roles and len(roles) > 1 and sum(map(len, roles.values())) == len(inside):
                found[name] = roles
        if not found:
            return {}
        if other := next((name for name in names if name not in found), None):
            raise UserError(
                f"{self.key}: {folder!r} could mean splits in each class or folders of one class: {next(iter(found))}/ holds "
                f"folders for training and validation, {other}/ does not; give all of them both"
            )
        val: Role = "val" if any("val" in roles for roles in found.values()) else "test"
        inner = {}
        for name, roles in found.items():
            path = os.path.join(folder, name)
            chosen = self._one(path, roles.get(val if self.split == "val" else "train", []))
            if chosen is None:
                raise UserError(f"{self.key}: {path!r} has no folder {val}/ as the other classes have; add one")
            inner[name] = chosen
        return inner

    # Messages

    def _skip_beside(self, folder: str, taken: list[str]) -> None:
        """Note what is in *folder* besides the folders *taken*."""
        listing = self.tree.list(folder)
        self.skipped += [(reason, os.path.join(folder, name)) for reason, name in listing.skipped]
        self.skipped += [("in no class folder", os.path.join(folder, name)) for name in sorted(listing.files)]
        self.skipped += [("folders beside", os.path.join(folder, name, "")) for name in listing.folders if name not in taken]

    def _ambiguous(self, root: str, choices: str, paths: Sequence[str]) -> UserError:
        shown = either([f"{self.kind.dataset}:{path}" for path in paths])
        how = f"name the folder, {shown}, or list the classes in data.classes"
        return UserError(f"{self.key}: {root!r} could mean {choices}: {how}")


def _named(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
