"""`hf://org/name@revision` against a hub of our own on the loopback address, and then from the cache without one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from megalign.convert.report import compare
from tests.support.tiny_checkpoints import COMPANIONS, write_checkpoint

ROOT = Path(__file__).parents[2]
COMMIT, REVISION = "5e1f" * 10, "v1.2"
BAD = ("v9", "portal")  # there is no such revision; something else answers


@contextmanager
def hub(folder: Path, asked: list[str]) -> Iterator[str]:
    """The address of a server of one model, `org/name`, of which `asked` collects the files that were fetched."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, *, with_body: bool) -> None:
            path, file = self.path.partition("?")[0], self.path.rpartition(f"/resolve/{COMMIT}/")[2]
            if path == f"/api/models/org/name/revision/{REVISION}":
                listed = [{"rfilename": name} for name in files]
                self.send({"id": "org/name", "sha": COMMIT, "siblings": listed}, with_body=with_body)
            elif path == f"/api/models/org/name/tree/{COMMIT}":
                listed = [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": etag(path)}
                    for name, path in files.items()
                ]
                self.send(listed, with_body=with_body)
            elif path == "/api/models/org/name/revision/portal":
                self.send(b"<html>Log in to this network</html>", with_body=with_body)
            elif file in files:
                if with_body:
                    asked.append(file)
                content = files[file].read_bytes()
                headers = {"ETag": f'"{etag(files[file])}"', "X-Repo-Commit": COMMIT}
                self.send(content, with_body=with_body, **headers)
            else:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def send(self, content: object, *, with_body: bool, **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def convert(name: str, out: Path, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/hf_to_megatron.py"), name, str(out)]
    settings = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        command, env={**os.environ, **settings, **environment}, capture_output=True, text=True, timeout=120
    )


def test_models_of_the_hub(tmp_path: Path) -> None:
    source, cache = write_checkpoint(tmp_path / "source", "qwen2", max_shard_size="20KB"), tmp_path / "cache"
    for foreign in ("modeling_evil.py", "pytorch_model.bin", "original/consolidated.safetensors"):
        (source / foreign).parent.mkdir(exist_ok=True)
        (source / foreign).write_text("never asked for")
    asked: list[str] = []
    with hub(source, asked) as address:
        done = convert(f"hf://org/name@{REVISION}", tmp_path / "first", cache, HF_ENDPOINT=address)
        assert done.returncode == 0, done.stderr
        others = {name: convert(f"hf://org/name@{name}", tmp_path / name, cache, HF_ENDPOINT=address) for name in BAD}
    weights = {path.name for path in source.glob("model-*.safetensors")}
    settings = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert sorted(asked) == sorted(weights | settings | COMPANIONS.keys())
    assert not compare(source, tmp_path / "first").differences
    for name, content in COMPANIONS.items():
        assert (tmp_path / "first" / "hf" / name).read_bytes() == content
    for name, other in others.items():
        assert other.returncode == 2
        (line,) = other.stderr.splitlines()
        assert line.startswith(f"megalign: error: hf://org/name@{name} could not be downloaded (")
        assert not (tmp_path / name).exists()

    done = convert(f"hf://org/name@{REVISION}", tmp_path / "second", cache, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert not compare(tmp_path / "first", tmp_path / "second").differences
    empty = convert(f"hf://org/name@{REVISION}", tmp_path / "third", tmp_path / "empty", HF_HUB_OFFLINE="1")
    assert empty.returncode == 2
    (line,) = empty.stderr.splitlines()
    assert "or download it elsewhere and give the directory" in line
    assert not (tmp_path / "third").exists()
