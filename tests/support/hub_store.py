"""What the test Hub keeps: repositories with commits, references and large files. No HTTP here."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.support.hub_cards import complaints

REGULAR_LIMIT = 10_000_000  # bytes a commit may carry itself; more goes to large file storage
LARGE = "filter=lfs diff=lfs merge=lfs -text"
LARGE_SUFFIXES = ("arrow", "bin", "gz", "npy", "npz", "parquet", "pt", "safetensors", "zip", "zst")
ATTRIBUTES = "".join(f"*.{suffix} {LARGE}\n" for suffix in LARGE_SUFFIXES).encode()


class Refusal(Exception):
    """What the Hub answers instead of doing what was asked."""

    def __init__(
        self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}
        self.body: dict[str, Any] = {"error": message}


@dataclass(frozen=True)
class File:
    """One version of a file; `sha256` is set where large file storage holds the content."""

    oid: str  # git's id of the content, or of the pointer to it
    size: int
    sha256: str = ""

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    def entry(self, path: str) -> dict[str, Any]:
        """The file as trees and paths-info show it."""
        entry: dict[str, Any] = {"type": "file", "oid": self.oid, "size": self.size, "path": path}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 130}
        return entry


@dataclass(frozen=True)
class Commit:
    """A state of all files, and who made it out of which."""

    id: str
    parent: str | None
    files: Mapping[str, File]
    author: str
    title: str
    message: str
    date: str


class Contents:
    """The bytes of all files, each on disk under its hash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, content: bytes) -> File:
        file = File(git_id("blob", content), len(content))
        self.path(file).write_bytes(content)
        return file

    def path(self, file: File) -> Path:
        return self.folder / file.etag

    def read(self, file: File) -> bytes:
        return self.path(file).read_bytes()

    def large(self, sha256: str) -> File:
        size = (self.folder / sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return File(git_id("blob", pointer.encode()), size, sha256)


def git_id(kind: str, content: bytes) -> str:
    """Git's own id: clients compute it too, to leave out files that have not changed."""
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(content)) + content).hexdigest()


