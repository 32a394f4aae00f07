"""Weights & Biases: online when it can be, offline when it cannot, off rather than in the way.

Nothing here raises once training runs, and nothing waits for long: wandb 0.27's `init` retries an
unreachable server for 20 minutes whatever `init_timeout` says (measured), so the server is asked
first and `init` gets a limit of its own.
"""

import contextlib
import html
import importlib.util
import logging
import netrc
import os
import re
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flashtrain.checkpoint.shelf import checkpoints
from flashtrain.config import ConfigError, WandbConfig, WandbMode
from flashtrain.tracking.compare import read_rows

log = logging.getLogger("flashtrain.tracking")

PROBE_SECONDS = 5
INIT_SECONDS = 30  # a healthy online init takes 1 to 5 s, an offline one 0.6 s
FINISH_SECONDS = 120  # uploading what is left; the files stay for `wandb sync` in any case
ARTIFACT_SECONDS = 3600  # with a checkpoint, which is copied first
TABLE_ROWS = 1000  # samples that the table shows, the newest
# settings by name, so that versions of wandb that lack one do not refuse it
SETTINGS: dict[str, Any] = {
    "init_timeout": 10.0,
    "finish_timeout": 60.0,
    "console": "off",  # our console draws a progress bar, which would be uploaded line by line
    "silent": True,
    "x_graphql_retry_max": 3,
    "x_graphql_retry_wait_max_seconds": 4.0,
    "x_graphql_timeout_seconds": 10.0,
}
SECRET_WORDS = {"token", "secret", "secrets", "password", "passwords", "passwd", "credentials"}
REDACTED = "(redacted)"


class Wandb:
    """See `tracking.Tracker`. State holds the run id, so that a resumed run is the same one."""

    def __init__(self, config: WandbConfig, name: str, folder: Path) -> None:
        """Raises ConfigError when a mode is asked for by name that needs a missing package."""
        self.config, self.name, self.folder = config, name, folder
        self.mode = choose_mode(config.mode)
        self.id: str | None = None
        self.run: Any = None

    def start(self, config: dict[str, Any], resumed_id: str | None) -> None:
        self.id = resumed_id
        if self.mode == "disabled":
            return
        self.id = resumed_id or secrets.token_hex(4)
        # online falls back to offline, offline to nothing
        for mode in ("online", "offline") if self.mode == "online" else ("offline",):
            try:
                self.run = _within(INIT_SECONDS, partial(self._init, mode, config))
            except TimeoutError:
                log.warning("W&B is off: starting it took more than %d s", INIT_SECONDS)
                return  # that attempt may still hold wandb, so there is no second one
            except Exception as error:
                rest = "going on offline" if mode == "online" else "W&B is off"
                log.warning("W&B could not start %s (%s): %s", mode, _line(error), rest)
                continue
            if mode == "offline":
                folder = self.folder / "wandb" / "offline-run-*"
                log.info("W&B is offline; to upload: wandb sync %s", folder)
            else:
                log.info("W&B: %s", self.run.url)
            return

    def _init(self, mode: str, config: dict[str, Any]) -> Any:
        # read at import and at init: without it even an offline run tries to phone home
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        if mode == "online":
            _probe(wandb.setup().settings.base_url)
        known = wandb.Settings.model_fields
        settings = {key: value for key, value in SETTINGS.items() if key in known}
        run = wandb.init(
            project=self.config.project,
            group=self.config.group,
            tags=list(self.config.tags),
            name=self.name,
            id=self.id,
            resume="allow",
            job_type="pretrain",
            dir=str(self.folder),
            mode=mode,  # type: ignore[arg-type]
            config=redact(config),
            settings=wandb.Settings(**settings),
        )
        # W&B's own counter may only grow, ours goes back with an older checkpoint
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._try(lambda: self.run.log({**metrics, "step": step}))

    def text(self, step: int, name: str, text: str) -> None:
        def send() -> None:
            import wandb

            page = wandb.Html(f"<pre>{html.escape(text)}</pre>")
            columns = ["step", "text"]
            # of the whole run, also from before a resume
            texts = read_rows(self.folder, "samples.jsonl")
            rows = [[row["step"], row["text"]] for row in texts if row.get("name") == name]
            table = wandb.Table(columns=columns, data=rows[-TABLE_ROWS:])
            self.run.log({f"text/{name}": page, f"text/{name}s": table, "step": step})

        self._try(send)

    def finish(self, status: str) -> None:
        def end() -> None:
            if status == "stopped":
                self.run.mark_preempting()  # shown as preempted and not as crashed
            if self.config.artifact:
                self._upload_checkpoint()
            self.run.finish(exit_code=1 if status == "failed" else 0)

        seconds = ARTIFACT_SECONDS if self.config.artifact else FINISH_SECONDS
        self._try(lambda: _within(seconds, end))
        self.run = None

    def _upload_checkpoint(self) -> None:
        """The newest one; nobody deletes it any more."""
        import wandb

        found = checkpoints(self.folder / "checkpoints")
        if not found:
            return
        artifact = wandb.Artifact(f"{self.name}-{self.id}", type="checkpoint")
        artifact.add_dir(str(found[0]))
        self.run.log_artifact(artifact, aliases=["latest", found[0].name])

    def state(self) -> dict[str, Any]:
        return {"id": self.id} if self.id else {}

    def _try(self, action: Callable[[], object]) -> None:
        if self.run is None:
            return
        try:
            action()
        except Exception as error:
            log.warning("W&B failed (%s) and is off from here on", _line(error))
            self.run = None


def choose_mode(mode: WandbMode) -> str:
    """`online`, `offline` or `disabled`; says which when the config leaves it open."""
    if mode is WandbMode.disabled:
        return "disabled"
    if importlib.util.find_spec("wandb") is None:
        if mode is WandbMode.auto:
            log.warning("W&B is off: the package wandb is not installed (pip install wandb)")
            return "disabled"
        raise ConfigError(
            f"tracking.wandb.mode={mode.name} needs the package wandb, which is not installed: "
            "pip install wandb, or set tracking.wandb.mode=disabled"
        )
    if mode is WandbMode.auto:
        return "online" if has_key() else "offline"
    return mode.name


def has_key() -> bool:
    """Whether an API key stands where wandb looks for one; the key itself is not used."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def redact(tree: Any, secret: bool = False) -> Any:
    """A copy of JSON data in which no string stands under a key that names a secret.

    `api_key`, `hf_token`, `clientSecret`: yes. `tokenizer`, `tokens`, `sample_tokens`: no.
    """
    if isinstance(tree, dict):
        return {
            key: redact(value, secret or _names_secret(str(key))) for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [redact(value, secret) for value in tree]
    return REDACTED if secret and isinstance(tree, str) else tree


def _names_secret(key: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    parts = re.split(r"[^a-z0-9]+", words)
    joined = "".join(parts)
    return (
        any(part in SECRET_WORDS or part.endswith(("key", "keys", "token")) for part in parts)
        or "password" in joined
        or "secret" in joined
    )


def _probe(base_url: str) -> None:
    """Raise unless a W&B server answers there within `PROBE_SECONDS`; any refusal is an answer."""
    request = urllib.request.Request(
        base_url.rstrip("/") + "/graphql",
        data=b'{"query":"{__typename}"}',
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
            pass
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise ConnectionError(f"{base_url} answers {error.code}") from error
    except OSError as error:
        raise ConnectionError(f"{base_url} does not answer: {error}") from error


def _within(seconds: float, action: Callable[[], Any]) -> Any:
    """The result of `action`; TimeoutError when it takes longer, while it is left to itself."""
    result: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(action())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True, name="wandb")
    thread.start()
    thread.join(seconds)
    if failure:
        raise RuntimeError(_line(failure[0])) from failure[0]
    if not result:
        raise TimeoutError(f"no answer within {seconds} s")
    return result[0]


def _line(error: BaseException) -> str:
    """First line of a message, at most 200 characters."""
    with contextlib.suppress(IndexError):
        return str(error).strip().splitlines()[0][:200]
    return type(error).__name__
