"""`clm-dist prepare` against the pipeline of the causal-LM guide and the bare tokenizer, in one run: a Markdown table.

    python benchmarks/prepare.py [--tokens N] [--repeats R] [--output FILE]

All three read the real ELI5 answers from one file of JSON lines (the test split, repeated as a whole) and tokenise them
with GPT-2's own tokenizer on two cores. Each runs as a command of its own, and they take turns, so that what else happens
on the machine meets all. The real files: see CLM_DIST_REAL_DATA in tests/conftest.py.
"""

import argparse
import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median

from common import ROOT, cell, facts, real_data

WORKERS, BLOCK, EVAL_FRACTION = 2, 128, 0.2
DOCUMENTS_A_COPY, DOCUMENTS_PER_BATCH = 5411, 1000  # the latter is the default of `datasets.map` too
TOKENS_A_COPY = 1_820_121  # of the test split: its answers joined by spaces, by GPT-2's tokenizer
SMALL_COPIES, LARGE_COPIES = 17, 66  # 30 and 120 M tokens: inputs of ours whose memory is compared
SAMPLE_MS = 50
OURS, GUIDE, BARE, SMALL, LARGE = "clm-dist", "guide", "tokenizers", "clm-dist, small", "clm-dist, large"
ROWS = {  # title: (figure, format)
    "tokens/s, end to end": ("tokens_per_second", ",.0f"),
    "whole command, s": ("seconds", ".1f"),
    "whole command, CPU seconds": ("cpu", ".1f"),
    "peak memory (PSS), MB": ("pss", ",.0f"),
    "peak memory (anonymous PSS), MB": ("pss_anon", ",.0f"),
    "peak memory (sum of RSS), MB": ("rss", ",.0f"),
    "result on disk, bytes a token": ("bytes_a_token", ".2f"),
    "left in caches, MB": ("cache", ",.1f"),
    "tokens in no block": ("lost", ",.0f"),
}
NOTES = f"""\
ELI5-Category's test split (5,411 questions, {TOKENS_A_COPY:,} tokens), repeated as a whole; blocks of {BLOCK};
{EVAL_FRACTION:.0%} held out; two processes or two threads on two cores; the input in the page cache, earlier writes on
disk before each command. The commands took turns on a machine shared with other work; a cell is median (smallest to
largest). MB: 10^6 bytes. Repeated text flatters whoever remembers words: `tokenizers` and fastokens do, tiktoken does not.

- clm-dist: `clm-dist prepare RECIPE --workers {WORKERS}`, from start to end. It also checks every record, holds
  documents out by their contents, hashes the source, and writes manifest and tokenizer (1.6 MB) beside the blocks.
- guide: the pipeline of Hugging Face's causal-LM guide with `num_proc={WORKERS}` and `save_to_disk`, from start to end.
- tokenizers: `encode_batch_fast` of 1,000 documents at a time, {WORKERS} threads, to numpy arrays. Its tokens/s count
  reading and encoding alone, not start-up, imports or loading; it splits, groups and writes nothing. A generous bound.
- peak memory: the largest sum over all processes of a command, looked at every {SAMPLE_MS} ms in a run of its own, since
  that slows a command by a fifth. PSS (proportional set size) divides a page by the processes that share it; the sum of
  RSS counts what workers share with their parent (libraries, memory before a fork, mapped files) once for each. Both hold
  resident pages of memory-mapped files, which the system can take back; the anonymous part has a peak of its own.
- left in caches: what stands in HF_HOME and TMPDIR after the command, both empty before it.
- tokens in no block: the ends of the splits for clm-dist, of each batch of `map` for the guide. It was checked that all
  others are in blocks of {BLOCK} that `datasets` reads back.
"""


def guide(source: str, tokenizer_folder: str, output: str) -> None:
    """The guide's steps, as its reader types them."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    eli5 = load_dataset("json", data_files=source, split="train").train_test_split(test_size=EVAL_FRACTION).flatten()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    def preprocess_function(examples):
        return tokenizer([" ".join(texts) for texts in examples["answers.text"]])

    def group_texts(examples):
        joined = {name: sum(lists, []) for name, lists in examples.items()}  # noqa: RUF017, the guide's
        whole = len(joined["input_ids"]) // BLOCK * BLOCK
        result = {name: [ids[i : i + BLOCK] for i in range(0, whole, BLOCK)] for name, ids in joined.items()}
        result["labels"] = result["input_ids"].copy()
        return result

    columns = eli5["train"].column_names
    tokenized = eli5.map(preprocess_function, batched=True, num_proc=WORKERS, remove_columns=columns)
    tokenized.map(group_texts, batched=True, num_proc=WORKERS).save_to_disk(output)


def bare(source: str, tokenizer_folder: str, output: str) -> None:
    """Nothing but reading and encoding; writes how long that took, and how many tokens there are."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer, tokens, begin = Tokenizer.from_file(f"{tokenizer_folder}/tokenizer.json"), 0, time.perf_counter()
    with Path(source).open(encoding="utf-8") as file:
        texts = (" ".join(json.loads(line)["answers"]["text"]) for line in file)
        while batch := list(islice(texts, DOCUMENTS_PER_BATCH)):
            encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            tokens += len(np.concatenate([np.array(one.ids, dtype=np.uint16) for one in encoded]))
    seconds = time.perf_counter() - begin
    Path(output).write_text(json.dumps({"seconds": seconds, "tokens": tokens}))


