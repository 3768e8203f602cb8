"""Take fields out of a config.json one by one; whatever is left over is an unknown field."""

import dataclasses
import math
import typing

from hybrid_jax.config.text import near_names

# Fields that do not change the network: run-time switches, training settings and the bookkeeping of
# transformers' PreTrainedConfig (all its fields, versions 4.45 to 5.23).
IGNORED = frozenset(
    [
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "experts_implementation",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "length_penalty",
        "max_length",
        "max_model_len",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_scores",
        "pad_token_id",
        "prefix",
        "problem_type",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "unk_token_id",
        "use_bfloat16",
        "use_cache",
    ]
)
# The ones worth taking along when the dialect changes.
CARRIED = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "attention_dropout",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "use_cache",
)
_MISSING = object()


@dataclasses.dataclass
class Fields:
    """A config.json being read; `where` names the file in messages."""

    values: dict
    where: str
    taken: set = dataclasses.field(default_factory=set)

    def size(self, name: str, default=_MISSING, *, most: int = 1 << 31) -> int:
        """A positive whole number up to `most`."""
        value = self._get(name, default)
        if value is default:
            return value
        if type(value) is not int or value <= 0:
            self.fail(name, "a positive whole number", value)
        if value > most:
            self.fail(name, f"at most {most}", value)
        return value

    def number(self, name: str, default=_MISSING) -> float:
        """A finite number."""
        value = self._get(name, default)
        if value is default:
            return value
        try:
            if type(value) in (int, float) and math.isfinite(value):
                return float(value)
        except OverflowError:
            # JSON's whole numbers have no end.
            pass
        self.fail(name, "a finite number", value)

    def flag(self, name: str, default=_MISSING) -> bool:
        """True or false."""
        value = self._get(name, default)
        if type(value) is not bool and value is not default:
            self.fail(name, "true or false", value)
        return value

    def sequence(self, name: str, length: int, kinds: dict) -> list:
        """A list of `length` items, each a key of `kinds`; returns what they stand for."""
        value = self._get(name, _MISSING)
        if not isinstance(value, list) or len(value) != length:
            got = len(value) if isinstance(value, list) else value
            self.fail(name, f"a list of {length} items, one a layer", got)
        for item in value:
            if isinstance(item, bool) or not isinstance(item, (int, str)) or item not in kinds:
                self.fail(name, f"items out of {list(kinds)}", item)
        return [kinds[item] for item in value]

    def only(self, name: str, *allowed) -> None:
        """A field that is absent or has one of the values that this code computes."""
        value = self._get(name, allowed[0])
        if not any(
            value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed
        ):
            self.fail(name, " or ".join(map(repr, allowed)), value)

    def get(self, name: str, default=None):
        """Any value; the caller checks it."""
        return self._get(name, default)

    def finish(self) -> None:
        """ValueError if a field is left that nobody took and that is not known to be harmless."""
        for name in self.values:
            if name not in self.taken and name not in IGNORED:
                raise ValueError(
                    f"{self.where}: unknown field {name!r}.{near_names(name, self.taken)} It might "
                    "change the network; remove it if it does not."
                )

    def fail(self, name: str, expected: str, got) -> typing.NoReturn:
        """Raise the ValueError for a field with a wrong value."""
        raise ValueError(f"{self.where}: {name!r} must be {expected}; got {got!r:.200}.")

    def _get(self, name, default):
        self.taken.add(name)
        value = self.values.get(name, default)
        if value is _MISSING:
            raise ValueError(
                f"{self.where} lacks the required field {name!r}."
                f"{near_names(name, set(self.values) - self.taken)}"
            )
        return value


def rope(fields: Fields, head_dim: int, default_rotary_dim: int) -> tuple[float, int]:
    """(theta, rotated dims): from `rope_theta` and `rotary_dim`, or from `rope_parameters`.

    Both spellings may stand side by side if they agree. Scaled rotary positions are refused.
    """
    inner = fields.get("rope_parameters")
    scaling = fields.get("rope_scaling")
    inner = {} if inner is None else inner
    if not isinstance(inner, dict):
        fields.fail("rope_parameters", "a mapping", inner)
    for name, mapping in (("rope_parameters", inner), ("rope_scaling", scaling or {})):
        kind = (
            mapping.get("rope_type", mapping.get("type", "default"))
            if isinstance(mapping, dict)
            else 0
        )
        if kind != "default":
            fields.fail(name, "absent or of rope_type 'default'", mapping)
    nested = Fields(inner, f"{fields.where}: rope_parameters", {"rope_type", "type"})
    thetas = {fields.number("rope_theta", None), nested.number("rope_theta", None)} - {None}
    given = _rotary_dim(fields), _rotated(fields, head_dim), _rotated(nested, head_dim)
    dims = {dim for dim in given if dim is not None}
    nested.finish()
    if not thetas:
        raise ValueError(
            f"{fields.where} lacks the required field 'rope_theta' (or rope_parameters)."
        )
    if len(thetas) > 1 or len(dims) > 1:
        raise ValueError(
            f"{fields.where}: rope_theta {sorted(thetas)} and rotary_dim {sorted(dims)} "
            "are given twice, with different values."
        )
    return thetas.pop(), dims.pop() if dims else default_rotary_dim


def _rotary_dim(fields: Fields) -> int | None:
    value = fields.get("rotary_dim")
    if value is not None and (type(value) is not int or value < 0):
        fields.fail("rotary_dim", "a whole number >= 0", value)
    return value


def _rotated(fields: Fields, head_dim: int) -> int | None:
    factor = fields.number("partial_rotary_factor", None)
    if factor is not None and not 0 <= factor <= 1:
        fields.fail("partial_rotary_factor", "a number from 0 to 1", factor)
    return None if factor is None else int(head_dim * factor)
