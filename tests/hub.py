"""A stand-in of the model hub on 127.0.0.1, as far as a download asks it, and its ways to fail.

    hub = Hub(folder)                                # serves folder/OWNER/NAME/... at hub.address
    hub.faults["OWNER/NAME"] = Fault("drop", files="safetensors", size=1000, times=2)
    hub.log            # what was asked: "GET /path", "GET /path from 1000", "CONNECT other.host"
    hub.fetched()      # the files among it
"""
import hashlib
import json
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".bin", ".safetensors", ".h5", ".msgpack", ".ot", ".onnx")


@dataclass
class Fault:
    """kind: gated (who has no token), refused (whose token has no access), missing, drop (the
    connection ends before byte `size` of a file), or a status of HTTP. files: a regular expression
    of names; "" is everything, the repository's page of facts as well. times: how often, after
    which all is well."""
    kind: str | int
    files: str = ""
    size: int = 1000
    times: int = 10 ** 9


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Answer)
        self.root, self.faults, self.log, self.lock = Path(root), {}, [], threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(.01,), daemon=True).start()

    def handle_error(self, request, client):
        """A client that hangs up is no error here."""

    def fetched(self, repo=None):
        """owner/name/file of each file that was asked for; of one repository, file."""
        found = set()
        for line in self.log:
            m = re.fullmatch(r"GET /([^/]+/[^/]+)/resolve/[^/]+/(\S+)( from \d+)?", line)
            if m and repo in (None, m[1]):
                found.add(m[2] if repo else f"{m[1]}/{m[2]}")
        return found


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in ({"Content_Length": len(body)} | headers).items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, text):
        self.answer(status, {"error": text}, X_Error_Code=code, X_Error_Message=text)

    def do_HEAD(self):
        self.do_GET()

    def do_CONNECT(self):
        """As somebody's proxy: who asks for another host is written down and turned away."""
        self.server.log.append(f"CONNECT {self.path}")
        self.answer(502)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        part = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        self.server.log.append(f"{self.command} {path}" + (f" from {part[1]}" if part else ""))
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo = (info or file or [None, ""])[1]
        if not repo or not (self.server.root / repo).is_dir():
            return self.refuse(401, "RepoNotFound", "Repository not found")
        sha = hashlib.sha1(repo.encode()).hexdigest()
        what, revision, *under = ((info[2] if info else None) or "/revision/main")[1:].split("/")
        if what not in ("revision", "tree") or revision not in ("main", sha):
            return self.refuse(404, "RevisionNotFound", "no such revision")
        if under:
            return self.refuse(404, "EntryNotFound", "no such folder")
        fault = self.fault(repo, file and file[3])
        if fault and fault.kind in ("gated", "refused"):
            text = f"Access to model {repo} is restricted and you are not in the authorized list."
            return self.refuse(401 if fault.kind == "gated" else 403, "GatedRepo", text)
        if fault and fault.kind == "missing":
            return self.refuse(401, "RepoNotFound", "Repository not found")
        if fault and fault.kind != "drop":
            return self.answer(fault.kind, {"error": "as the fault says"})
        if file:
            return self.file(self.server.root / repo / file[3], sha, part, fault)
        return self.facts(repo, sha, what == "tree")

    def fault(self, repo, file):
        """What is to fail now, and one time less of it."""
        fault = self.server.faults.get(repo)
        if not fault or fault.files and not (file and re.search(fault.files, file)):
            return None
        if fault.kind == "drop" and (self.command == "HEAD" or not file):
            return None
        with self.server.lock:
            fault.times -= 1
            return fault if fault.times >= 0 else None

    def facts(self, repo, sha, tree):
        """The files of a repository, in the two shapes that the hub has."""
        rows, folder = [], self.server.root / repo
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name, size = path.relative_to(folder).as_posix(), path.stat().st_size
            row = {"type": "file", "path": name, "oid": etag(path)[:40], "size": size}
            large = {"size": size, "pointerSize": 134}
            if name.endswith(LARGE):
                row["lfs"] = large | {"oid" if tree else "sha256": etag(path)}
            rows.append(row if tree else row | {"rfilename": name, "blobId": row["oid"]})
        if tree:
            return self.answer(200, rows)
        return self.answer(200, {"_id": "1", "id": repo, "modelId": repo, "sha": sha,
                                 "private": False, "gated": False, "tags": [], "siblings": rows,
                                 "lastModified": "2025-02-03T06:45:16.000Z"})

    def file(self, path, sha, part, fault):
        if not path.is_file():
            return self.answer(404, b"Entry not found", X_Error_Code="EntryNotFound",
                               X_Repo_Commit=sha)
        body, size = path.read_bytes(), path.stat().st_size
        known = {"X_Repo_Commit": sha, "ETag": f'"{etag(path)}"', "Accept_Ranges": "bytes"}
        if part:
            start = int(part[1])
            known["Content_Range"] = f"bytes {start}-{size - 1}/{size}"
            body = body[start:]
        if fault:                                    # a drop
            known["Content_Length"], self.close_connection = len(body), True
            body = body[:max(0, fault.size - (size - len(body)))]
        return self.answer(206 if part else 200, body, **known)


def etag(path):
    """The hub's: the sum of a large file, git's name of a small one."""
    body = path.read_bytes()
    if path.name.endswith(LARGE):
        return hashlib.sha256(body).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
