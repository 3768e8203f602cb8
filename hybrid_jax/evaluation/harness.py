"""A model of ours in EleutherAI's lm_eval: the three questions it asks, in sorted batches.

Needs the extra `eval`. Nothing here, nor what it imports, loads PyTorch.
"""

import random
from collections.abc import Sequence

import numpy as np
from lm_eval import evaluator, tasks, utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from hybrid_jax.evaluation.haystack import Encoder
from hybrid_jax.evaluation.predictor import Predictor, Tick, score_answers, silent


class HarnessModel(TemplateLM):
    """`lm_eval`'s view of a predictor with a tokenizer; deterministic, in one process.

    Prompts longer than `max_length` lose their beginning, as in lm_eval's own models.
    """

    def __init__(
        self,
        predictor: Predictor,
        tokenizer: Encoder,
        *,
        end_id: int | None,
        max_length: int,
        seed: int = 0,
        tick: Tick = silent,
    ):
        """`end_id` ends a text; it stands before one that has no context, and stops generation."""
        super().__init__()
        self.max_length = max_length
        self._predictor = predictor
        # Not `tokenizer`, in which the base class looks for the chat templates of transformers.
        self._encoder = tokenizer
        self._end_id = end_id
        self._seed = seed
        self._tick = tick

    @property
    def eot_token_id(self) -> int:
        """The end of a text. Raises ValueError if the tokenizer knows none."""
        if self._end_id is None:
            raise ValueError(
                "This task scores text without any context, before which an end-of-text token must "
                "stand; the tokenizer has none that is known. Give it one, or choose another task."
            )
        return self._end_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs):
        """Ids of `string` and nothing around them."""
        return self._encoder.encode(string, add_special_tokens=False).ids

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy decoding says the same) of each continuation.

        `requests` are ((context, continuation) or None, ids, ids). Raises ValueError for a
        continuation longer than `max_length`.
        """
        asked = [idx for idx, (_, _, answer) in enumerate(requests) if answer]
        prompts, answers = [], []
        for idx in asked:
            _, prompt, answer = requests[idx]
            if len(answer) > self.max_length:
                raise ValueError(
                    f"A continuation of {len(answer)} tokens is longer than max_length="
                    f"{self.max_length}; raise it."
                )
            # The last token is predicted only.
            room = self.max_length + 1 - len(answer)
            prompts.append(prompt[-room:])
            answers.append(answer)
        scored = score_answers(self._predictor, prompts, answers, self._tick)
        # An empty continuation is certain.
        found = [(0.0, True)] * len(requests)
        for idx, answer, each in zip(asked, answers, scored, strict=True):
            likelihood = float(np.sum(each.logprob_T, dtype=np.float64))
            found[idx] = (likelihood, bool((each.best_T == np.asarray(answer)).all()))
        for (pair, _, _), result in zip(requests, found, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, result)
        return found

    def loglikelihood(self, requests, disable_tqdm: bool = True):
        """As the base class has it, without its progress bar."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each whole text: windows of `max_length` that predict each token once.

        Every window but the first begins with the token before it.
        """
        windows, owners = [], []
        for idx, request in enumerate(requests):
            (text,) = request.args
            for window in utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(idx)
        totals = [0.0] * len(requests)
        for idx, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[idx] += likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
        """Text after each context up to the first stop sequence; greedy unless the task samples.

        Requests with the same options go together.
        """
        groups: dict[str, list[int]] = {}
        for idx, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(idx)
        texts = [""] * len(requests)
        for group in groups.values():
            contexts = [requests[idx].args[0] for idx in group]
            for idx, text in zip(group, self._generate(contexts, requests[group[0]].args[1])):
                texts[idx] = text
                self.cache_hook.add_partial("generate_until", requests[idx].args, text)
        return texts

    def _generate(self, contexts: Sequence[str], options: dict) -> list[str]:
        options = dict(normalize_gen_kwargs(options))
        stops = handle_stop_sequences(options.pop("until", None), eos=None)
        most = int(options["max_gen_toks"])
        if most >= self.max_length:
            raise ValueError(
                f"The task asks for {most} new tokens, which leave no room for a prompt in "
                f"max_length={self.max_length}; raise it."
            )
        room = self.max_length - most
        # An empty prompt is the beginning of a text.
        prompts = [self.tok_encode(text)[-room:] or [self.prefix_token_id] for text in contexts]
        said = self._predictor.generate(
            [np.asarray(prompt) for prompt in prompts], most,
            eos_id=self._end_id, tick=self._tick, **_sampling(options, self._seed),
        )  # fmt: skip
        return [self._text(new, stops) for new in said]

    def _text(self, new: np.ndarray, stops: Sequence[str]) -> str:
        ended = np.flatnonzero(new == (-1 if self._end_id is None else self._end_id))
        text = self._encoder.decode(new[: ended[0] if len(ended) else None].tolist())
        for stop in stops:
            text = text.split(stop)[0] if stop else text
        return text


def evaluate(
    model: HarnessModel,
    names: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict:
    """{"results": {task: {metric: value}}, "versions", "samples"} of lm_eval's tasks.

    `include_path` is a directory with tasks of one's own, `limit` the most examples of a task.
    Seeds the global generators of `random` and numpy. Tasks bring their data, which lm_eval
    downloads unless it lies there. Raises ValueError for unknown tasks.
    """
    manager, unknown = _find_tasks(names, include_path)
    if unknown:
        raise ValueError(
            f"lm_eval has no task {', '.join(unknown)}. `lm-eval ls tasks` lists those it has; "
            "--include-path DIR adds the YAML files of a directory."
        )
    # Tasks may shuffle with the global generators.
    random.seed(seed)
    np.random.seed(seed)
    loaded = manager.load(list(names))
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    # Not simple_evaluate, which imports PyTorch if it is there, to say so in its results.
    found = evaluator.evaluate(model, loaded, limit=limit, log_samples=False)
    assert found is not None, "lm_eval returns results to the only process"
    results = {name: _figures(values) for name, values in found["results"].items()}
    return {"results": results, "versions": found["versions"], "samples": found["n-samples"]}


def lines(report: dict) -> list[str]:
    """The figures for a reader."""
    rows = [f"{'task':24} {'metric':24} {'value':>9}  {'stderr':>8}"]
    for name, figures in report["results"].items():
        for metric, value in figures.items():
            if isinstance(value, float) and "_stderr" not in metric:
                error = figures.get(metric.replace(",", "_stderr,", 1))
                spread = f"{error:8.4f}" if isinstance(error, float) else f"{'-':>8}"
                rows.append(f"{name:24} {metric.partition(',')[0]:24} {value:9.4f}  {spread}")
    return rows


def _find_tasks(names: Sequence[str], include_path: str | None):
    """(lm_eval's manager that knows the tasks, names that it does not know)."""
    if include_path is not None:
        # Reading the thousands of tasks that lm_eval brings along takes seconds.
        manager = tasks.TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager, []
    manager = tasks.TaskManager(include_path=include_path)
    return manager, sorted(set(names) - set(manager.all_tasks))


def _figures(values: dict) -> dict:
    """Metrics as plain numbers; lm_eval writes "N/A" where an error cannot be estimated."""
    return {
        name: float(value) if isinstance(value, (float, int, np.number)) else value
        for name, value in values.items()
    }


def _sampling(options: dict, seed: int) -> dict:
    """Options of lm_eval as those of `inference.generate`. Raises ValueError for unknown ones."""
    ignored = {"max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
    if unknown := sorted(set(options) - ignored):
        raise ValueError(
            f"The task wants to generate with {', '.join(unknown)}, which is not supported; "
            "temperature, top_k and top_p are."
        )
    if not options.get("do_sample"):
        return {}
    chosen = {name: options[name] for name in ("temperature", "top_p", "top_k") if name in options}
    return chosen | {"seed": seed}
