"""Who may ask the test Hub, and what it answers to those who read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from aiohttp import web

from tests.support.hub_cards import metadata
from tests.support.hub_store import Commit, File, Refusal, Repository, Store

REPO = "/api/{kind:datasets|models}/{repo:[^/]+/[^/]+}"
PAGES = ("/{kind:datasets}/{repo:[^/]+/[^/]+}", "/{repo:[^/]+/[^/]+}")  # models have no prefix


class Access:
    """Repositories as the sender of a request sees them; tokens have an owner and a role."""

    def __init__(
        self,
        store: Store,
        tokens: Mapping[str, tuple[str, str]],
        organizations: Mapping[str, set[str]],
    ) -> None:
        self.store, self.tokens, self.organizations = store, tokens, organizations

    def sender(self, request: web.Request) -> tuple[str | None, str]:
        """Who asks, and as what: "read", "write", or "" for nobody."""
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.tokens[token] if token else (None, "")

    def member(self, user: str | None, owner: str) -> bool:
        return user is not None and (user == owner or user in self.organizations.get(owner, ()))

    def user(self, request: web.Request) -> str:
        user, _ = self.sender(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return user

    def creator(self, request: web.Request, kind: str, owner: str) -> str:
        """The user, who may make a repository of this owner."""
        user = self.user(request)
        if self.sender(request)[1] != "write" or not self.member(user, owner):
            right = f'create a {kind[:-1]} under the namespace "{owner}"'
            raise Refusal(403, f"You don't have the rights to {right}")
        return user

    def repository(self, request: web.Request, *, write: bool = False) -> Repository:
        """The repository in the address of a request."""
        where = request.match_info
        return self.find(request, where.get("kind", "models"), where["repo"], write=write)

    def find(
        self, request: web.Request, kind: str, name: str, *, write: bool = False
    ) -> Repository:
        """A repository by its name; to others a private one is as good as missing."""
        repository, (user, role) = self.store.repositories.get((kind, name)), self.sender(request)
        member = self.member(user, name.split("/")[0])
        if repository is None or (repository.private and not member):
            if user is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write:
            self.user(request)
            if role != "write" or not member:
                raise Refusal(403, "Forbidden: you do not have write access to this repository")
        return repository


class Reading:
    """Everything that changes nothing; `storage` is the address of the host of large files."""

    def __init__(self, access: Access) -> None:
        self.access, self.contents = access, access.store.contents
        self.storage = ""
        self.page = 1000  # entries in one answer

    def add_to(self, app: web.Application) -> None:
        under_repository = {
            "": self.info,
            "/revision/{rev}": self.info,
            "/tree/{rev}": self.tree,
            "/tree/{rev}/{path:.+}": self.tree,
            "/refs": self.refs,
            "/commits/{rev}": self.commits,
        }
        for path, handler in under_repository.items():
            app.router.add_get(REPO + path, handler)
        app.router.add_post(REPO + "/paths-info/{rev}", self.paths_info)
        cached = REPO.replace("/api/", "/api/resolve-cache/")
        app.router.add_get(cached + "/{rev}/{path:.+}", self.content)
        for page in PAGES:
            app.router.add_get(page + "/resolve/{rev}/{path:.+}", self.resolve)
        app.router.add_get("/api/whoami-v2", self.whoami)
        app.router.add_get("/api/agent-harnesses", self.nothing)
        app.router.add_get("/storage/{kind}/{repo:[^/]+/[^/]+}/{oid}", self.stored)

    async def nothing(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def whoami(self, request: web.Request) -> web.Response:
        user = self.access.user(request)
        owned = [name for name, members in self.access.organizations.items() if user in members]
        role = self.access.sender(request)[1]
        auth = {"type": "access_token", "accessToken": {"role": role}}
        orgs = [{"type": "org", "name": name, "fullname": name} for name in owned]
        return web.json_response({"type": "user", "name": user, "auth": auth, "orgs": orgs})

    async def info(self, request: web.Request) -> web.Response:
        repository = self.access.repository(request)
        commit = repository.resolve(request.match_info.get("rev", "main"))
        readme = commit.files.get("README.md")
        card = metadata(self.contents.read(readme).decode()) if readme else {}
        answer = {
            "id": repository.name,
            "author": repository.name.split("/")[0],
            "sha": commit.id,
            "lastModified": commit.date,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [tag for tag in card.get("tags", []) if isinstance(tag, str)],
            "siblings": [{"rfilename": path} for path in commit.files],
            "cardData": json.loads(json.dumps(card, default=str)),
        }
        if chosen := request.query.getall("expand", []) + request.query.getall("expand[]", []):
            answer = {key: answer[key] for key in ("id", *chosen) if key in answer}
        return web.json_response(answer)

    def paged(self, request: web.Request, entries: list[dict[str, Any]]) -> web.Response:
        start = int(request.query.get("cursor", 0))
        end, headers = start + self.page, {}
        if end < len(entries):
            query = urlencode({**request.query, "cursor": str(end)})
            headers["Link"] = f'<{request.url.with_query(None)}?{query}>; rel="next"'
        return web.json_response(entries[start:end], headers=headers)

    async def tree(self, request: web.Request) -> web.Response:
        repository, where = self.access.repository(request), request.match_info
        commit, under = repository.resolve(where["rev"]), where.get("path", "").strip("/")
        return self.paged(
            request, repository.tree(commit, under, recursive=truthy(request, "recursive"))
        )

    async def paths_info(self, request: web.Request) -> web.Response:
        repository = self.access.repository(request)
        commit = repository.resolve(request.match_info["rev"])
        if request.content_type == "application/json":
            paths = (await request.json())["paths"]
        else:
            paths = (await request.post()).getall("paths", [])
        wanted = {str(path).strip("/") for path in paths}
        entries = repository.tree(commit, "", recursive=True)
        found = [entry for entry in entries if entry["path"] in wanted]
        for entry in found:
            entry["lastCommit"] = last_change(repository.history(commit.id), entry["path"])
        return web.json_response(found)

    async def refs(self, request: web.Request) -> web.Response:
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        answer: dict[str, Any] = {kind: [] for kind in kinds} | {"converts": []}
        for ref, commit in self.access.repository(request).refs.items():
            kind = next(kind for kind, start in kinds.items() if ref.startswith(start))
            name = ref if kind == "pullRequests" else ref.removeprefix(kinds[kind])
            answer[kind].append({"name": name, "ref": ref, "targetCommit": commit})
        if not truthy(request, "include_prs"):
            del answer["pullRequests"]
        return web.json_response(answer)

    async def commits(self, request: web.Request) -> web.Response:
        history = self.access.repository(request).history(request.match_info["rev"])
        return self.paged(request, [shown(commit) for commit in history])

    def file(self, request: web.Request) -> tuple[Repository, Commit, File]:
        repository, path = self.access.repository(request), request.match_info["path"]
        commit = repository.resolve(request.match_info["rev"])
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.id})
        return repository, commit, commit.files[path]

    async def resolve(self, request: web.Request) -> web.Response:
        """Where the content is: on the storage host for large files, at the Hub for others."""
        repository, commit, file = self.file(request)
        path = quote(request.match_info["path"])
        headers = {
            "X-Repo-Commit": commit.id,
            "X-Linked-Size": str(file.size),
            "X-Linked-ETag": f'"{file.etag}"',
        }
        if file.sha256:
            place = f"{repository.kind}/{repository.name}/{file.sha256}"
            headers["Location"] = f"{self.storage}/storage/{place}"
            return web.Response(status=302, headers=headers)
        place = f"{repository.kind}/{repository.name}/{commit.id}/{path}"
        return web.Response(
            status=307, headers={**headers, "Location": f"/api/resolve-cache/{place}"}
        )

    async def content(self, request: web.Request) -> web.Response:
        _, commit, file = self.file(request)
        content, part = self.contents.read(file), request.http_range
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if part.start is None and part.stop is None:
            return web.Response(body=content, headers=headers)
        start, stop, _ = part.indices(len(content))
        if start >= stop:
            raise Refusal(416, "Range Not Satisfiable")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return web.Response(status=206, body=content[start:stop], headers=headers)

    async def stored(self, request: web.Request) -> web.StreamResponse:
        path = self.contents.folder / request.match_info["oid"]
        if not path.exists():
            raise Refusal(404, "NoSuchKey")
        return web.FileResponse(path)


def truthy(request: web.Request, name: str) -> bool:
    return request.query.get(name, "").lower() in ("true", "1")


def last_change(history: list[Commit], path: str) -> dict[str, Any]:
    """The newest commit in which a file is as it is now, and was not before."""
    now, newest = history[0].files.get(path), history[0]
    for commit in history:
        if commit.files.get(path) != now:
            break
        newest = commit
    return {"id": newest.id, "title": newest.title, "date": newest.date}


def shown(commit: Commit) -> dict[str, Any]:
    authors = [{"user": commit.author}]
    facts = {"title": commit.title, "message": commit.message, "date": commit.date}
    return {"id": commit.id, "authors": authors, **facts}
