"""A stand-in for the W&B server on loopback: enough of its API for wandb 0.31 to run in online mode.

`runs`, `history` and `files` hold what was received. `die()` makes it refuse every request from then on.
"""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeWandb:
    def __init__(self):
        self.runs, self.history, self.files, self.artifacts = {}, {}, {}, []
        self.down = False
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words):
                pass

            def _answer(self):
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                if fake.down:
                    return self.send_error(503)
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                out = json.dumps(fake.handle(self.path, body)).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(out)))
                self.end_headers()
                return self.wfile.write(out)

            do_GET = do_POST = do_PUT = _answer  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *words: None  # a client that leaves in mid-request is no news
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.env = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40}
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def die(self):
        self.down = True

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def handle(self, path, body):
        if path == "/graphql":
            request = json.loads(body)
            return self._graphql(request.get("operationName"), request.get("variables") or {})
        if path.endswith("/file_stream"):
            run, message = path.split("/")[-2], json.loads(body)
            for name, chunk in (message.get("files") or {}).items():
                if name == "wandb-history.jsonl":
                    self.history.setdefault(run, []).extend(json.loads(line) for line in chunk["content"])
            if message.get("complete"):
                self.runs[run]["exitcode"] = message.get("exitcode")
        elif path.startswith("/upload/"):
            self.files[path.removeprefix("/upload/")] = body
        return {}

    def _graphql(self, operation, v):
        entity = {"id": "ZQ==", "name": "me"}
        if operation == "Viewer":
            teams = {"edges": [{"node": {"name": "me"}}]}
            viewer = {"id": "VQ==", "entity": "me", "username": "me", "email": "me@x", "flags": "{}", "teams": teams}
            return {"data": {"viewer": viewer}}
        if operation == "UpsertBucket":
            run = self.runs.setdefault(v["name"], {"inserts": 0})
            run["inserts"] += 1
            run.update({key: value for key, value in v.items() if value is not None})
            project = {"id": "UA==", "name": v.get("project") or "p", "entity": entity}
            bucket = {
                "id": "Uk==",
                "name": v["name"],
                "displayName": v.get("displayName") or v["name"],
                "description": "",
                "config": run.get("config"),
                "sweepName": None,
                "project": project,
                "historyLineCount": 0,
            }
            return {"data": {"upsertBucket": {"inserted": run["inserts"] == 1, "bucket": bucket}}}
        if operation == "RunResumeStatus":
            return {"data": {"model": {"id": "UA==", "name": "p", "entity": entity, "bucket": None}}}
        if operation == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/upload/{v['run']}/{f}"} for f in v["files"]]
            return {"data": {"createRunFiles": {"runID": "Uk==", "uploadHeaders": [], "files": files}}}
        if operation == "ServerFeaturesQuery":
            return {"data": {"serverInfo": {"features": []}}}
        if operation == "OrganizationCoreWeaveOrganizationID":
            return {"data": {"entity": {"organization": None}}}
        if operation == "CreateArtifact":
            self.artifacts.append(v)
        return {"data": None, "errors": [{"message": f"not faked: {operation}"}]}
