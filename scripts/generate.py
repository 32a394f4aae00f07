"""Text from a trained run or an imported model, whatever layout wrote the checkpoint.

    python scripts/generate.py run=runs/shakespeare-1a2b3c4d prompt="ROMEO:" tokens=200
    python scripts/generate.py run=runs/gpt2 prompt="One" prompt="Two" temperature=0 stop=$'\\n\\n'
    torchrun --nproc-per-node 2 scripts/generate.py run=runs/llama prompt="Once"   # tensor parallel

run          a run folder (its newest valid checkpoint) or one checkpoint folder inside it
prompt       the text to go on from (default: a line break); several make a batch
tokens       how many to draw at most (default 200)
temperature  0 takes the likeliest token always (default 0.8)
top_k top_p min_p  cut the tail of the distribution (default: off)
stop         a string at which the text ends, shown without it; several may be given (a shell writes
             line breaks as $'\\n')
end          false goes on past the end of a text (default true)
seed         another number, another text (default 0); prompt n of a batch takes seed + n

One prompt is printed while it is drawn. Tokens per second and the cache's memory go to stderr.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from flashtrain.checkpoint import CheckpointError
from flashtrain.config import ConfigError
from flashtrain.data.unfinished import Reader, stops_at
from flashtrain.engine.decoder import Decoder
from flashtrain.launch import REFUSED, STOPPED
from flashtrain.model.cache import cache_bytes_per_token
from flashtrain.model.generate import generate
from flashtrain.model.sampling import Sampling
from flashtrain.trained import join, open_trained

SINGLE_VALUES = {
    "run": "", "tokens": "200", "temperature": "0.8", "top_k": "", "top_p": "", "min_p": "",
    "end": "true", "seed": "0",
}  # fmt: skip
LISTS = ("prompt", "stop")
Number = TypeVar("Number", int, float)


def main(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    rank = int(os.environ.get("RANK", 0))
    try:
        options, lists = read(arguments)
        device = join()
        write(options, lists["prompt"] or ["\n"], lists["stop"], device, loud=rank == 0)
    except (ValueError, OSError, CheckpointError) as error:
        if rank == 0:
            print(f"generate: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return STOPPED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def read(arguments: list[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """key=value pairs over the defaults, and those keys that may come more than once."""
    options: dict[str, str] = dict(SINGLE_VALUES)
    lists: dict[str, list[str]] = {key: [] for key in LISTS}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in {*options, *lists}:
            known = ", ".join([*options, *lists])
            raise ConfigError(f"{argument!r} is not key=value with one of the keys {known}")
        if key in lists:
            lists[key].append(value)
        else:
            options[key] = value
    if not options["run"]:
        raise ConfigError("run= must name a run folder, as train.sh printed it at the end")
    if options["end"] not in ("true", "false"):
        raise ConfigError(f"end={options['end']} must be true or false")
    return options, lists


def number(options: dict[str, str], key: str, kind: type[Number]) -> Number:
    try:
        return kind(options[key])
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise ConfigError(f"{key}={options[key]} is not a {what}") from None


def write(
    options: dict[str, str],
    prompts: Sequence[str],
    strings: Sequence[str],
    device: torch.device,
    loud: bool,
) -> None:
    """Draw and print. Collective; only a loud rank prints."""

    sampling = Sampling(
        temperature=number(options, "temperature", float),
        top_k=number(options, "top_k", int) if options["top_k"] else None,
        top_p=number(options, "top_p", float) if options["top_p"] else None,
        min_p=number(options, "min_p", float) if options["min_p"] else None,
        seed=number(options, "seed", int),
    )
    tokens = number(options, "tokens", int)
    if tokens < 0:
        raise ConfigError(f"tokens={tokens} must be 0 or more")
    trained = open_trained(Path(options["run"]), device)
    tokenizer, decoder = trained.tokenizer, trained.decoder
    stop = stops_at(tokenizer, strings)
    prompt_ids = [tokenizer.encode(prompt) for prompt in prompts]
    rounds = generate(
        decoder,
        [ids or [tokenizer.end_of_text] for ids in prompt_ids],
        tokens,
        max_length=trained.config.data.sequence_length,
        sampling=sampling,
        n_ids=tokenizer.size,
        end=tokenizer.end_of_text if options["end"] == "true" else None,
        stop=stop,
        graph=device.type == "cuda" and decoder.multiple == 1,
    )
    single = len(prompts) == 1 and loud
    if single:
        print(prompts[0], end="", flush=True)
    reader = Reader(tokenizer, strings, prompt_ids[0])
    drawn: list[list[int]] = [[] for _ in prompts]
    times = []
    for ids in rounds:
        times.append(time.perf_counter())
        for row, token in enumerate(ids):
            if token is not None and not (
                options["end"] == "true" and token == tokenizer.end_of_text
            ):
                drawn[row].append(token)
                if single:
                    print(reader.add(token), end="", flush=True)
    if single:
        print(reader.rest())
    elif loud:
        for row, (prompt, ids) in enumerate(zip(prompts, drawn, strict=True)):
            print(f"── {row + 1} of {len(prompts)}")
            reader = Reader(tokenizer, strings, prompt_ids[row])
            print(prompt + reader.add(*ids) + reader.rest())
    if loud:
        print(speed(times, len(prompts), decoder, device), file=sys.stderr)


def speed(times: list[float], rows: int, decoder: Decoder, device: torch.device) -> str:
    """From the first token to the last: what comes before is loading and the prompts."""
    model = decoder.model
    kept = cache_bytes_per_token(model.config, model.embedding.dtype, decoder.multiple)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rate = ""
    if len(times) > 1:
        per_second = (len(times) - 1) / (times[-1] - times[0])
        rate = f"{rows * per_second:,.1f} tokens/s ({rows} x {per_second:,.1f}), "
    return f"{rate}key/value cache {kept:,} bytes a token on each of {decoder.multiple} x {name}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