def processes(session: int) -> Iterator[int]:
    """The processes of a session: a command, and all that it started, orphans too."""
    for name in os.listdir("/proc"):  # noqa: PTH208, names only, twenty times a second
        try:
            if name.isdigit() and os.getsid(int(name)) == session:
                yield int(name)
        except OSError:  # ended meanwhile
            continue


def memory(session: int) -> dict[str, float]:
    """PSS, its anonymous part, and RSS summed over a session's processes, in MB."""
    sums = {"pss": 0.0, "pss_anon": 0.0, "rss": 0.0}
    for pid in processes(session):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # ended meanwhile
            continue
        for name, kib in re.findall(r"^(Pss|Pss_Anon|Rss): +(\d+)", text, re.M):
            sums[name.lower()] += int(kib) * 1024 / 1e6
    return sums


def execute(command: list[str], environment: dict[str, str], log: Path, watched: bool) -> dict[str, float]:
    """Runs a command to its end; RuntimeError with the end of its output where it fails.

    Its seconds, or if `watched` the peaks of its memory: looking costs the kernel up to a third of a core, so one run
    cannot tell both.
    """
    samples, cpu = [], sum(os.times()[2:4])  # of ended children, all cores
    with log.open("w") as output:
        os.sync()  # nobody pays for another's writes
        settings = {"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
        begin = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, **settings)
        try:
            while watched and process.poll() is None:
                samples.append(memory(process.pid))
                time.sleep(SAMPLE_MS / 1000)
            code = process.wait()
            seconds = time.perf_counter() - begin
        except BaseException:  # Ctrl-C does not reach another session
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if code:
        raise RuntimeError(f"exit code {code}: {' '.join(log.read_text(errors='replace').split())[-300:]}")
    if watched:
        return {name: max(sample[name] for sample in samples) for name in samples[0]}
    return {"seconds": seconds, "cpu": sum(os.times()[2:4]) - cpu}


@contextmanager
def fresh(result: Path, cache: Path) -> Iterator[None]:
    """An empty cache and no result; neither is left behind."""
    cache.mkdir()
    try:
        yield
    finally:
        for path in (result, cache):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def size(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def lost(result: Path, tokens: int, ends: int) -> int:
    """How many tokens are in no block, as `datasets` reads them; RuntimeError where `ends` cannot have lost so many."""
    import datasets

    splits = datasets.load_from_disk(str(result)).values()
    missing = tokens - sum(split.num_rows for split in splits) * BLOCK
    if any(len(split[i]["input_ids"]) != BLOCK for split in splits for i in (0, -1)):
        raise RuntimeError(f"blocks are not of {BLOCK} tokens")
    if not 0 <= missing < BLOCK * ends:
        raise RuntimeError(f"{missing:,} of {tokens:,} tokens are in no block, more than {ends} ends can hold")
    return missing


def run(side: str, copies: int, source: Path, tokenizer: Path, work: Path, watched: bool) -> dict[str, float]:
    """One command, all its figures; RuntimeError where it fails or its tokens are not those that it read.

    Memory only if `watched`: that takes a second run.
    """
    tokens, result, cache, log = copies * TOKENS_A_COPY, work / "result", work / "cache", work / "log.txt"
    environment = {"HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets"), "TMPDIR": str(cache)}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    if side in (GUIDE, BARE):
        command = [sys.executable, __file__, "worker", side, str(source), str(tokenizer), str(result)]
        environment |= {"RAYON_NUM_THREADS": str(WORKERS)} if side == BARE else {}
    else:
        recipe = work / "recipe.yaml"
        data = {"source": str(source), "text_column": "answers.text", "append_eos": False, "block_size": BLOCK}
        data |= {"eval_fraction": EVAL_FRACTION, "tokenizer": str(tokenizer), "prepared_dir": str(result)}
        values = {"run_dir": str(work / "run"), "data": data, "model": {"name": str(tokenizer)}}
        recipe.write_text(json.dumps({**values, "train": {"epochs": 1}}))
        command = [sys.executable, "-m", "clm_dist", "prepare", str(recipe), "--workers", str(WORKERS)]
    with fresh(result, cache):
        figures = execute(command, environment, log, watched=False)
        figures["tokens_per_second"], counted = tokens / figures["seconds"], tokens
        if side == BARE:
            measured = json.loads(result.read_text())
            figures["tokens_per_second"], counted = tokens / measured["seconds"], measured["tokens"]
        else:
            # of splits; of `map` the last of each 1,000 documents of each worker and split
            ends = copies * DOCUMENTS_A_COPY // DOCUMENTS_PER_BATCH + 2 * WORKERS if side == GUIDE else 2
            figures |= {"bytes_a_token": size(result) / tokens, "cache": size(cache) / 1e6}
            figures["lost"] = lost(result, tokens, ends)
        if side in (OURS, SMALL, LARGE):
            splits = json.loads((result / "manifest.json").read_text())["splits"]
            counted = sum(split["tokens"] for split in splits.values())
        if counted != tokens:
            raise RuntimeError(f"{counted:,} tokens were counted, there are {tokens:,}")
    if not watched:
        return figures
    with fresh(result, cache):
        return figures | execute(command, environment, log, watched=True)


