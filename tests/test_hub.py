"""The hub's own protocol, spoken by a small server here: parts and checkpoints come by id."""

import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from conftest import run

COMMIT = "0" * 39 + "1"


@pytest.fixture
def hub(tmp_path):
    """serve({id: folder or None}) starts a hub of these models, None being gated; its environment.

    Files asked for are kept in `serve.asked`.
    """
    asked, servers = [], []

    def serve(models):
        class Hub(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def reply(self, status, body=b"", **headers):
                self.send_response(status)
                headers = {"Content-Length": len(body), "X-Repo-Commit": COMMIT} | headers
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_GET(self):
                words = unquote(urlsplit(self.path).path).strip("/").split("/")
                words = words[2:] if words[0] == "api" else words
                name, rest = "/".join(words[:2]), words[2:]
                if name not in models:
                    return self.reply(404, X_Error_Code="RepoNotFound")
                if (folder := models[name]) is None:
                    message = f"Access to model {name} is restricted."
                    return self.reply(403, X_Error_Code="GatedRepo", X_Error_Message=message)
                files = [p for p in folder.rglob("*") if p.is_file()]
                names = [str(p.relative_to(folder)) for p in files]
                if rest[:1] == ["resolve"]:
                    if (file := "/".join(rest[2:])) not in names:
                        return self.reply(404, X_Error_Code="EntryNotFound")
                    asked.append(f"{name}/{file}")
                    body = (folder / file).read_bytes()
                    return self.reply(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"')
                if rest[:1] == ["tree"]:
                    made = [
                        {"type": "file", "path": n, "size": p.stat().st_size, "oid": COMMIT}
                        for n, p in zip(names, files, strict=True)
                        if n.startswith("/".join(rest[2:]))
                    ]
                else:
                    made = {
                        "id": name,
                        "sha": COMMIT,
                        "siblings": [{"rfilename": n} for n in names],
                    }
                self.reply(200, json.dumps(made).encode(), Content_Type="application/json")

            do_HEAD = do_GET

            def log_message(self, *rest):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
        }

    serve.asked = asked
    yield serve
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize("mllm, diffusion", [("llava", "sana"), ("qwen", "sd")])
def test_parts_and_checkpoints_come_by_id(hub, parts, tmp_path, mllm, diffusion):
    """Trained on parts by id, then drawn with from the checkpoint's id; nothing twice."""
    models = {"org/mllm": parts / mllm, "org/diffusion": parts / diffusion}
    environment = hub(models)
    made = run(
        [
            sys.executable,
            "train.py",
            "--mllm",
            "org/mllm",
            "--diffusion",
            "org/diffusion",
            "--steps",
            "1",
            "--batch-size",
            "1",
            "--num-queries",
            "4",
            "--connector-layers",
            "1",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "run"),
        ],
        **environment,
    )
    assert made.returncode == 0, made.stderr
    step = tmp_path / "run" / "step-00000001"
    assert json.loads((step / "config.json").read_text())["mllm"] == "org/mllm"
    assert any(file.endswith(".safetensors") for file in hub.asked)
    models["org/trained"] = step
    hub.asked.clear()
    draw = [
        sys.executable,
        "sample.py",
        "a star",
        "--checkpoint",
        "org/trained",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "a.png"),
        "--device",
        "cpu",
    ]
    made = run(draw, **environment)
    assert made.returncode == 0 and (tmp_path / "a.png").exists(), made.stderr
    assert "org/trained/model.safetensors" in hub.asked
    (tmp_path / "a.png").unlink()
    made = run(draw, **environment | {"HF_HUB_OFFLINE": "1"})
    assert made.returncode == 0 and (tmp_path / "a.png").exists(), made.stderr


def test_what_cannot_be_loaded_is_one_line(hub, parts, tmp_path):
    """A gated model and one that does not exist: the id and what to do, exit code 2."""
    environment = hub({"org/gated": None})
    for name in ("org/gated", "org/missing"):
        made = run(
            [
                sys.executable,
                "train.py",
                "--mllm",
                name,
                "--diffusion",
                str(parts / "sana"),
                "--device",
                "cpu",
                "--out",
                str(tmp_path),
            ],
            **environment,
        )
        lines = made.stderr.strip().splitlines()
        assert made.returncode == 2 and lines[-1].startswith("error: "), made.stderr
        assert "Traceback" not in made.stderr
        assert name in made.stderr and "--mllm" in made.stderr
        assert ("gated repo" in made.stderr) == (name == "org/gated") and "log in" in made.stderr
