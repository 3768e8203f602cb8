"""The real lm_eval runs the model on local tasks, and its numbers are those of the logits."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest

from hybrid_jax import inference
from hybrid_jax import model as models
from hybrid_jax.data import train_tokenizer
from hybrid_jax.evaluation import ModelPredictor
from tests.training import small

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from hybrid_jax.evaluation import harness

QUESTIONS = [
    {"question": "alpha beta", "choices": ["gamma", "delta delta", "yield"], "gold": 0},
    {"question": "return", "choices": ["import lambda", "alpha", "beta"], "gold": 2},
    {"question": "delta gamma yield lambda", "choices": ["beta", "yield", "alpha"], "gold": 1},
]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {data}.cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {data}.cache}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: ["{stop}"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""


@functools.cache
def parts():
    """(model, tokenizer's backend, id of the end of a text)."""
    words = "alpha beta gamma delta return import lambda yield " * 4
    tokenizer = train_tokenizer([words], small.VOCAB)
    # Weights so large that the model has opinions.
    model = models.build(small.small_model(initializer_range=0.3), seed=2)
    return model, tokenizer.backend, tokenizer.end_id


def harness_model(max_length=256):
    model, backend, end_id = parts()
    return harness.HarnessModel(
        ModelPredictor(model, batch_size=4, longest=64),
        backend, end_id=end_id, max_length=max_length,
    )  # fmt: skip


def ids(text):
    return parts()[1].encode(text, add_special_tokens=False).ids


def logits(row):
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(row)] = row
    return np.asarray(parts()[0](padded), np.float64)[0, : len(row)]


def direct(prompt: list[int], answer: list[int]):
    """(log-likelihood, greedy?) of `answer`, from the model's own logits in float64."""
    rows = logits(prompt + answer)[len(prompt) - 1 : -1]
    logprobs = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    likelihood = logprobs[np.arange(len(answer)), answer].sum()
    return likelihood, bool((rows.argmax(-1) == answer).all())


def asked(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=idx)
        for idx, each in enumerate(arguments)
    ]


def close(value):
    # float32 log-probabilities of about -6, summed over at most a few dozen tokens.
    return pytest.approx(value, abs=1e-3)


def test_multiple_choice_is_decided_by_the_logits(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "choice.yaml").write_text(CHOICE.format(data=data))
    report = harness.evaluate(harness_model(), ["local_choice"], include_path=str(tmp_path))
    right, right_by_byte = 0, 0
    for each in QUESTIONS:
        prompt = ids(each["question"])
        scores = []
        for choice in each["choices"]:
            whole = ids(f"{each['question']} {choice}")
            assert whole[: len(prompt)] == prompt
            scores.append(direct(prompt, whole[len(prompt) :])[0])
        right += np.argmax(scores) == each["gold"]
        sizes = [len(choice) for choice in each["choices"]]
        right_by_byte += np.argmax(np.array(scores) / sizes) == each["gold"]
    figures = report["results"]["local_choice"]
    assert figures["acc,none"] == pytest.approx(right / 3)
    assert figures["acc_norm,none"] == pytest.approx(right_by_byte / 3)
    assert report["samples"]["local_choice"]["effective"] == 3
    assert any("acc" in line and "local_choice" in line for line in harness.lines(report))


def test_generation_ends_at_the_tasks_stop(tmp_path):
    model, backend, _ = parts()
    prompts = [each["question"] for each in QUESTIONS]
    said = []
    for prompt in prompts:
        new = inference.generate(model, np.array([ids(prompt)]), max_new_tokens=6)
        said.append(backend.decode(np.asarray(new)[0].tolist()))
    # A stop that one of the texts holds in its middle.
    stop = said[0][len(said[0]) // 2]
    rows = [
        {"question": prompt, "said": text.split(stop)[0]}
        for prompt, text in zip(prompts, said, strict=True)
    ]
    rows[1]["said"] += "?"
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "generate.yaml").write_text(GENERATE.format(data=data, stop=stop))
    report = harness.evaluate(harness_model(), ["local_generate"], include_path=str(tmp_path))
    assert report["results"]["local_generate"]["exact_match,none"] == pytest.approx(2 / 3)


def test_likelihoods_are_those_of_the_logits_in_the_order_asked():
    model = harness_model()
    pairs = [("alpha beta", " gamma"), ("", "delta yield"), ("import", " alpha beta gamma")]
    found = model.loglikelihood(asked("loglikelihood", *pairs))
    for (context, answer), (likelihood, greedy) in zip(pairs, found, strict=True):
        prompt = ids(context) or [parts()[2]]
        expected = direct(prompt, ids(context + answer)[len(ids(context)) :])
        assert likelihood == close(expected[0])
        assert greedy == expected[1]
    context = ids("alpha beta")
    best = int(logits(context)[-1].argmax())
    ((_, greedy),) = model._loglikelihood_tokens([(None, context, [best])])
    assert greedy


def test_long_prompts_lose_their_beginning():
    context, answer = list(range(40, 60)), [61, 62]
    found = harness_model(max_length=8)._loglikelihood_tokens([(None, context, answer)])
    # Eight tokens go in, of which the first of the answer is one.
    assert found[0][0] == close(direct(context[-7:], answer)[0])
    with pytest.raises(ValueError, match="9 tokens is longer than max_length=8"):
        harness_model(max_length=8)._loglikelihood_tokens([(None, context, list(range(9)))])


def test_a_whole_text_is_predicted_token_by_token_once():
    text = "alpha beta gamma delta return import lambda yield alpha gamma"
    row, size = ids(text), 7
    assert size < len(row) < 3 * size
    (found,) = harness_model(max_length=size).loglikelihood_rolling(
        asked("loglikelihood_rolling", (text,))
    )
    expected = 0.0
    for begin in range(0, len(row), size):
        # A window sees the token before it: the end of a text before the first.
        before = [parts()[2]] if begin == 0 else [row[begin - 1]]
        if begin + size > len(row):
            # The last window goes back to be as long as the others.
            before = row[len(row) - size - 1 : begin]
        expected += direct(before, row[begin : begin + size])[0]
    assert found == close(expected)


def test_a_task_nobody_knows_and_an_option_nobody_has_are_errors():
    with pytest.raises(ValueError, match="lm_eval has no task no_such_task"):
        harness.evaluate(harness_model(), ["no_such_task"])
    model = harness_model()
    with pytest.raises(ValueError, match="generate with num_beams, which is not supported"):
        model.generate_until(
            asked("generate_until", ("alpha", {"num_beams": 4, "max_gen_toks": 4}))
        )


def test_nothing_here_loads_another_framework():
    code = (
        "import sys, hybrid_jax.evaluation.harness; "
        "print({'torch', 'transformers', 'tensorflow'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr
