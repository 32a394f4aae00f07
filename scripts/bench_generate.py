"""Generation speed of a model, beside transformers' generate with SDPA on the same weights.

    python scripts/bench_generate.py                       # gpt_1.3b with GPT-2's positions
    python scripts/bench_generate.py --case "experiment=llama_1b" --batches 1 8 64 --json out.json

Random weights, prompts of equal length, the likeliest token each time. tokens/s is batch x
(n - 1) / (time for n tokens - time for 1), so prompts, and for ours the capture of the CUDA graph,
are not in it; `first` is the time for 1 token with them. Every time is the best of --repeats runs
after one that is not counted. The peer reads the folder that export_hf.py would write; --static
runs it with its static cache as well, which it compiles. `alike` is the share of prompts whose
first token is the same for both: random weights in bf16 leave near ties. The last line is the
memory of keys and values for a token: as the configuration says and as the GPU's allocator counts.
On a CPU it runs too, at that speed.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from flashtrain import checkpoint
from flashtrain.build import build_model
from flashtrain.checkpoint.huggingface import export_folder
from flashtrain.compose import load
from flashtrain.config import Config, ConfigError, to_dict
from flashtrain.engine.decoder import Decoder, cast_weights
from flashtrain.model.cache import cache_bytes_per_token
from flashtrain.model.dtypes import DTYPES
from flashtrain.model.generate import complete
from flashtrain.model.gpt import GPT
from flashtrain.model.sampling import Sampling
from flashtrain.parallel.mesh import SINGLE
from scripts.parts.where import where

DEFAULT_CASE = "experiment=gpt_1.3b position=gpt2"
Generate = Callable[[list[list[int]], int], list[list[int]]]


def timed(
    generate: Generate, prompts: list[list[int]], n: int, repeats: int
) -> tuple[dict[str, float], list[int]]:
    """Seconds to the first token, and tokens/s after it; the first tokens."""
    best, first = {}, []
    for tokens in (1, n):
        times = []
        for _ in range(1 + repeats):
            synchronize()
            began = time.perf_counter()
            drawn = generate(prompts, tokens)
            synchronize()
            times.append(time.perf_counter() - began)
            if [len(ids) for ids in drawn] != [tokens] * len(prompts):
                raise RuntimeError(f"{tokens} tokens were asked for, not {list(map(len, drawn))}")
        best[tokens] = min(times[1:])
        first = [ids[0] for ids in drawn]
    rate = len(prompts) * (n - 1) / (best[n] - best[1])
    return {"first s": round(best[1], 4), "tokens/s": round(rate, 1)}, first


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def of_flashtrain(model: GPT, max_length: int, graph: bool) -> Generate:
    decoder, greedy = Decoder(model), Sampling(temperature=0.0)
    return lambda prompts, n: complete(
        decoder, prompts, n, max_length=max_length, sampling=greedy, graph=graph
    )


def of_transformers(
    folder: Path, dtype: torch.dtype, device: torch.device, **more: Any
) -> Generate:
    """more: arguments of `generate`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    ).to(device)
    model.eval()

    def generate(prompts: list[list[int]], n: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=device)
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0, eos_token_id=None,
            do_sample=False, max_new_tokens=n, min_new_tokens=n, **more,
        )  # fmt: skip
        return found[:, ids.shape[1] :].tolist()

    return generate


def export(model: GPT, config: Config, folder: Path) -> Path:
    """The weights as a Hugging Face folder, by way of a checkpoint, as a user would."""
    meta = {"config": to_dict(config)}
    path = checkpoint.save(folder / "run" / "checkpoints", 1, checkpoint.collect(model), meta)
    export_folder(path, folder / "exported")
    return folder / "exported"


def measured_cache(model: GPT, batch: int, room: int) -> float:
    """Bytes that one token of one sequence takes: of the GPU's allocator, else of the tensors."""
    cuda = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if cuda else 0
    cache = Decoder(model).empty_cache(batch, room)
    taken = torch.cuda.memory_allocated() - before if cuda else cache.k.nbytes + cache.v.nbytes
    return taken / (batch * cache.room)


def measure(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    config = load([*options.case.split(), "data=random"])
    model = build_model(config, SINGLE, device)
    length, graph = config.data.sequence_length, device.type == "cuda"
    dtype = DTYPES[config.precision.compute]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        rivals: list[tuple[str, Callable[[], Generate]]] = []
        if options.peer:
            exported = export(model, config, Path(temporary))
            rivals.append(("transformers sdpa", lambda: of_transformers(exported, dtype, device)))
        if options.peer and options.static:
            static = partial(
                of_transformers, exported, dtype, device, cache_implementation="static"
            )
            rivals.append(("transformers sdpa static", static))
        cast_weights(model)
        rivals.insert(0, ("flashtrain", lambda: of_flashtrain(model, length, graph)))
        if options.eager and graph:
            rivals.insert(1, ("no graph", lambda: of_flashtrain(model, length, False)))
        first: dict[int, list[int]] = {}  # of flashtrain, by batch
        for name, make in rivals:
            generate = make()
            for batch in options.batches:
                draw = torch.Generator().manual_seed(batch)
                assert config.model.vocabulary is not None
                shape = (batch, options.prompt)
                prompts = torch.randint(config.model.vocabulary, shape, generator=draw).tolist()
                figures, tokens = timed(generate, prompts, options.tokens, options.repeats)
                ours = first.setdefault(batch, tokens)
                alike = sum(a == b for a, b in zip(ours, tokens, strict=True)) / batch
                rows.append({"who": name, "batch": batch, **figures, "alike": round(alike, 3)})
                say(rows[-1])
            del generate
    stated = cache_bytes_per_token(config.model, model.embedding.dtype)
    taken = measured_cache(model, 8, options.prompt + options.tokens)
    rows.append({"who": "cache", "bytes/token stated": stated, "measured": round(taken, 1)})
    say(rows[-1])
    return rows


def say(row: dict[str, Any]) -> None:
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default=DEFAULT_CASE, help=f"overrides (default {DEFAULT_CASE})")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 64], help="prompts at a time (default 1 64)"
    )
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (default 128)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens to draw (default 256)")
    parser.add_argument("--repeats", type=int, default=2, help="timed runs (default 2)")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="flashtrain alone")
    parser.add_argument("--static", action="store_true", help="the peer's static cache as well")
    parser.add_argument("--eager", action="store_true", help="ours without its CUDA graph as well")
    parser.add_argument("--folder", type=Path, help="where the exported weights go meanwhile")
    parser.add_argument("--json", type=Path, help="write the rows and the environment here")
    options = parser.parse_args()
    if options.peer and importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: flashtrain alone")
        options.peer = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    try:
        rows = measure(options, device)
    except (ConfigError, ValueError) as error:
        print(f"bench_generate: {error}", file=sys.stderr)
        return 2
    environment = where("transformers") | {
        "case": options.case,
        "prompt": options.prompt,
        "tokens": options.tokens,
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(environment)
    if options.json:
        options.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
