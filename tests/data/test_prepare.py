"""Tokenising ahead of time: the same whoever does it, however often it is interrupted."""

import json
import os
import signal

import numpy as np
import pytest

from hybrid_jax import data
from hybrid_jax.config.data import Source
from hybrid_jax.data import corpus, preparation, workers
from hybrid_jax.data.sources import json_lines

TEXTS = [f"alpha beta {n % 40} gamma " * (1 + n % 7) for n in range(120)]


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(TEXTS, 300)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Lines in units of a few each."""
    monkeypatch.setattr(json_lines, "_UNIT_BYTES", 2000)
    folder = tmp_path / "source"
    folder.mkdir()
    lines = [json.dumps({"text": text}) for text in TEXTS] + ["{broken", ""]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.txt").write_text("a text of its own")
    return Source(path=str(folder))


def contents(dataset):
    """Every document that is learned from, and every one held out."""
    return [
        [store.read(n, 0, store.lengths[n])[0].tolist() for n in range(store.num_documents)]
        for store in (dataset.training, dataset.heldout)
    ]


def test_documents_come_back_in_order_and_bad_ones_are_counted(source, tokenizer, tmp_path):
    told = []
    made = data.prepare(source, tmp_path / "out", tokenizer, report=lambda *a: told.append(a))
    training, heldout = contents(made)
    wanted = ["a text of its own", *TEXTS]
    found = training + heldout
    assert sorted(found) == sorted([*tokenizer.encode(text), tokenizer.end_id] for text in wanted)
    assert 0 < len(heldout) < 20
    # In the order of the source: what is held out is missing, nothing has moved.
    in_order = iter([*tokenizer.encode(text), tokenizer.end_id] for text in wanted)
    assert all(ids in in_order for ids in training)
    assert made.summary["skipped"] == {"broken JSON": 1}
    (named,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(named)[1] == "broken JSON"
    assert told[0][0] == 0 and told[-1][0] == told[-1][1] == made.summary["shards"] > 5
    assert told[-1][2] == made.training.num_tokens + made.heldout.num_tokens
    made.verify()


def test_workers_make_the_same_and_may_be_killed(source, tokenizer, tmp_path):
    alone = data.prepare(source, tmp_path / "alone", tokenizer)
    killed = []

    def kill_a_worker(done, total, tokens):
        children = [int(pid) for pid in _children()]
        if done == 2 and children:
            os.kill(children[-1], signal.SIGKILL)
            killed.append(children[-1])

    shared = data.prepare(
        source, tmp_path / "shared", tokenizer, num_workers=2, report=kill_a_worker
    )
    assert killed
    assert contents(shared) == contents(alone)
    assert shared.training.fingerprint() == alone.training.fingerprint()


def _children():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
            with open(f"/proc/{pid}/cmdline") as file:
                command = file.read()
        except OSError:
            continue
        if parent == os.getpid() and "spawn_main" in command:
            yield pid


def test_an_interrupted_one_goes_on_where_it_stopped(source, tokenizer, tmp_path):
    class Interrupted(Exception):
        pass

    def stop(done, total, tokens):
        if done == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        data.prepare(source, tmp_path / "out", tokenizer, report=stop)
    with pytest.raises(ValueError, match=r"out is not finished.*the same command goes on"):
        data.open_dataset(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "shards").iterdir()}
    # Torn as a kill leaves it: the arrays without their record.
    (tmp_path / "out" / "shards" / "00001.json").unlink()
    told = []
    again = data.prepare(source, tmp_path / "out", tokenizer, report=lambda *a: told.append(a[0]))
    assert told[0] == 2
    same = [path for path, time in before.items() if path.stat().st_mtime_ns == time]
    assert {path.name[:5] for path in same} == {"00000", "00002"}
    whole = data.prepare(source, tmp_path / "whole", tokenizer)
    assert contents(again) == contents(whole)


def test_other_files_settings_or_tokenizers_are_refused(source, tokenizer, tmp_path):
    data.prepare(source, tmp_path / "out", tokenizer)
    other = data.train_tokenizer(TEXTS, 290)
    with pytest.raises(ValueError, match=r"begun with other tokenizer.*Delete it to tokenise"):
        data.prepare(source, tmp_path / "out", other)
    with pytest.raises(ValueError, match=r"begun with other settings"):
        data.prepare(source, tmp_path / "out", tokenizer, deduplicate=True)
    os.utime(os.path.join(source.path, "b.txt"), (1, 1))
    with pytest.raises(ValueError, match=r"begun with other files"):
        data.prepare(source, tmp_path / "out", tokenizer)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"mine already holds other files"):
        data.prepare(source, tmp_path / "mine", tokenizer)


def test_duplicates_are_left_out_but_for_the_first(tmp_path, tokenizer):
    lines = [json.dumps({"text": text}) for text in ["alpha", "beta", "alpha", "gamma", "beta"]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    made = data.prepare(
        Source(path=str(tmp_path / "a.jsonl")),
        tmp_path / "out",
        tokenizer,
        heldout_fraction=0.0,
        deduplicate=True,
    )
    texts = [tokenizer.decode(ids) for ids in contents(made)[0]]
    assert texts == ["alpha", "beta", "gamma"] and made.summary["duplicates"] == 2


def test_a_source_that_is_all_bad_is_an_error(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"b": 2}\n[]\n')
    with pytest.raises(ValueError, match=r"to learn from: 1 not a JSON object, 2 no field 'text'"):
        data.prepare(Source(path=str(tmp_path / "a.jsonl")), tmp_path / "out", tokenizer)


def test_damage_is_named(source, tokenizer, tmp_path):
    made = data.prepare(source, tmp_path / "out", tokenizer)
    ids = tmp_path / "out" / "shards" / "00002.ids.npy"
    whole = ids.read_bytes()
    ids.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1, whole[-1]]))
    with pytest.raises(ValueError, match=r"00002 is damaged \(checksum\)"):
        made.verify()
    ids.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=r"shards/00002 .*Delete the directory"):
        data.open_dataset(tmp_path / "out")


def test_a_job_that_kills_its_workers_is_named():
    with pytest.raises(OSError, match=r"A worker died 3 times on job 1\. Is there enough memory"):
        list(workers.run(_dies_on_one, [0, 1, 2], 2, lambda job: f"job {job}"))


def _dies_on_one(job):
    if job == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def test_an_error_in_a_worker_is_the_callers():
    with pytest.raises(ZeroDivisionError):
        list(workers.run(_divides, [0, 1], 2, str))


def _divides(job):
    return 1 / job


def test_a_tokenizer_learns_what_templates_need(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "hi", "response": "hello"}) + "\n")
    source = Source(path=str(tmp_path / "a.jsonl"), template="minimax-m1")
    with pytest.raises(ValueError, match=r"minimax-m1 writes <begin_of_document>.*does not have"):
        data.prepare(source, tmp_path / "out", data.train_tokenizer(TEXTS, 300))
    made = data.prepare(
        source,
        tmp_path / "out",
        corpus.make_tokenizer((source,), 270, 0.0, note=lambda text: None),
        heldout_fraction=0.0,
    )
    ids, learned = made.training.read(0, 0, int(made.training.lengths[0]))
    assert made.tokenizer.decode(ids[np.asarray(learned)]) == "hello"


def test_tokens_of_ones_own_are_stored_as_they_are(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(preparation, "_TOKENS_A_SHARD", 10)
    learned = np.array([False, True, True])
    documents = [
        data.Encoded(
            str(n), str(n), np.arange(n, n + 3, dtype=np.uint32), learned if n % 2 else None
        )
        for n in range(9)
    ]
    made = data.store_tokens(documents, tmp_path / "out", tokenizer, heldout_fraction=0.0)
    assert made.summary["shards"] == 3
    assert contents(made)[0] == [[n, n + 1, n + 2] for n in range(9)]
    for n in range(9):
        mask = made.training.read(n, 0, 3)[1]
        assert (mask is None or mask.all()) if n % 2 == 0 else mask.tolist() == learned.tolist()
    made.verify()
    with pytest.raises(ValueError, match=r"already holds other files"):
        data.store_tokens(documents, tmp_path / "out", tokenizer)
    with pytest.raises(ValueError, match=r"holds nothing to learn from"):
        data.store_tokens([], tmp_path / "none", tokenizer)
