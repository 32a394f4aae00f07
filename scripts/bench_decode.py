"""Speed and error of decoding over a key/value cache, beside its peers.

    python scripts/bench_decode.py                                  # 36 shapes, two layouts, FA2
    python scripts/bench_decode.py --batches 64 --lengths 8192 --heads 32/8 --head-sizes 128 \\
        --peers fa2 cudnn flex fa4
    python scripts/bench_decode.py --sweep                          # tiles, stages and splits

bf16, one token a sequence (--tokens: more). GB/s counts K and V up to each sequence's length, read
once; `of copy` divides by what copying 1 GiB reaches in the same run, bytes read and written. Times
are medians of CUDA-graph replays by CUDA events, L2 flushed between them. Peers read contiguous
caches at full length. Errors are of the first kv head of the first and last sequence against
float64; `x eager` divides by the error of eager PyTorch in bf16.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention import attention_decode, decode_tiles, tiles
from kernels.attention.decode_reference import decode_reference
from kernels.attention.decode_tiles import DecodeTile
from kernels.attention.portable.decode import decode
from kernels.attention.portable.launch import Features
from scripts.parts.where import where

DTYPE = torch.bfloat16
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # tried by --sweep
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int  # room for each sequence
    heads: int
    kv_heads: int
    head_size: int
    tokens: int

    @property
    def cache_sizes(self) -> tuple[int, int, int, int]:
        return self.batch, self.length, self.kv_heads, self.head_size

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}"
        return f"B={self.batch} S={self.length} {heads} D={self.head_size}"


class Caches:
    """One block of memory that every shape's K and V are views of: the largest takes 64 GiB."""

    def __init__(self, shapes: list[Shape]) -> None:
        free = torch.cuda.mem_get_info()[0]
        sizes = [torch.Size(shape.cache_sizes).numel() for shape in shapes]
        self.most = (free - 8 * 2**30) // (2 * DTYPE.itemsize)
        fitting = [size for size in sizes if size <= self.most]
        if not fitting:
            raise SystemExit(f"no shape fits the {free >> 30} GiB free on this GPU")
        self.blocks = [torch.empty(max(fitting), dtype=DTYPE, device="cuda") for _ in "kv"]
        for block in self.blocks:
            for piece in block.split(2**28):
                piece.normal_()

    def views(self, shape: Shape) -> list[Tensor] | None:
        """k and v [B, S, H_kv, D], or None when the GPU has no room for them."""
        size = torch.Size(shape.cache_sizes).numel()
        if size > self.most:
            return None
        return [block[:size].view(shape.cache_sizes) for block in self.blocks]


