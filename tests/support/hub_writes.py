"""How the test Hub takes files: preupload, large file storage, commits, tags, pull requests."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

from aiohttp import web

from tests.support.hub_cards import complaints
from tests.support.hub_reads import PAGES, REPO, Access, truthy
from tests.support.hub_store import Refusal, Repository

REPOSITORY_NAME = re.compile(r"[A-Za-z0-9]([\w.-]{0,94}\w)?")
REFERENCE_NAME = re.compile(r"(?!refs/|[0-9a-f]{40}$)[\w.+-]+(/[\w.+-]+)*")
STALE = "A commit has happened since. Please refresh and try again."


class Writing:
    """Everything that changes something; `storage` is the address of the host of large files."""

    def __init__(self, access: Access) -> None:
        self.access, self.store = access, access.store
        self.storage = ""

    def add_to(self, app: web.Application) -> None:
        for word in ("preupload", "commit", "tag", "branch"):
            app.router.add_post(f"{REPO}/{word}/{{rev}}", getattr(self, word))
        app.router.add_delete(REPO + "/{what:tag|branch}/{rev}", self.forget)
        app.router.add_get(REPO + "/discussions/{number}", self.discussion)
        app.router.add_post(REPO + "/discussions/{number}/merge", self.merge)
        app.router.add_put(REPO + "/settings", self.settings)
        app.router.add_post("/api/validate-yaml", self.validate)
        app.router.add_post("/api/repos/create", self.create)
        app.router.add_delete("/api/repos/delete", self.delete)
        for page in PAGES:
            app.router.add_post(page + ".git/info/lfs/objects/batch", self.batch)
            app.router.add_post(page + ".git/info/lfs/objects/verify", self.verify)
        app.router.add_put("/storage/{kind}/{repo:[^/]+/[^/]+}/{oid}", self.put)

    async def validate(self, request: web.Request) -> web.Response:
        body = await request.json()
        errors = complaints(body["content"], f"{body.get('repoType') or 'model'}s")
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        return web.json_response(answer, status=400 if errors else 200)

    # Repositories

    async def create(self, request: web.Request) -> web.Response:
        body = await request.json()
        kind = f"{body.get('type') or 'model'}s"
        owner = body.get("organization") or self.access.user(request)
        user, name = self.access.creator(request, kind, owner), f"{owner}/{body['name']}"
        if not REPOSITORY_NAME.fullmatch(body["name"]) or "--" in name or ".." in name:
            raise Refusal(400, f"Invalid repo name: {name}")
        address = f"{request.url.origin()}/{'datasets/' if kind == 'datasets' else ''}{name}"
        if (kind, name) in self.store.repositories:
            refusal = Refusal(409, f"You already created this {kind[:-1]} repo")
            refusal.body["url"] = address
            raise refusal
        self.store.create(kind, name, private=is_private(body), author=user)
        return web.json_response({"url": address, "name": name})

    async def delete(self, request: web.Request) -> web.Response:
        body = await request.json()
        owner = body.get("organization") or self.access.user(request)
        kind, name = f"{body.get('type') or 'model'}s", f"{owner}/{body['name'].split('/')[-1]}"
        self.access.find(request, kind, name, write=True)
        del self.store.repositories[kind, name]
        return web.Response(text="OK")

    async def settings(self, request: web.Request) -> web.Response:
        repository = self.access.repository(request, write=True)
        repository.private = is_private(await request.json())
        return web.json_response({"private": repository.private})

    # Files

    async def preupload(self, request: web.Request) -> web.Response:
        """Which files go into the commit itself, which to storage, and which are there already."""
        self.access.user(request)
        repository = self.access.repository(request, write=not truthy(request, "create_pr"))
        head, answers = repository.resolve(request.match_info["rev"]), []
        for file in (await request.json())["files"]:
            sample = base64.b64decode(file.get("sample") or "")
            large = repository.goes_to_storage(file["path"], file["size"], sample)
            mode = "lfs" if large else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if known := head.files.get(file["path"]):
                answer["oid"] = known.etag
            answers.append(answer)
        return web.json_response({"files": answers, "commitOid": head.id})

    async def batch(self, request: web.Request) -> web.Response:
        self.access.user(request)
        repository, objects = self.access.repository(request), []
        for wanted in (await request.json())["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if wanted["oid"] not in repository.uploaded:
                place = f"{repository.kind}/{repository.name}/{wanted['oid']}"
                page = f"{request.url.origin()}/{repository.prefix}"
                answer["actions"] = {
                    "upload": {"href": f"{self.storage}/storage/{place}"},
                    "verify": {"href": f"{page}.git/info/lfs/objects/verify"},
                }
            objects.append(answer)
        return web.json_response({"transfer": "basic", "objects": objects})

    async def put(self, request: web.Request) -> web.Response:
        """A large file, kept only where it is what its address says."""
        where, digest = request.match_info, hashlib.sha256()
        partial = self.store.contents.folder / f"{where['oid']}.{id(request)}"
        with partial.open("wb") as out:
            async for chunk in request.content.iter_chunked(1 << 20):
                digest.update(chunk)
                out.write(chunk)
        if digest.hexdigest() != where["oid"]:
            partial.unlink()
            raise Refusal(400, "The content does not match its sha256")
        partial.rename(partial.with_suffix(""))
        self.store.repositories[where["kind"], where["repo"]].uploaded.add(where["oid"])
        return web.Response()

    async def verify(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["oid"] not in self.access.repository(request).uploaded:
            raise Refusal(404, "Object does not exist")
        return web.json_response({"success": True})

    async def commit(self, request: web.Request) -> web.Response:
        """One commit, on the head it was made for or not at all."""
        user, new_pull = self.access.user(request), truthy(request, "create_pr")
        repository = self.access.repository(request, write=not new_pull)
        lines = [json.loads(line) for line in (await request.read()).splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        revision = request.match_info["rev"]
        head, parent = repository.resolve(revision), header.get("parentCommit")
        if parent and not new_pull and head.id != parent:
            raise Refusal(412, STALE)
        files = head.files if parent is None else repository.resolve(parent).files
        operations = [line for line in lines if line["key"] != "header"]
        after = repository.changed(files, operations)
        page = f"{request.url.origin()}/{repository.prefix}"
        answer: dict[str, Any] = {"success": True, "hookOutput": ""}
        if new_pull:
            number = repository.open(header["summary"], parent or head.id, user)
            ref = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{page}/discussions/{number}"
        else:
            ref = branch_of(repository, revision)
        message = "\n\n".join(filter(None, (header["summary"], header.get("description"))))
        made = repository.add(ref, after, user, message)
        answer |= {"commitOid": made.id, "commitUrl": f"{page}/commit/{made.id}"}
        return web.json_response(answer)

    # References

    async def tag(self, request: web.Request) -> web.Response:
        body = await request.json()
        return self.point(request, f"refs/tags/{body['tag']}", request.match_info["rev"])

    async def branch(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else {}
        start = body.get("startingPoint") or "main"
        return self.point(request, f"refs/heads/{request.match_info['rev']}", start)

    def point(self, request: web.Request, ref: str, revision: str) -> web.Response:
        """A new reference; one that exists stays where it is."""
        repository = self.access.repository(request, write=True)
        commit = repository.resolve(revision)
        if not REFERENCE_NAME.fullmatch(ref.split("/", 2)[2]):
            raise Refusal(400, f"Invalid reference name: {ref}")
        if ref in repository.refs:
            raise Refusal(409, f"Reference already exists: {ref}")
        repository.point(ref, commit)
        return web.json_response({})

    async def forget(self, request: web.Request) -> web.Response:
        repository, where = self.access.repository(request, write=True), request.match_info
        kind = {"tag": "tags", "branch": "heads"}[where["what"]]
        if repository.refs.pop(f"refs/{kind}/{where['rev']}", None) is None:
            raise Refusal(404, f"Invalid rev id: {where['rev']}", "RevisionNotFound")
        return web.json_response({})

    # Pull requests

    async def discussion(self, request: web.Request) -> web.Response:
        repository, number = self.access.repository(request), int(request.match_info["number"])
        if number not in repository.pulls:
            raise Refusal(404, "Discussion not found")
        return web.json_response(repository.discussion(number))

    async def merge(self, request: web.Request) -> web.Response:
        repository = self.access.repository(request, write=True)
        number = int(request.match_info["number"])
        repository.merge(number, self.access.user(request))
        event = repository.event(number, "status-change", {"status": "merged"})
        return web.json_response({"newMessage": event})


def is_private(body: dict[str, Any]) -> bool:
    return body.get("visibility") == "private" or body.get("private") is True


def branch_of(repository: Repository, revision: str) -> str:
    """The reference a commit moves; tags and commits don't move."""
    ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
    if ref not in repository.refs:
        raise Refusal(400, f"Can't commit to {revision}: not a branch")
    return ref
