"""The long fuzz run, `make fuzz`: thousands of inputs of all kinds, and a table of how they ended.

    python tests/fuzz/long.py                       2,400 inputs on two processes
    python tests/fuzz/long.py --kinds models yaml   only these kinds
    python tests/fuzz/long.py --again models/3/17   one input again, by its seed
    python tests/fuzz/long.py --input '{"kind": ...}'

Every input is a pure function of kind, batch and place, for which it names three words: `models/3/17`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from contract import Verdict
from hypothesis import HealthCheck, Phase, given, seed, settings
from kinds import KINDS, Bench, Input
from sandbox import sandbox

#: inputs of one seed
BATCH = 100
#: hypothesis follows each example that it draws with variations of it: of so many one is taken
EVERY = 5
ENDINGS = ("success", "refusal", "interrupted")


class _Enough(BaseException):
    """Ends hypothesis' drawing; no failure of an example, which would be an `Exception`."""


def drawn(bench: Bench, kind: str, batch: int, count: int = BATCH) -> list[Input]:
    """The first `count` inputs of a batch."""
    found: list[Input] = []
    number = list(KINDS).index(kind)
    options: dict[str, Any] = {"database": None, "deadline": None, "derandomize": False, "phases": [Phase.generate]}

    @seed(1000 * number + batch)
    @settings(max_examples=EVERY * BATCH, suppress_health_check=list(HealthCheck), **options)
    @given(KINDS[kind].inputs(bench.root))
    def collect(one: Input) -> None:
        found.append(one)
        if len(found) == EVERY * count:
            raise _Enough

    with suppress(_Enough):
        collect()
    return found[EVERY - 1 :: EVERY]


def batches(total: int, kinds: list[str]) -> dict[str, int]:
    """Inputs of each kind, by their shares."""
    shares = {kind: KINDS[kind].share for kind in kinds}
    whole = sum(shares.values())
    return {kind: -(-total * share // whole) for kind, share in shares.items()}


def named(bench: Bench, counts: dict[str, int], start: int = 0) -> Iterator[tuple[str, str, Input]]:
    """(name, kind, input) of all inputs of a run."""
    for kind, count in counts.items():
        for batch in range(start, start + -(-count // BATCH)):
            for place, one in enumerate(drawn(bench, kind, batch)):
                if (batch - start) * BATCH + place < count:
                    yield f"{kind}/{batch}/{place}", kind, one


def main() -> int:
    """Run, print, and return 1 where an input broke the contract."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=2400)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=0, help="the first batch: another one gives other inputs")
    parser.add_argument("--again", nargs="+", default=[], metavar="KIND/BATCH/PLACE")
    parser.add_argument("--input", metavar="JSON", help='as a failure prints it: {"kind": ..., ...}')
    parser.add_argument("--keep", action="store_true", help="keep the folder, and print where it is")
    parser.add_argument("--folder", type=Path, help="default: a temporary one, in memory where there is /dev/shm")
    parser.add_argument("--json", type=Path, help="also write every input and its ending, a line each")
    options = parser.parse_args()
    memory = Path("/dev/shm")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _run(options, folder)
    finally:
        if options.keep:
            print(f"kept: {folder}")
        elif not options.folder:
            shutil.rmtree(folder, ignore_errors=True)


def _run(options: argparse.Namespace, folder: Path) -> int:
    started = time.monotonic()
    with ExitStack() as stack:
        again = bool(options.again or options.input)
        jobs = 1 if again else options.jobs
        boxes = [stack.enter_context(sandbox(folder / f"box-{n}")) for n in range(jobs)]
        benches = [Bench(folder / f"bench-{n}", box, folder / "sound") for n, box in enumerate(boxes)]
        first = benches[0]
        todo: Queue[tuple[str, str, Input]] = Queue()
        if options.input:
            one = json.loads(options.input)
            kind = one.pop("kind")
            first.prepare(kind)
            todo.put(("input", kind, one))
        elif options.again:
            for name in options.again:
                kind, batch, place = name.split("/")
                first.prepare(kind)
                todo.put((name, kind, drawn(first, kind, int(batch))[int(place)]))
        else:
            for kind in options.kinds:
                first.prepare(kind)
            for item in named(first, batches(options.inputs, options.kinds), options.batch):
                todo.put(item)
        written = stack.enter_context(options.json.open("w", buffering=1)) if options.json else None
        total = todo.qsize()
        print(f"{total} inputs after {time.monotonic() - started:.0f} s", flush=True)
        results: list[tuple[str, str, Input, Verdict]] = []

        def work(bench: Bench) -> None:
            while True:
                try:
                    name, kind, one = todo.get_nowait()
                except Empty:
                    return
                verdict = bench.judge(kind, one)
                if verdict.fault is not None:
                    one, verdict = bench.smallest(kind, one, verdict)
                results.append((name, kind, one, verdict))
                if written is not None:
                    written.write(json.dumps({"name": name, "kind": kind, "input": one} | vars(verdict)) + "\n")
                if again:
                    print(f"{name}: {json.dumps({'kind': kind} | one)}\n  {verdict}")
                elif len(results) % 100 == 0:
                    failed = sum(result[3].fault is not None for result in results)
                    print(f"{len(results)} of {total}, {failed} failed, {time.monotonic() - started:.0f} s", flush=True)

        threads = [threading.Thread(target=work, args=(bench,)) for bench in benches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if len(results) != total:
        print(f"only {len(results)} of {total} inputs were tried", file=sys.stderr)
        return 1
    return _summary(results)


def _summary(results: list[tuple[str, str, Input, Verdict]]) -> int:
    failures = [result for result in results if result[3].fault is not None]
    print(f"\n{'kind':14}{'inputs':>8}{'success':>9}{'refusal':>9}{'interrupted':>13}{'failures':>10}")
    for kind in [*sorted({result[1] for result in results}), "all"]:
        of_kind = [result[3] for result in results if kind in (result[1], "all")]
        good = Counter(verdict.ending for verdict in of_kind if verdict.fault is None)
        bad = len(of_kind) - sum(good.values())
        cells = "".join(f"{good[ending]:>{width}}" for ending, width in zip(ENDINGS, (9, 9, 13), strict=True))
        print(f"{kind:14}{len(of_kind):>8}{cells}{bad:>10}")
    for name, kind, one, verdict in sorted(failures, key=lambda f: (str(f[3].fault), f[0])):
        print(f"\n{name}: {verdict.fault}: {verdict.detail}\n  {json.dumps({'kind': kind} | one)}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
