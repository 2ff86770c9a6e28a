"""Pushing to and loading from the Hugging Face Hub, against a server of its file layout on this machine."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from conftest import WINDOW, random_gpt2
from torch.testing import assert_close

from recur_gpt2 import InputError, RecurGPT2LMHeadModel
from recur_gpt2.models.model_card import model_card

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: {"user/name": {path: content}}."""

    def log_message(self, *_):
        pass

    def answer(self, status=200, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            request = json.loads(body)
            name = "/".join(filter(None, (request.get("organization") or "user", request["name"])))
            self.server.repos.setdefault(name, {})
            self.answer(content={"url": f"{self.server.url}/{name}", "id": name, "name": name})
        elif self.path == "/api/validate-yaml":
            self.answer(content={"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer(content={"files": [{"path": each["path"], **how} for each in json.loads(body)["files"]]})
        elif parts[4] == "commit":
            files = self.server.repos["/".join(parts[2:4])]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.url}/{'/'.join(parts[2:4])}/commit/{COMMIT}"
            self.answer(content={"commitOid": COMMIT, "commitUrl": url, "success": True})
        else:
            self.answer(404)

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api" and "/".join(parts[2:4]) in self.server.repos:
            name = "/".join(parts[2:4])
            files = [{"rfilename": path} for path in self.server.repos[name]]
            self.answer(content={"id": name, "sha": COMMIT, "siblings": files, "tags": [], "private": False})
            return
        content = self.server.repos.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
        if content is None:
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            self.answer(content=content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.url = {}, f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "hf_x"}
    yield SimpleNamespace(repos=server.repos, environment={**os.environ, **environment, "HF_HUB_OFFLINE": "0"})
    server.shutdown()


def run(hub, code):
    """In a process of its own: the endpoint is read when the library is imported."""
    done = subprocess.run([sys.executable, "-c", code], env=hub.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_what_is_pushed_has_a_card_and_loads_by_its_name(hub, tmp_path):
    random_gpt2().save_pretrained(tmp_path / "gpt2")
    model = RecurGPT2LMHeadModel.from_gpt2(tmp_path / "gpt2", window=WINDOW, last_slots=3)
    model.save_pretrained(tmp_path / "ours")
    rows = [{"name": "recurrent", "token_ppl": 51.1, "word_ppl": 817.3, "bits_per_byte": 1.658}]
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"rows": rows, "settings": {"data": "pg19-sample"}}), encoding="utf-8")
    load = f"from recur_gpt2 import RecurGPT2LMHeadModel as M\nm = M.from_pretrained({str(tmp_path / 'ours')!r})\n"
    run(hub, f"{load}m.push_to_hub('user/reader', results={str(results)!r})")
    files = hub.repos["user/reader"]
    assert {"config.json", "model.safetensors", "README.md"} <= files.keys()
    card = files["README.md"].decode()
    assert 'RecurGPT2LMHeadModel.from_pretrained("user/reader")' in card
    assert f"| window | {WINDOW} tokens |" in card
    assert "| recurrent | 51.10 | 817.3 | 1.658 |" in card
    assert "long-documents" in card

    files["README.md"] = card.replace("# reader", "# my own words").encode()
    run(hub, f"{load}m.push_to_hub('user/reader')")
    assert "# my own words" in files["README.md"].decode()

    code = "import recur_gpt2, torch\nfrom transformers import AutoModelForCausalLM as A\n"
    code += (
        "m = A.from_pretrained('user/reader')\nprint(type(m).__name__, float(m(torch.arange(40)[None]).logits.sum()))"
    )
    name, total = run(hub, code).split()
    assert name == "RecurGPT2LMHeadModel"
    assert_close(torch.tensor(float(total)), model(torch.arange(40)[None]).logits.sum().detach(), atol=1e-2, rtol=1e-4)


def test_results_of_something_else_are_refused(make_model, tmp_path):
    config = make_model("default").config
    (tmp_path / "results.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"holds no results of a comparison .*; give its results\.json"):
        model_card(config, "RecurGPT2LMHeadModel", "user/name", tmp_path / "results.json")