class Inputs:
    """The arguments of a call, and its exact answer for two heads."""

    def __init__(self, shape: Shape, k: Tensor, v: Tensor, page: int, ragged: bool) -> None:
        torch.manual_seed(0)
        B, S, T = shape.batch, shape.length, shape.tokens
        self.shape, self.page = shape, page
        self.q = torch.randn(B, T, shape.heads, shape.head_size, dtype=DTYPE, device="cuda")
        self.k, self.v, self.table = k, v, None
        lengths = torch.full((B,), S)
        if ragged:
            lengths = torch.randint(S // 2, S + 1, (B,))
        self.lengths = lengths.to("cuda", torch.int32)
        if page:
            self.k, self.v = (x.view(-1, page, *x.shape[2:]) for x in (k, v))
            order = torch.randperm(B * S // page, device="cuda").to(torch.int32)
            self.table = order.view(B, S // page)
        itemsize = k.element_size()
        self.bytes = 2 * int(lengths.sum()) * shape.kv_heads * shape.head_size * itemsize

    def ours(self) -> Tensor:
        return attention_decode(self.q, self.k, self.v, self.lengths, page_table=self.table)

    def with_tile(self, tile: DecodeTile, n_splits: int | None) -> Tensor:
        features = Features(self.shape.head_size**-0.5, after=0)
        given = (self.q, self.k, self.v, self.lengths, self.table)
        return decode(*given, features, tile=tile, n_splits=n_splits)[0]

    @property
    def rows(self) -> int:
        """Of a query tile."""
        return decode_tiles.query_rows(self.shape.tokens * self.shape.group, DTYPE)

    @property
    def shipped(self) -> DecodeTile:
        D = self.shape.head_size
        return decode_tiles.choose(self.q.device, self.rows, D, D, DTYPE)

    def splits(self, tile: DecodeTile | None = None) -> int:
        """How many the kernels choose."""
        shape, D = self.shape, self.shape.head_size
        programs = -(-shape.tokens * shape.group // self.rows) * shape.kv_heads * shape.batch
        given = (tile or self.shipped, programs, shape.length, self.rows, D, D, DTYPE)
        return decode_tiles.choose_splits(self.q.device, *given)

    def fits(self, tile: DecodeTile) -> bool:
        """Whether the card has the shared memory."""
        capability, D = torch.cuda.get_device_capability(), self.shape.head_size
        need = decode_tiles.shared_bytes(capability, tile, self.rows, D, D, DTYPE)
        return need <= tiles.SHARED_LIMIT.get(capability, need)

    def errors(self, out: Tensor) -> dict[str, float]:
        """The largest error of a few heads, and how many times eager's that is."""
        ours = eager = 0.0
        for b in {0, self.shape.batch - 1}:
            one = slice(b, b + 1)
            k, v = (
                x[one, :, :1] if self.table is None
                else x[self.table[b].long(), :, :1].flatten(0, 1)[None]
                for x in (self.k, self.v)
            )  # fmt: skip
            q = self.q[one, :, : self.shape.group]
            given = (q, k, v, self.lengths[one])
            exact = decode_reference(*given, compute=torch.float64)[0]
            plain = decode_reference(*given, compute=DTYPE)[0]
            mine = out[one, :, : self.shape.group]
            ours = max(ours, (mine.double() - exact).abs().max().item())
            eager = max(eager, (plain.double() - exact).abs().max().item())
        return {"error": ours, "error_over_eager": ours / eager}


def sdpa(backend: SDPBackend, inputs: Inputs) -> Call:
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    grouped = inputs.shape.group > 1

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2)

    return call


def flex(inputs: Inputs) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # else the 8 recompilations of one function end the run
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    grouped = inputs.shape.group > 1
    return lambda: compiled(q, k, v, enable_gqa=grouped).transpose(1, 2)


def flash4(inputs: Inputs) -> Call | str:
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError as missing:
        return f"FlashAttention-4 is not installed: {missing}"

    def call() -> Tensor:
        result = flash_attn_func(inputs.q, inputs.k, inputs.v)
        return result[0] if isinstance(result, tuple) else result

    return call


PEERS: dict[str, Callable[[Inputs], Call | str]] = {
    "fa2": lambda inputs: sdpa(SDPBackend.FLASH_ATTENTION, inputs),
    "cudnn": lambda inputs: sdpa(SDPBackend.CUDNN_ATTENTION, inputs),
    "flex": flex,
    "fa4": flash4,
}


def milliseconds(call: Callable[[], Any], rep: int) -> float:
    """Median time on the GPU of a captured call: decoding is launched from graphs, or waits."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # what the first call allocates and compiles stays outside
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    median: float = triton.testing.do_bench(graph.replay, warmup=5, rep=rep, return_mode="median")
    return median


def copy_bandwidth(rep: int) -> float:
    """GB/s, bytes read plus bytes written, of copying 1 GiB."""
    source = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms: float = triton.testing.do_bench(
        lambda: target.copy_(source), warmup=5, rep=max(rep, 50), return_mode="median"
    )
    return 2 * 2**30 / ms / 1e6


@torch.no_grad()
def compare(args: argparse.Namespace, shapes: list[Shape], copy: float) -> list[dict[str, Any]]:
    """Our two layouts and the peers at every shape; prints a row each."""
    caches = Caches(shapes)
    compile_all(args, shapes, caches)
    rows = []
    print(f"{'shape':26} {'backend':15} {'splits':>6} {'ms':>8} {'GB/s':>6} {'of copy':>8}"
          f"  {'error':>8} {'x eager':>7}")  # fmt: skip
    for shape in shapes:
        views = caches.views(shape)
        if views is None:
            print(f"{shape!s:26} does not fit this GPU")
            continue
        layouts = [(f"ours {name}", args.page if name == "paged" else 0) for name in args.layouts]
        for name, page in [*layouts, *((peer, 0) for peer in args.peers)]:
            peer = name in PEERS
            inputs = Inputs(shape, *views, page, args.ragged and not peer)
            row = {**asdict(shape), "backend": name}
            try:
                call = PEERS[name](inputs) if peer else inputs.ours
                if isinstance(call, str):
                    print(f"{shape!s:26} {name:15} {call}")
                    continue
                errors = inputs.errors(call())
                ms = milliseconds(call, args.rep)
            except Exception as failure:  # a peer may refuse a shape; the others still count
                print(f"{shape!s:26} {name:15} {type(failure).__name__}: {failure}".splitlines()[0])
                continue
            speed = inputs.bytes / ms / 1e6
            splits = "" if peer else str(inputs.splits())
            print(
                f"{shape!s:26} {name:15} {splits:>6} {ms:8.4f} {speed:6.0f}"
                f" {speed / copy:8.3f}  {errors['error']:8.1e} {errors['error_over_eager']:7.2f}",
                flush=True,
            )
            row |= {"splits": splits, "ms": ms, "gb_per_s": speed, "of_copy": speed / copy}
            rows.append({**row, **errors})
    return rows


def compile_all(args: argparse.Namespace, shapes: list[Shape], caches: Caches) -> None:
    """Every kernel at once: one after the other they would take longer than the timing."""
    pages = [args.page if layout == "paged" else 0 for layout in args.layouts]
    calls = []
    for shape, page in itertools.product(shapes, pages):
        views = caches.views(shape)
        if views is not None:
            calls.append(Inputs(shape, *views, page, False).ours)
    in_parallel(calls)


def in_parallel(calls: list[Callable[[], Any]]) -> list[Any]:
    """Results or exceptions of the calls, from as many threads as there are cores."""

    def attempt(call: Callable[[], Any]) -> Any:
        try:
            with torch.no_grad():
                return call()
        except Exception as failure:
            return failure

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(attempt, calls))
    torch.cuda.synchronize()
    return results


@torch.no_grad()
def sweep(args: argparse.Namespace, shapes: list[Shape], copy: float) -> list[dict[str, Any]]:
    """Rows of every tile and number of splits tried; prints the fastest of each shape."""
    caches = Caches(shapes)
    page = args.page if args.layouts == ["paged"] else 0
    rows = []
    for shape in shapes:
        views = caches.views(shape)
        if views is None:
            print(f"{shape!s:26} does not fit this GPU")
            continue
        inputs = Inputs(shape, *views, page, args.ragged)
        timed = sorted(sweep_one(inputs, args.rep), key=lambda row: row[0])
        print(f"\n{shape}, page {page}: shipped {inputs.shipped}, {inputs.splits()} splits")
        for ms, tile, n in timed[: args.top]:
            notes = " own choice" * (n == inputs.splits(tile)) + " shipped" * (
                tile == inputs.shipped
            )
            speed = inputs.bytes / ms / 1e6
            print(
                f"  {tile!s:44} {n:4d} splits {ms:8.4f} ms {speed:6.0f} GB/s"
                f" {speed / copy:6.3f} of copy {notes}",
                flush=True,
            )
        rows += [{**asdict(shape), **asdict(t), "splits": n, "ms": ms} for ms, t, n in timed]
    return rows


def sweep_one(inputs: Inputs, rep: int) -> list[tuple[float, DecodeTile, int]]:
    """(ms, tile, splits): every tile at the splits it would get, the best 4 at others too."""
    sizes = itertools.product((32, 64, 128, 256), (2, 4, 8), (2, 3, 4, 5))
    candidates = [tile for tile in itertools.starmap(DecodeTile, sizes) if inputs.fits(tile)]
    expected = inputs.ours().float()
    calls = [partial(inputs.with_tile, tile, None) for tile in candidates]
    good = []
    for tile, result in zip(candidates, in_parallel(calls), strict=True):
        if isinstance(result, Exception):
            print(f"{tile}: {type(result).__name__}: {result}".splitlines()[0])
        elif (wrong := (result.float() - expected).abs().max()) > 0.02 * expected.abs().max():
            print(f"{tile}: WRONG by {wrong.item():.2g}")
        else:
            good.append((tile, inputs.splits(tile)))

    def timed(tile: DecodeTile, n: int) -> tuple[float, DecodeTile, int]:
        return milliseconds(partial(inputs.with_tile, tile, n), rep), tile, n

    rows = [timed(tile, n) for tile, n in good]
    for _, tile, own in sorted(rows, key=lambda row: row[0])[:4]:
        most = -(-inputs.shape.length // tile.keys)
        rows += [timed(tile, n) for n in SPLITS if n <= most and n != own]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batches", type=int, nargs="+", help="default 1 8 64; --sweep: 64 1")
    add("--lengths", type=int, nargs="+", help="default 1024 8192 65536; --sweep: 8192")
    add("--heads", nargs="+", help="query/kv heads, default 32/8 32/32; --sweep: 32/8")
    add("--head-sizes", type=int, nargs="+", default=[64, 128], help="default 64 128")
    add("--tokens", type=int, default=1, help="query tokens of each sequence")
    add(
        "--layouts",
        nargs="+",
        choices=["contiguous", "paged"],
        default=["contiguous", "paged"],
        help="of the cache (default: both)",
    )
    add("--page", type=int, default=64, help="keys of a page")
    add(
        "--peers", nargs="*", choices=list(PEERS), default=["fa2"], help="beside ours (default fa2)"
    )
    add("--ragged", action="store_true", help="lengths between half and full, ours alone")
    add("--rep", type=int, default=20, help="milliseconds of timing per row")
    add("--sweep", action="store_true", help="time tiles and splits (paged with --layouts paged)")
    add("--top", type=int, default=15, help="how many of the sweep's rows to print")
    add("--json", type=Path, help="write the rows there")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU, torch sees none")
    if args.tokens > 1 and args.peers:
        print("peers are left out: their masks for several tokens differ from one another")
        args.peers = []
    shapes = [
        Shape(B, S, *map(int, heads.split("/")), D, args.tokens)
        for D, heads, B, S in itertools.product(
            args.head_sizes,
            args.heads or (["32/8"] if args.sweep else ["32/8", "32/32"]),
            args.batches or ([64, 1] if args.sweep else [1, 8, 64]),
            args.lengths or ([8192] if args.sweep else [1024, 8192, 65536]),
        )
    ]
    about, began = where(), time.perf_counter()
    copy = copy_bandwidth(args.rep)
    print(", ".join(f"{k} {v}" for k, v in about.items()) + f"; copy {copy:.0f} GB/s")
    rows = (sweep if args.sweep else compare)(args, shapes, copy)
    print(f"{time.perf_counter() - began:.0f} s")
    if args.json:
        found = {"environment": about, "copy_gb_per_s": copy, "rows": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
