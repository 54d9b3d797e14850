"""A model named as on the hub is the snapshot in its download cache; what is a path stays one."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from planning_cases import HF_CONFIG

from simpo_megatron.commands import plan as plan_command
from simpo_megatron.config import config_from
from simpo_megatron.errors import CheckpointError, ConfigError, StoppedBySignal
from simpo_megatron.mcore.hf import hub_name, model_folder
from simpo_megatron.training import finish
from simpo_megatron.training.start.inputs import locate_sources

NEWEST, EARLIER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    """A download cache as huggingface_hub makes it, links to blobs and all, with two revisions of owner/model."""
    cache = tmp_path / "hub"
    repository = cache / "models--owner--model"
    for commit, names in ((NEWEST, ("main",)), (EARLIER, ("v1",))):
        blob, snapshot = repository / "blobs" / f"blob-{commit[0]}", repository / "snapshots" / commit
        for folder in (blob.parent, snapshot, repository / "refs"):
            folder.mkdir(parents=True, exist_ok=True)
        blob.write_text(json.dumps(HF_CONFIG))
        (snapshot / "config.json").symlink_to(f"../../blobs/{blob.name}")
        for name in names:
            (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return cache


@pytest.mark.parametrize(
    ("name", "commit"), [("owner/model", NEWEST), ("owner/model@v1", EARLIER), (f"owner/model@{EARLIER}", EARLIER)]
)
def test_a_name_is_the_snapshot_of_its_revision(cache: Path, name: str, commit: str, capsys) -> None:
    folder = cache / "models--owner--model" / "snapshots" / commit
    assert model_folder(name) == folder
    assert locate_sources(config_from(model=name, data=("pairs.jsonl",))).model == folder
    assert plan_command.main(["--model", name, "--gpus", "8"]) == 0
    assert "llama: 4 layers, hidden 256" in capsys.readouterr().out
    assert hub_name(name) == hub_name(str(folder)) == "owner/model"


def test_a_folder_and_what_lies_in_one_is_no_name(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for path in ("runs/not-there", "model", "./owner/model", "/owner/model", "owner/model/deeper"):
        assert model_folder(path) == Path(path) and hub_name(path) is None


@pytest.mark.parametrize("name", ["owner/other", "owner/model@v9"])
def test_what_the_cache_does_not_have_is_refused_in_one_line(cache: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"model: found '{name}', expected a folder, or the name") as refused:
        model_folder(name)
    assert "\n" not in str(refused.value)


class StandIn(BaseHTTPRequestHandler):
    """The hub's answers to a client that makes a repository and commits small files to it."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        self.server.answer(self, body)

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization"), ""))
        self.reply({"id": "me/model", "private": self.server.private, "siblings": []})

    def reply(self, answer: dict, code: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        return


def takes_everything(request: StandIn, body: str) -> None:
    page = f"{request.server.url}/me/model"
    if request.path == "/api/repos/create":
        request.reply({"url": page, "name": "me/model"})
    elif "/preupload/" in request.path:
        files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
        request.reply({"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
    else:
        request.reply({"commitUrl": f"{page}/commit/{'c' * 40}", "commitOid": "c" * 40, "hookOutput": ""})


@pytest.fixture
def hub(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    """A stand-in for the hub on this machine, and a token for it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.url, server.asked, server.answer = f"http://127.0.0.1:{server.server_port}", [], takes_everything
    server.private = True
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(finish.dist, "get_rank", lambda: 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class Said(list):
    say = list.append


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "README.md").write_text("# a card\n")
    (folder / "config.json").write_text("{}")
    return folder


def config_of_push(folder: Path):
    return config_from(model="m", data=("d",), export_hf=str(folder), push_to_hub="me/model", hub_private_repo=True)


def test_an_export_is_pushed_with_the_librarys_token(hub, exported: Path) -> None:
    said = Said()
    finish.push(config_of_push(exported), said)
    paths = [path for path, _, _ in hub.asked]
    preupload, commit = "/api/models/me/model/preupload/main", "/api/models/me/model/commit/main"
    assert paths == ["/api/repos/create", "/api/models/me/model", "/api/validate-yaml", preupload, commit]
    assert {token for _, token, _ in hub.asked} == {"Bearer hf_secret"}
    made = json.loads(hub.asked[0][2])
    assert made.get("private") is True or made.get("visibility") == "private"
    assert made["name"] == "model" and made["organization"] == "me"
    committed = [json.loads(line) for line in hub.asked[4][2].splitlines()]
    files = {line["value"]["path"]: line["value"]["content"] for line in committed if line["key"] == "file"}
    assert files.keys() == {"README.md", "config.json"}
    assert base64.b64decode(files["README.md"]) == b"# a card\n"
    assert said[0].startswith(f"hub       {hub.url}/me/model") and "hf_secret" not in str(said)


def test_a_push_that_fails_costs_a_warning_without_the_token(hub, exported: Path) -> None:
    hub.answer = lambda request, body: request.reply({"error": "no such owner"}, 403)
    said = Said()
    finish.push(config_of_push(exported), said)
    assert len(said) == 1 and said[0].startswith(f"WARNING   {exported} was not pushed to me/model: ")
    assert f"hf upload me/model {exported} --private does it" in said[0]
    assert "hf_secret" not in said[0] and "\n" not in said[0]


def test_a_signal_while_pushing_costs_a_warning(exported: Path, monkeypatch) -> None:
    def stopped(*_: object, **__: object) -> str:
        raise StoppedBySignal("SIGTERM: stopped between steps; the same command continues")

    said = Said()
    monkeypatch.setattr(finish, "push_folder", stopped)
    monkeypatch.setattr(finish.dist, "get_rank", lambda: 0)
    finish.push(config_of_push(exported), said)
    assert "not pushed to me/model: InterruptedError: a signal stopped it; hf upload me/model" in said[0]


def test_a_repository_is_public_only_by_its_owners_default(hub, exported: Path) -> None:
    finish.push(config_from(model="m", data=("d",), export_hf=str(exported), push_to_hub="me/model"), Said())
    assert json.loads(hub.asked[0][2]) == {"name": "model", "organization": "me"}
    assert hub.asked[-1][0].endswith("/commit/main")


def test_what_must_be_private_is_not_pushed_to_a_public_repository(hub, exported: Path) -> None:
    hub.private, said = False, Said()
    finish.push(config_of_push(exported), said)
    assert not [path for path, _, _ in hub.asked if "commit" in path]
    assert "ConfigError: hub_private_repo: found me/model, which is public, expected a private one; make it" in said[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"push_to_hub": "a b"}, "push_to_hub: found 'a b', expected OWNER/NAME"),
        ({"hub_private_repo": True}, "hub_private_repo: found True, expected push_to_hub with it"),
    ],
)
def test_what_cannot_be_pushed_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_from(model="m", data=("d",), **options)
