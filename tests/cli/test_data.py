"""`hybrid-jax data`: prepare, show, verify; bad input exits with 2 and a way out."""

import json

import pytest

from hybrid_jax import cli


def said(capsys, *argv):
    """(exit code, what it printed) of `hybrid-jax data ...`."""
    try:
        code = cli.main(["data", *map(str, argv)])
    except SystemExit as stop:
        code = stop.code
    output = capsys.readouterr()
    return code, " ".join((output.out + output.err).split())


@pytest.fixture
def chats(tmp_path):
    folder = tmp_path / "chats"
    folder.mkdir()
    lines = [json.dumps({"prompt": f"say {n}", "response": f"word {n}"}) for n in range(60)]
    (folder / "a.jsonl").write_text("\n".join([*lines, "{broken"]))
    return folder


def test_a_folder_is_prepared_shown_and_verified(chats, tmp_path, capsys):
    out = tmp_path / "out"
    prepare = ("prepare", chats, "--out", out, "--vocab-size", "300", "--template", "minimax-m2")
    code, text = said(capsys, *prepare, "--workers", "0", "--heldout-fraction", "0.2")
    assert code == 0 and "60 documents" in text and '"broken JSON": 1' in text
    assert (out / "lengths.png").stat().st_size > 5000
    # Done already: nothing is made again.
    shard = next((out / "shards").glob("*.ids.npy"))
    before = shard.stat().st_mtime_ns
    code, text = said(capsys, *prepare, "--heldout-fraction", "0.2")
    assert code == 0 and shard.stat().st_mtime_ns == before
    code, text = said(capsys, "show", out, "--sequence-length", "64", "--packing", "FirstFit",
                      "--row", "0")  # fmt: skip
    assert code == 0 and "packed by FirstFit" in text
    # What the assistant says is learned, all around it is not.
    assert "]~b]ai ⟧word" in text and "⟦" in text
    assert said(capsys, "verify", out) == (0, f"{out}: 1 shards are as they were written.")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    code, text = said(capsys, "verify", out)
    assert code == 1 and "damaged (checksum)" in text


def test_bad_input_exits_with_2_and_a_way_out(chats, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    code, text = said(capsys, "prepare", tmp_path / "absent", *out)
    assert code == 2 and "There is no file or directory" in text
    code, text = said(capsys, "prepare", chats, *out, "--vocab-size", "10")
    assert code == 2 and "vocab_size=10 is too small" in text
    code, text = said(capsys, "prepare", chats, *out, "--template", "minimax-m3")
    assert code == 2 and "template must be one of" in text
    code, text = said(capsys, "prepare", chats, *out, "--control", "minimax-m1x")
    assert code == 2 and "Did you mean 'minimax-m1'" in text
    code, text = said(capsys, "show", chats)
    assert code == 2 and "holds no prepared data" in text
    assert not (tmp_path / "out").exists()