@dataclass
class Repository:
    """A dataset or a model; `refs` are full names (refs/heads/main, refs/tags/…, refs/pr/…)."""

    kind: str  # datasets or models, as in the addresses
    name: str  # owner/name
    private: bool
    contents: Contents
    refs: dict[str, str] = field(default_factory=dict)
    known: dict[str, Commit] = field(default_factory=dict)
    uploaded: set[str] = field(default_factory=set)  # sha256 of the large files it was given
    pulls: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        return f"datasets/{self.name}" if self.kind == "datasets" else self.name

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a full reference, or a commit id of 7 digits or more."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.known[self.refs[ref]]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            found = [commit for id, commit in self.known.items() if id.startswith(revision)]
            if len(found) == 1:
                return found[0]
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits of a revision, newest first."""
        commits, commit = [], self.resolve(revision)
        while True:
            commits.append(commit)
            if commit.parent is None:
                return commits
            commit = self.known[commit.parent]

    def add(self, ref: str, files: Mapping[str, File], author: str, message: str) -> Commit:
        """A new commit on a reference; the reference is made where it does not exist."""
        return self.point(ref, self.make(self.refs.get(ref), files, author, message))

    def make(
        self, parent: str | None, files: Mapping[str, File], author: str, message: str
    ) -> Commit:
        title, _, rest = message.partition("\n\n")
        facts = [parent, sorted((path, file.oid) for path, file in files.items()), author, message]
        id = git_id("commit", json.dumps([*facts, len(self.known)]).encode())
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        commit = Commit(id, parent, dict(sorted(files.items())), author, title, rest, date)
        self.known[id] = commit
        return commit

    def point(self, ref: str, commit: Commit) -> Commit:
        self.refs[ref] = commit.id
        return commit

    def open(self, title: str, base: str, author: str) -> int:
        """A new pull request, not yet with a commit of its own."""
        number = len(self.pulls) + 1
        pull = {"title": title, "base": base, "author": author, "status": "open"}
        self.pulls[number] = pull
        self.refs[f"refs/pr/{number}"] = base
        return number

    def discussion(self, number: int) -> dict[str, Any]:
        """A pull request as its own page shows it."""
        pull = self.pulls[number]
        return {
            "num": number,
            "title": pull["title"],
            "author": {"name": pull["author"]},
            "status": pull["status"],
            "createdAt": self.known[pull["base"]].date,
            "isPullRequest": True,
            "repo": {"name": self.name, "type": self.kind[:-1]},
            "events": [],
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": [],
            "diff": "",
        }

    def event(self, number: int, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        author, date = {"name": self.pulls[number]["author"]}, self.resolve("main").date
        return {"id": "0", "type": kind, "author": author, "createdAt": date, "data": data}

    def merge(self, number: int, author: str) -> Commit:
        """What the pull request changed, as one commit on main."""
        pull = self.pulls[number]
        before = self.known[pull["base"]].files
        after = self.resolve(f"refs/pr/{number}").files
        files = dict(self.resolve("main").files)
        for path in {*before, *after}:
            if before.get(path) != after.get(path):
                files.pop(path, None)
                files |= {path: after[path]} if path in after else {}
        pull["status"] = "merged"
        return self.add("refs/heads/main", files, author, f"{pull['title']} (#{number})")

    def goes_to_storage(self, path: str, size: int, sample: bytes) -> bool:
        """Whether a file must be uploaded as a large one: by its name, its size, its bytes."""
        attributes = self.resolve("main").files.get(".gitattributes")
        lines = self.contents.read(attributes).decode().splitlines() if attributes else []
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        named = any(fnmatch.fnmatchcase(path.rsplit("/", 1)[-1], pattern) for pattern in patterns)
        return named or size > REGULAR_LIMIT or b"\0" in sample

    def changed(
        self, files: Mapping[str, File], operations: Iterable[Mapping[str, Any]]
    ) -> dict[str, File]:
        """The files after the lines of a commit."""
        files = dict(files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            if path.startswith("/") or {"", ".", "..", ".git"} & set(path.rstrip("/").split("/")):
                raise Refusal(400, f"Invalid path: {path!r}")
            if key == "file":
                files[path] = self._regular(path, base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[path] = self._large(path, value["oid"])
            else:
                self._remove(files, path, folder=key == "deletedFolder")
        return files

    def _regular(self, path: str, content: bytes) -> File:
        if len(content) > REGULAR_LIMIT or b"\0" in content:
            raise Refusal(400, f"Your push was rejected: {path} must go through LFS")
        if path == "README.md" and (errors := complaints(content.decode(), self.kind)):
            raise Refusal(400, "Invalid metadata in README.md: " + "; ".join(errors))
        return self.contents.keep(content)

    def _large(self, path: str, sha256: str) -> File:
        if sha256 not in self.uploaded:
            raise Refusal(
                400, f"Your push was rejected: an LFS pointer of {path} points to no file"
            )
        return self.contents.large(sha256)

    def _remove(self, files: dict[str, File], path: str, *, folder: bool) -> None:
        start = path.rstrip("/") + "/"
        gone = [name for name in files if (name.startswith(start) if folder else name == path)]
        if not gone:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]

    def tree(self, commit: Commit, under: str, *, recursive: bool) -> list[dict[str, Any]]:
        """Folders first, then files, each with its path from the root."""
        start = f"{under}/" if under else ""
        inside = {path: file for path, file in commit.files.items() if path.startswith(start)}
        if under and not inside:
            raise Refusal(404, f'{under} does not exist on "{commit.id}"', "EntryNotFound")
        folders = sorted({str(up) for path in inside for up in Path(path).parents} - {"."})
        entries = [folder(name, commit) for name in folders if name.startswith(start)]
        entries += [file.entry(path) for path, file in inside.items()]
        return [e for e in entries if recursive or "/" not in e["path"][len(start) :]]


def folder(path: str, commit: Commit) -> dict[str, Any]:
    inside = {p: f.oid for p, f in commit.files.items() if p.startswith(f"{path}/")}
    oid = git_id("tree", json.dumps(inside).encode())
    return {"type": "directory", "oid": oid, "size": 0, "path": path}


class Store:
    """All repositories of one Hub."""

    def __init__(self, folder: Path) -> None:
        self.contents = Contents(folder)
        self.repositories: dict[tuple[str, str], Repository] = {}

    def create(self, kind: str, name: str, *, private: bool, author: str) -> Repository:
        repository = Repository(kind, name, private, self.contents)
        files = {".gitattributes": self.contents.keep(ATTRIBUTES)}
        repository.add("refs/heads/main", files, author, "initial commit")
        self.repositories[kind, name] = repository
        return repository

    def change(
        self,
        repository: Repository,
        files: Mapping[str, bytes | None],
        *,
        revision: str = "main",
        author: str = "mallory",
    ) -> Commit:
        """Somebody else's commit: `None` deletes."""
        after = dict(repository.resolve(revision).files)
        for path, content in files.items():
            after.pop(path, None)
            after |= {} if content is None else {path: self.contents.keep(content)}
        return repository.add(f"refs/heads/{revision}", after, author, f"Change {', '.join(files)}")
