"""W&B without a network: offline works, and whatever breaks, training does not notice."""

import http.server
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from flashtrain.config import WandbConfig, WandbMode
from flashtrain.tracking import wandb as ours
from flashtrain.tracking.wandb import Wandb, choose_mode, redact

SECRET = "f00dfeed" * 5


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Ours: wandb itself logs through the same root."""
    ours = (record for record in caplog.records if record.name == "flashtrain.tracking")
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


def tracker(folder: Path, mode: WandbMode = WandbMode.offline) -> Wandb:
    return Wandb(WandbConfig(mode=mode, group="g", tags=["t"]), "tiny", folder)


def test_offline_runs_keep_their_id_and_no_secret_over_a_resume(tmp_path: Path) -> None:
    started = time.monotonic()
    first = tracker(tmp_path)
    first.start({"model": {"d_model": 64}, "api_key": SECRET}, None)
    assert first.run is not None
    for step in (10, 20):
        first.log(step, {"train/loss": 1.0, "perf/tokens_per_s": 5.0})
    first.text(20, "sample", "<b>To be & not")
    state = first.state()
    first.finish("finished")

    second = tracker(tmp_path)
    second.start({"api_key": SECRET}, state["id"])
    assert second.run.id == state["id"] == second.state()["id"]
    second.log(30, {"train/loss": 0.5})
    second.finish("failed")
    assert time.monotonic() - started < 90  # both; 10 s each on a busy machine

    records = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(records) == 2
    assert all(state["id"] in path.name for path in records)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path
    assert b"train/loss" in records[0].read_bytes()


class Broken:
    """A run of which every method raises."""

    id = "x"

    def __getattr__(self, name: str) -> Any:
        def method(*_: object, **__: object) -> None:
            raise OSError("the service died\nwith a long story")

        return method


class Working(Broken):
    url = "https://wandb.example/run"

    def define_metric(self, *_: object, **__: object) -> None:
        pass


def test_a_wandb_that_cannot_start_warns_and_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modes = []

    def init(**kwargs: Any) -> None:
        modes.append(kwargs["mode"])
        raise wandb.errors.CommError("no route")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(ours, "_probe", lambda url: None)
    made = tracker(tmp_path, WandbMode.online)
    made.start({}, None)
    made.log(1, {"a": 1.0})
    made.text(1, "a", "b")
    made.finish("finished")
    assert modes == ["online", "offline"]
    assert warnings(caplog) == [
        "W&B could not start online (no route): going on offline",
        "W&B could not start offline (no route): W&B is off",
    ]


@pytest.mark.parametrize("call", ["log", "text", "finish"])
def test_a_wandb_that_breaks_later_warns_once_and_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    monkeypatch.setattr(wandb, "init", lambda **_: Working())
    made = tracker(tmp_path)
    made.start({}, None)
    assert made.run is not None
    for _ in range(3):
        {
            "log": lambda: made.log(1, {"a": 1.0}),
            "text": lambda: made.text(1, "a", "b"),
            "finish": lambda: made.finish("stopped"),
        }[call]()
    assert warnings(caplog) == ["W&B failed (the service died) and is off from here on"]
    made.finish("failed")


def test_a_wandb_that_hangs_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **_: release.wait(30))
    monkeypatch.setattr(ours, "INIT_SECONDS", 0.2)
    made = tracker(tmp_path)
    made.start({}, None)
    release.set()
    assert made.run is None
    assert "W&B is off: starting it took more than 0 s" in caplog.text


class Refusing(http.server.BaseHTTPRequestHandler):
    status = 503

    def do_POST(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    made = http.server.HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()


def test_a_server_that_does_not_answer_is_noticed_before_wandb_waits_for_it(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConnectionError, match="answers 503"):
        ours._probe(server)
    monkeypatch.setattr(Refusing, "status", 401)
    ours._probe(server)  # a refusal is an answer: wandb says what is wrong with the key
    with pytest.raises(ConnectionError, match="does not answer"):
        ours._probe("http://127.0.0.1:9")


def test_online_without_a_server_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def probe(url: str) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr(ours, "_probe", probe)
    made = tracker(tmp_path, WandbMode.online)
    with caplog.at_level(logging.INFO):
        made.start({}, "kept1234")
    assert made.run.id == "kept1234"
    made.log(1, {"a": 1.0})
    made.finish("finished")
    assert warnings(caplog) == ["W&B could not start online (no server): going on offline"]
    assert f"wandb sync {tmp_path / 'wandb'}/offline-run-*" in caplog.text
    assert list(tmp_path.glob("wandb/offline-run-*-kept1234"))


def test_auto_is_online_with_a_key_and_offline_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_mode(WandbMode.auto) == "offline"
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert choose_mode(WandbMode.auto) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
    assert choose_mode(WandbMode.auto) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert choose_mode(WandbMode.auto) == "online"
    assert choose_mode(WandbMode.disabled) == "disabled"


def test_auto_without_the_package_is_off_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_mode(WandbMode.auto) == "disabled"
    assert warnings(caplog) == [
        "W&B is off: the package wandb is not installed (pip install wandb)"
    ]


def test_disabled_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("started"))
    made = tracker(tmp_path, WandbMode.disabled)
    made.start({}, None)
    assert made.state() == {}
    made.start({}, "kept1234")
    assert made.state() == {"id": "kept1234"}  # for when it is switched on again
    made.log(1, {"a": 1.0})
    made.finish("finished")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "key",
    ["key", "api_key", "apikey", "API-KEY", "WANDB_API_KEY", "hf_token", "accessToken", "token",
     "secret", "client_secret", "clientSecret", "password", "db_password", "userpassword", "keys"],
)  # fmt: skip
def test_secrets_are_redacted(key: str) -> None:
    tree = {"a": [{key: SECRET}], key: [SECRET, {"deep": SECRET}]}
    assert SECRET not in str(redact(tree))
    assert SECRET in str(tree)  # a copy


def test_what_only_sounds_like_a_secret_stays() -> None:
    tree = {
        "tokenizer": "bpe",
        "tokenizer_vocabulary": 4096,
        "tokens": "all",
        "sample_tokens": 128,
        "n_kv_heads": 4,
        "keyboard": "qwerty",
        "token": 5,
        "password": None,
        "applies_to": ["q", "k"],
    }
    assert redact(tree) == tree


def test_samples_are_a_table_of_the_whole_run_and_the_last_checkpoint_an_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"step": n, "name": "sample", "text": f"text {n}"} for n in (10, 20)]
    lines = [json.dumps(row) + "\n" for row in rows]
    lines.insert(1, '{"step": 15, "na\n')  # as a full disk leaves it
    (tmp_path / "samples.jsonl").write_text("".join(lines))
    # of a run that went back, over a disk that flipped a bit
    for step in ("00000010", "00000020", "00000020.abandoned", "00000030.broken"):
        folder = tmp_path / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "weights").write_text(f"weights of {step}")
    logged: list[dict[str, Any]] = []
    uploaded: list[tuple[Any, list[str]]] = []
    tracker = Wandb(WandbConfig(mode=WandbMode.offline, artifact=True), "tiny", tmp_path)
    tracker.start({}, None)
    run, log_artifact = tracker.run, tracker.run.log_artifact

    def note(artifact: Any, aliases: Any = None, **rest: Any) -> Any:  # tables come this way too
        if artifact.type == "checkpoint":
            uploaded.append((artifact, aliases))
        return log_artifact(artifact, aliases=aliases, **rest)

    monkeypatch.setattr(run, "log", logged.append)
    monkeypatch.setattr(run, "log_artifact", note)
    tracker.text(20, "sample", "text 20")
    tracker.finish("finished")
    table = logged[0]["text/samples"]
    assert (table.columns, table.data) == (["step", "text"], [[10, "text 10"], [20, "text 20"]])
    ((artifact, aliases),) = uploaded
    assert aliases == ["latest", "step-00000020"]
    assert set(artifact.manifest.entries) == {"manifest.json", "weights"}