def measure(work: Path, copies: int, repeats: int) -> tuple[dict, dict]:
    """Side: its figures, one of each repeat that went well; side: why the others failed."""
    data = real_data()
    with gzip.open(data / "eli5_category" / "eli5-category-test.json.gz") as file:
        text = "".join(json.dumps(record) + "\n" for record in json.load(file))
    sides = {OURS: copies, GUIDE: copies, BARE: copies, SMALL: SMALL_COPIES, LARGE: LARGE_COPIES}
    inputs = {number: work / f"eli5-{number}.jsonl" for number in sides.values()}
    for number, path in inputs.items():
        with path.open("w") as file:
            file.writelines(text for _ in range(number))
    found, failed = defaultdict(list), defaultdict(list)
    for repeat, (side, number) in ((repeat, item) for repeat in range(repeats) for item in sides.items()):
        try:
            watched = repeat == 0 or side not in (GUIDE, BARE)  # a peer's memory once: it takes minutes
            figures = run(side, number, inputs[number], data / "distilgpt2", work, watched)
            found[side].append(figures)
            print(side, ", ".join(f"{name} {value:,.2f}" for name, value in figures.items()), file=sys.stderr)
        except RuntimeError as error:
            failed[side].append(str(error))
            print(f"{side} failed: {error}", file=sys.stderr)
    return found, failed


def report(found: dict, failed: dict, copies: int) -> str:
    """Two tables: ours and the peers, and ours on more text. A failure is a result too."""

    def values(side: str, name: str) -> list[float]:
        return [figures[name] for figures in found[side] if name in figures]

    def ratio(side: str, other: str, name: str) -> str:
        one, two = values(side, name), values(other, name)
        return f"{median(one) / median(two):.3f}" if one and two and median(two) else ""

    def cells(name: str, form: str, *sides: str) -> str:
        empty = {side: "failed" if failed[side] and not found[side] else "" for side in sides}
        return " | ".join(cell(values(side, name), form) if values(side, name) else empty[side] for side in sides)

    sizes = [f"{number * TOKENS_A_COPY:,} tokens" for number in (copies, SMALL_COPIES, LARGE_COPIES)]
    tables = f"| {sizes[0]} | {OURS} | {GUIDE} | {BARE} | {OURS} / {GUIDE} | {OURS} / {BARE} |\n" + 6 * "|---" + "|\n"
    for title, (name, form) in ROWS.items():
        ratios = f"{ratio(OURS, GUIDE, name)} | {ratio(OURS, BARE, name)}"
        tables += f"| {title} | {cells(name, form, OURS, GUIDE, BARE)} | {ratios} |\n"
    tables += f"\n| {OURS} on more text | {sizes[1]} | {sizes[2]} | ratio |\n|---|---|---|---|\n"
    for title, (name, form) in ROWS.items():
        tables += f"| {title} | {cells(name, form, SMALL, LARGE)} | {ratio(LARGE, SMALL, name)} |\n"
    for side in filter(failed.get, (OURS, GUIDE, BARE, SMALL, LARGE)):
        repeats = len(found[side]) + len(failed[side])
        tables += f"\n{side} failed in {len(failed[side])} of {repeats} repeats; the last time: {failed[side][-1]}\n"
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=60_000_000, metavar="N", help="of the input, at least (60000000)")
    parser.add_argument("--repeats", type=int, default=3, metavar="R", help="of each command (3)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown: tables, command, versions, hardware")
    args = parser.parse_args()
    if args.tokens < 1 or args.repeats < 1:
        parser.error("--tokens and --repeats take 1 or more")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:WORKERS])  # as many cores for each side, on any machine
    copies = math.ceil(args.tokens / TOKENS_A_COPY)
    with tempfile.TemporaryDirectory() as folder:
        tables = report(*measure(Path(folder), copies, args.repeats), copies)
    print(tables)
    if args.output:
        made = facts(f"benchmarks/prepare.py --tokens {args.tokens} --repeats {args.repeats}")
        args.output.write_text(f"# Text to blocks against the guide's pipeline\n\n{tables}\n{made}\n\n{NOTES}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        {GUIDE: guide, BARE: bare}[sys.argv[2]](*sys.argv[3:])
    else:
        main()
