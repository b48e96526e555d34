"""`prepare` as a user meets it: counts that add up, a no-op, refusals, and nothing half-written."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
from conftest import ROOT, SAMPLE, recipe_values, run_command, write_documents, write_recipe

from clm_dist import recipe
from clm_dist.data.blocks import Blocks
from clm_dist.data.manifest import read_manifest
from clm_dist.data.prepared import open_prepared
from clm_dist.data.tokenize import load_tokenizer
from clm_dist.errors import ConfigError, UserError
from clm_dist.preparation import assemble
from clm_dist.preparation.packing import Packed
from clm_dist.preparation.prepare import prepare


def build(folder, **data):
    return recipe.build(recipe_values(folder, data=data))


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if "prepared" in path.name)


def test_counts_add_up_and_are_printed(tiny, capsys):
    config = build(tiny)
    prepare(config)
    manifest = read_manifest(config.data.prepared_dir)
    tokenizer = load_tokenizer(f"{config.data.prepared_dir}/tokenizer")
    documents = [json.loads(line)["text"] for line in (tiny / "texts.jsonl").read_text().splitlines()]
    train, held_out = manifest.splits["train"], manifest.splits["eval"]
    assert (train.documents, held_out.documents) == (96, 24)
    assert train.tokens + held_out.tokens == sum(len(tokenizer(text)["input_ids"]) + 1 for text in documents)
    for counts in (train, held_out):
        assert counts.tokens == counts.blocks * 16 + counts.remainder and counts.remainder < 16
    assert f"{train.tokens:,} tokens = {train.blocks:,} blocks x 16 + {train.remainder}" in capsys.readouterr().out
    opened = datasets.load_from_disk(config.data.prepared_dir)
    assert {name: split.num_rows for name, split in opened.items()} == {"train": train.blocks, "eval": held_out.blocks}
    assert opened["train"][3]["input_ids"] == Blocks(tiny / "prepared" / "train")[[3]][0].tolist()


def test_the_text_is_all_there_and_on_one_side_only(tiny):
    config = build(tiny)
    prepare(config)
    tokenizer = load_tokenizer(str(tiny / "prepared" / "tokenizer"))
    documents = [json.loads(line)["text"] for line in (tiny / "texts.jsonl").read_text().splitlines()]
    found = {}
    for split in ("train", "eval"):
        blocks = Blocks(tiny / "prepared" / split)
        text = tokenizer.decode(blocks[np.arange(len(blocks))].reshape(-1))
        found[split] = [document for document in text.split("<|endoftext|>")[:-1] if document]
    assert not set(found["train"]) & set(found["eval"])
    missing = set(documents) - set(found["train"]) - set(found["eval"])
    assert len(missing) <= 2 * 3  # what the two remainders cut off


def test_again_is_a_no_op_even_for_a_renamed_source(tiny, capsys):
    prepare(build(tiny))
    before = {path: path.stat().st_mtime_ns for path in (tiny / "prepared").rglob("*")}
    (tiny / "texts.jsonl").rename(tiny / "renamed.jsonl")
    config = build(tiny, source=str(tiny / "renamed.jsonl"))
    prepare(config)
    assert "already prepared, nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tiny / "prepared").rglob("*")} == before
    open_prepared(config)  # and training takes it


def test_a_manifest_that_does_not_fit_names_both_values(tiny):
    prepare(build(tiny))
    write_documents(tiny / "other.jsonl", seed=9)
    cases = [
        ({"block_size": 32}, "was prepared with data.block_size=16, the recipe says 32"),
        ({"append_eos": False}, "was prepared with data.append_eos=True, the recipe says False"),
        ({"tokenizer_vocab_size": 310}, "byte-level BPE of 300 trained"),
        ({"source": str(tiny / "other.jsonl")}, "has contents"),
    ]
    for data, needle in cases:
        for refuse in (prepare, open_prepared):
            with pytest.raises(ConfigError) as caught:
                refuse(build(tiny, **data))
            assert needle in str(caught.value) and "set another data.prepared_dir" in str(caught.value)
    with pytest.raises(ConfigError) as caught:  # all at once
        prepare(build(tiny, block_size=32, split_seed=1))
    assert len(caught.value.problems) == 3


def test_changed_contents_under_the_same_name(tiny):
    prepare(build(tiny))
    write_documents(tiny / "texts.jsonl", seed=9)
    with pytest.raises(ConfigError, match="has contents"):
        prepare(build(tiny))


def test_empty_documents_are_left_out_and_counted(tiny):
    with (tiny / "texts.jsonl").open("a") as file:
        file.write('{"text": ""}\n{"text": null}\n{"text": " \\n\\t"}\n')
    config = build(tiny)
    prepare(config)
    manifest = read_manifest(config.data.prepared_dir)
    assert manifest.left_out.empty == 3
    assert manifest.splits["train"].documents == 96


def test_no_text_at_all(tiny):
    (tiny / "texts.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    with pytest.raises(UserError, match="holds no text in column text to train a tokenizer on"):
        prepare(build(tiny))
    prepared = build(tiny, tokenizer=str(tiny / "with" / "tokenizer"), tokenizer_vocab_size=None)
    (tiny / "good.jsonl").write_text('{"text": "some text"}\n' * 40)
    prepare(build(tiny, source=str(tiny / "good.jsonl"), prepared_dir=str(tiny / "with"), eval_fraction=0))
    with pytest.raises(UserError, match=r"holds no text in column text \(2 empty documents\)"):
        prepare(prepared)
    (tiny / "texts.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no text"):
        prepare(build(tiny))
    assert leftovers(tiny) == []


def test_nothing_can_be_held_out_of_copies(tiny):
    (tiny / "texts.jsonl").write_text('{"text": "the same"}\n' * 40)
    with pytest.raises(UserError, match="holds out none of 40 documents with one and the same text"):
        prepare(build(tiny))


def test_less_than_a_block(tiny):
    (tiny / "texts.jsonl").write_text('{"text": "short"}\n')
    with pytest.raises(UserError, match=r"the train split has \d+ tokens, fewer than one block"):
        prepare(build(tiny, eval_fraction=0.0))
    assert leftovers(tiny) == []


def test_named_splits(tmp_path):
    (tmp_path / "texts").mkdir()
    write_documents(tmp_path / "texts" / "train.jsonl", 50, seed=1)
    write_documents(tmp_path / "texts" / "validation.jsonl", 20, seed=2)
    prepare(build(tmp_path, source=str(tmp_path / "texts"), eval_fraction=None, eval_split="validation"))
    splits = read_manifest(str(tmp_path / "prepared")).splits
    assert (splits["train"].documents, splits["eval"].documents) == (50, 20)


def test_a_folder_of_somebody_else_is_left_alone(tiny):
    (tiny / "prepared").mkdir()
    (tiny / "prepared" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and was not written by prepare"):
        prepare(build(tiny))
    assert (tiny / "prepared" / "thesis.txt").read_text() == "years of work"


def test_the_guides_grouping_is_caught(tiny, monkeypatch):
    """Mutant: grouping batch by batch, as the guide's map does, loses a remainder for each; conservation says so."""
    right = assemble.concatenate

    def per_batch(batches, block_size):
        rest = 0
        for batch in batches:
            for ids in np.array_split(batch.ids, 5):
                for piece in right([assemble.Documents(ids, np.array([len(ids)]))], block_size):
                    yield Packed(piece.blocks, piece.starts[:0], None)
        return rest

    monkeypatch.setattr(assemble, "concatenate", per_batch)
    with pytest.raises(AssertionError, match="tokens in"):
        prepare(build(tiny))
    assert not (tiny / "prepared").exists()


