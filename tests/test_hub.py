"""The hub's own protocol, spoken by a small server here: parts and checkpoints come by id."""

import hashlib
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from conftest import run
from test_public_weights import files  # noqa: F401

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
                found = [p for p in folder.rglob("*") if p.is_file()]
                names = [str(p.relative_to(folder)) for p in found]
                if rest[:1] == ["resolve"]:
                    if (file := "/".join(rest[2:])) not in names:
                        return self.reply(404, X_Error_Code="EntryNotFound")
                    asked.append(f"{name}/{file}")
                    body = (folder / file).read_bytes()
                    return self.reply(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"')
                if rest[:1] == ["tree"]:
                    made = [
                        {"type": "file", "path": n, "size": p.stat().st_size, "oid": COMMIT}
                        for n, p in zip(names, found, strict=True)
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


# ---- Public weights ------------------------------------------------------------------------------

# Loads each of its arguments, NAME or NAME=FOLDER to save to, frozen; prints an "error: ..." line.
LOAD = """
import sys, torch, public_weights
for argument in sys.argv[1:]:
    name, _, folder = argument.partition("=")
    print(f"name: {name}", file=sys.stderr)
    try:
        model = public_weights.load(name, train_diffusion=not folder)
    except public_weights.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        continue
    print(name, model.queries.sum().item(), model.diffusion.proj_out.weight.sum().item())
    if folder:
        model.save_pretrained(folder)
"""


@pytest.fixture
def public(files, parts, tmp_path):  # noqa: F811
    """{hub id: folder} of what the public names need, with files beside that nothing needs."""
    sana = tmp_path / "sana"
    shutil.copytree(parts / "sana", sana)
    shutil.copytree(files / "unipic2", tmp_path / "unipic2")
    for folder in (sana, tmp_path / "unipic2"):
        (folder / "text_encoder").mkdir()
        (folder / "text_encoder" / "model.safetensors").write_bytes(b"0" * 10**6)
        (folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"0")
    openuni = tmp_path / "openuni"
    openuni.mkdir()
    start = "openuni_b_internvl3_1b_sana_0_6b_512_hf"
    shutil.copy(files / "tuned.pth", openuni / f"{start}_blip3o60k.pth")
    shutil.copy(files / "pretrained.pth", openuni / f"{start}_text2image23m.pth")
    return {
        "wusize/openuni": openuni,
        "OpenGVLab/InternVL3-1B-hf": files / "internvl",
        "Efficient-Large-Model/Sana_600M_512px_diffusers": sana,
        "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers": files / "vae",
        "Skywork/UniPic2-Metaquery-9B": tmp_path / "unipic2",
        "Qwen/Qwen2.5-VL-7B-Instruct": files / "qwen-vl",
    }


def load_all(names, environment, first=""):
    """(what was printed of each model's weights, {name: what stderr says while it is loaded}).

    first: a line of Python that runs before.
    """
    made = run([sys.executable, "-c", f"{first}\n{LOAD}", *map(str, names)], **environment)
    assert made.returncode == 0, made.stderr
    said = {}
    for part in made.stderr.split("name: ")[1:]:
        name, _, rest = part.partition("\n")
        lines = rest.splitlines()
        said[name] = [line for line in lines if line.startswith(("downloading", "error"))]
    return made.stdout.splitlines(), said


def test_public_names_fetch_what_they_need(hub, public):
    """One line says so before; only the pre-trained file needs Sana's own transformer."""
    environment = hub(public)
    sana = "Efficient-Large-Model/Sana_600M_512px_diffusers/transformer/"
    names = ["openuni-b-512", "openuni-b-512-pretrained", "unipic2"]
    first, said = load_all(names[:1], environment)
    (line,) = said["openuni-b-512"]
    assert "GB" in line and "NVIDIA" in line and all(x in line for x in list(public)[:4])
    asked = " ".join(hub.asked)
    assert f"{sana}config.json" in asked and f"{sana}diffusion" not in asked
    assert all(x not in asked for x in ("text2image", "text_encoder", "fp16", "diffusers/vae"))

    every, said = load_all(names, environment)
    assert every[0] == first[0] and said["openuni-b-512"] == []
    (line,) = said["openuni-b-512-pretrained"]
    assert "wusize" in line and "Sana_600M" in line and "InternVL" not in line
    (line,) = said["unipic2"]
    assert "MIT" in line and "Qwen/" in line and "Skywork/" in line
    asked = " ".join(hub.asked)
    assert f"{sana}diffusion" in asked and "text_encoder" not in asked and "fp16" not in asked
    again, said = load_all(names, environment | {"HF_HUB_OFFLINE": "1"})
    assert again == every and not any(said.values())


def test_a_fine_tuning_of_public_weights_loads_on_another_machine(hub, public, tmp_path):
    """Of UniPic2 by a hub id and of OpenUni by its file's; what is fetched again is said."""
    public["me/unipic"] = public["Skywork/UniPic2-Metaquery-9B"]
    environment = hub(public)
    saved = [tmp_path / "unipic-run", tmp_path / "openuni-run"]
    file = "wusize/openuni/openuni_b_internvl3_1b_sana_0_6b_512_hf_blip3o60k.pth"
    names = ["me/unipic", file]
    first, said = load_all(
        [f"{name}={folder}" for name, folder in zip(names, saved, strict=True)], environment
    )
    assert all(len(lines) == 1 and "downloading" in lines[0] for lines in said.values()), said
    assert "text_encoder" not in str(hub.asked)
    hub.asked.clear()

    other = environment | {"HF_HOME": str(tmp_path / "other")}
    second, said = load_all(saved, other)
    assert [line.split()[1:] for line in second] == [line.split()[1:] for line in first]
    assert "me/unipic" in said[str(saved[0])][0] and "wusize" in said[str(saved[1])][0]
    assert "conditioner" not in str(hub.asked)

    # Local places that are gone: the hub's of the same last name, or one line.
    for folder, name in zip(saved, ("diffusion", "weights"), strict=True):
        config = json.loads((folder / "config.json").read_text())
        place = {"diffusion": "UniPic2-Metaquery-9B", "weights": file.split("/")[-1]}[name]
        config[name] = f"/gone/{place}"
        (folder / "config.json").write_text(json.dumps(config))
    third, said = load_all(saved, other)
    assert [line.split()[1:] for line in third] == [line.split()[1:] for line in first]


def test_what_cannot_be_fetched_is_one_line(hub, public):
    """A repository of several files, one that is gone, and no network at all."""
    del public["OpenGVLab/InternVL3-1B-hf"]
    environment = hub(public)
    names = ["wusize/openuni", "openuni-b-512", "me/nothing"]
    _, said = load_all(names, environment)
    assert "OWNER/REPO/FILE.pth" in said["wusize/openuni"][0]
    assert "InternVL3-1B-hf" in said["openuni-b-512"][-1] and "--mllm" in said["openuni-b-512"][-1]
    assert "me/nothing" in said["me/nothing"][0]
    full = "import shutil; shutil.disk_usage = lambda _: shutil._ntuple_diskusage(9, 9, 0)"
    _, said = load_all(["unipic2"], environment, full)
    assert len(said["unipic2"]) == 1 and "GB free" in said["unipic2"][0]
    dead = environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    _, said = load_all(["unipic2"], dead | {"HF_HOME": environment["HF_HOME"] + "2"})
    (line,) = said["unipic2"]
    assert "conditioner/*" in line and "--checkpoint" in line and "huggingface.co/Qwen" in line