def test_no_space_left(tiny):
    """A real failing write: the limit on a file's size stands for the full disk, and EFBIG for ENOSPC."""
    write_documents(tiny / "texts.jsonl", count=3000)

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        [sys.executable, "-m", "clm_dist", "prepare", str(tiny / "recipe.yaml")],
        cwd=ROOT, capture_output=True, text=True, preexec_fn=small_files,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "cannot write data.prepared_dir=" in done.stderr and "free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert leftovers(tiny) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk(tiny):
    small = tiny / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"may not mount: {mounted.stderr.decode().strip()}")
    try:
        write_documents(tiny / "texts.jsonl", count=3000)
        done = run_command("prepare", tiny / "recipe.yaml", f"data.prepared_dir={small / 'prepared'}")
        assert done.code == 2, done.err
        assert "No space left on device" in done.err and "Traceback" not in done.err
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_data_set(tiny, number):
    write_documents(tiny / "texts.jsonl", count=60_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "clm_dist", "prepare", str(tiny / "recipe.yaml")],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.time() + 300
    while not leftovers(tiny) and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, "was done before it could be interrupted"
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "interrupted; what was finished is kept" in err and "Traceback" not in err
    assert not (tiny / "prepared").exists()


def test_prepare_is_not_launched(tiny):
    done = run_command("prepare", tiny / "recipe.yaml", env={"WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    assert done.code == 2 and "prepare is one process's work" in done.err


def test_a_block_size_beyond_the_model_is_refused_before_the_work(tiny):
    done = run_command("prepare", tiny / "recipe.yaml", "data.block_size=128")
    assert done.code == 2
    assert "data.block_size=128 exceeds the 64 positions of gpt2; set data.block_size=64" in done.err
    assert leftovers(tiny) == []


def test_the_shipped_sample_is_elis_own_schema():
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 100
    fields = ["q_id", "title", "selftext", "category", "subreddit", "answers", "title_urls", "selftext_urls"]
    for row in rows:
        assert list(row) == fields
        answers = row["answers"]
        assert list(answers) == ["a_id", "text", "score", "text_urls"]
        assert len({len(values) for values in answers.values()}) == 1 and answers["text"]
    assert len({row["q_id"] for row in rows}) == len(rows)
    assert len({row["title"] for row in rows}) == len(rows)


def test_write_recipe_helper(tmp_path):
    """The recipes of these tests are recipes."""
    assert recipe.load(write_recipe(tmp_path / "r.yaml", recipe_values(tmp_path)), []).train.max_steps == 6


def test_a_recipe_that_only_prepares(tiny):
    """Without a model or how to train it."""
    values = recipe_values(tiny)
    del values["model"], values["train"]
    done = run_command("prepare", write_recipe(tiny / "only.yaml", values))
    assert done.code == 0, done.err
    done = run_command("prepare", tiny / "only.yaml", "model.type=gpt2", "model.config={n_positions: 8}")
    assert done.code == 0, done.err  # a model named on the command line is that one
    done = run_command("prepare", tiny / "only.yaml", "data.tokenizer_vocab_size=null", "data.prepared_dir=elsewhere")
    assert done.code == 2 and "no tokenizer: set data.tokenizer" in done.err


def test_a_part_that_is_gone_is_not_already_prepared(tiny):
    prepare(build(tiny))
    [arrow] = (tiny / "prepared" / "train").glob("*.arrow")
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[:-8])
    for refuse in (prepare, open_prepared):
        with pytest.raises(UserError, match=r"\.arrow has [\d,]+ bytes, [\d,]+ were written; copy it again"):
            refuse(build(tiny))
    arrow.unlink()
    with pytest.raises(UserError, match=r"\.arrow is missing"):
        prepare(build(tiny))
