"""Tell which dialect a config.json is in, read it, and write one for a model."""

import dataclasses
import json

from hybrid_jax.checkpoint import fp8
from hybrid_jax.checkpoint.formats.files import Folder
from hybrid_jax.checkpoint.hf_config import m2, native, original
from hybrid_jax.checkpoint.hf_config.fields import CARRIED, Fields
from hybrid_jax.config import layers, model
from hybrid_jax.config.text import near_names

_READERS = {
    "minimax_text_01": original.read,
    "minimax_m1": original.read,
    # The config classes call themselves so.
    "MiniMaxText01": original.read,
    "MiniMaxM1": original.read,
    "minimax": native.read,
    "minimax_m2": m2.read,
}
# MiniMax-VL-01: a config.json around that of its language model, and a prefix to its names.
VISION_LANGUAGE, _TEXT, _PREFIX = "minimax_vl_01", "text_config", "language_model."
_VL_01 = "hf-vl-01"


@dataclasses.dataclass(frozen=True)
class Description:
    """A config.json that has been understood."""

    model: model.ModelConfig
    """What it describes."""
    json: dict
    """As it was."""
    model_type: str
    """The dialect."""
    prefix: str = ""
    """What stands before every published name: VL-01 holds a vision part beside the language."""

    @property
    def language(self) -> dict:
        """The part of `json` that describes the language model."""
        return self.json[_TEXT] if self.prefix else self.json

    @property
    def may_have_extra_layers(self) -> bool:
        """M2 announces prediction modules past its last layer; loaders skip their tensors."""
        return self.model_type == "minimax_m2"

    @property
    def block_size(self) -> int:
        """Tokens a block in transformers' decay tables."""
        return self.language.get("block_size") or native.BLOCK_SIZE


def read_from(folder: Folder, name: str) -> dict:
    """A JSON object from a file; ValueError names the file if it is missing or something else."""
    path = folder.where(name)
    try:
        raw = folder.read_bytes(name)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is missing; a checkpoint needs it to say what its tensors mean."
        ) from error
    except OSError as error:
        raise ValueError(f"{path} must be a readable file: {error.strerror or error}.") from error
    try:
        values = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object; got a {type(values).__name__}.")
    return values


def describe(values: dict, where: str) -> Description:
    """Understand a config.json; ValueError names the file and the field that is wrong."""
    if values.get("model_type") == VISION_LANGUAGE:
        return _describe_vision_language(values, where)
    model_type = _model_type(values, where)
    fields = Fields(values, where)
    try:
        config = _READERS[model_type](fields)
    except ValueError as error:
        # Fields name the file themselves; what layers and models check among each other does not.
        message = str(error)
        raise ValueError(message if message.startswith(where) else f"{where}: {message}") from error
    return Description(config, values, model_type)


def _describe_vision_language(values: dict, where: str) -> Description:
    """VL-01: the fields of its vision part do not change the language model, and are not read."""
    inner = values.get(_TEXT)
    if not isinstance(inner, dict) or inner.get("model_type") == VISION_LANGUAGE:
        raise ValueError(
            f"{where}: {_TEXT!r} must be the config of a language model; got {inner!r:.80}."
        )
    # The release may leave it to its config class which dialect that is.
    found = describe({"model_type": original.MODEL_TYPES[0]} | inner, f"{where}: {_TEXT}")
    return Description(found.model, values, VISION_LANGUAGE, _PREFIX)


def _model_type(values: dict, where: str) -> str:
    # M2 was first released with model_type "minimax"; its class name tells the two apart.
    if values.get("model_type") == "minimax" and values.get("architectures") == [
        "MiniMaxM2ForCausalLM"
    ]:
        return "minimax_m2"
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in _READERS:
        known = (*_READERS, VISION_LANGUAGE)
        raise ValueError(
            f"{where}: model_type is {model_type!r}; expected one of {', '.join(known)}."
            f"{near_names(str(model_type), known)}"
        )
    return model_type


def prefix(format: str) -> str:
    """What stands before every name that is published in this format."""
    return _PREFIX if format == _VL_01 else ""


def write(
    config: model.ModelConfig, format: str, dtype: str, source: Description | None = None
) -> dict:
    """config.json for a model: `hf` (transformers), `hf-original` or `hf-vl-01` (as released).

    `source`, if given, is the config.json that the model came with: taken over as it is if it is
    in that dialect already, and else its token ids and training settings. Of VL-01's vision part
    only a source can tell. ValueError if the dialect has no field for something in the model.
    """
    native_wanted = format == "hf"
    if source is not None and _speaks(source, format):
        return source.json
    if format == _VL_01:
        values = original.write(config, _original_type(config))
    elif has_sigmoid_router(config):
        values = m2.write(config, native=native_wanted)
    elif native_wanted:
        values = native.write(config)
    else:
        values = original.write(config, _original_type(config))
    carried = {"bos_token_id": None, "eos_token_id": None, "use_cache": True}
    if source is not None:
        spoken = source.language
        carried |= {name: spoken[name] for name in CARRIED if name in spoken}
    spelling = "dtype" if native_wanted else "torch_dtype"
    values = dict(sorted((carried | values | {spelling: dtype}).items()))
    return _around(values, dtype) if format == _VL_01 else values


def has_sigmoid_router(config: model.ModelConfig) -> bool:
    """Whether experts are chosen as M2 does."""
    routers = (getattr(layer.ffn, "router", None) for layer in config.layers)
    return any(isinstance(router, layers.SigmoidTopK) for router in routers)


def _around(language: dict, dtype: str) -> dict:
    """VL-01's config.json around that of a language model."""
    return {
        "architectures": ["MiniMaxVL01ForConditionalGeneration"],
        "model_type": VISION_LANGUAGE,
        _TEXT: language,
        "torch_dtype": dtype,
    }


def with_dtype(values: dict, dtype: str) -> dict:
    """A config.json after all weights became `dtype`: no longer quantised, and saying so."""
    values = {name: value for name, value in values.items() if name != "quantization_config"}
    if isinstance(values.get(_TEXT), dict):
        values[_TEXT] = with_dtype(values[_TEXT], dtype)
    names = [name for name in ("dtype", "torch_dtype") if name in values] or ["torch_dtype"]
    return values | dict.fromkeys(names, dtype)


def dump(values: dict) -> str:
    """A config.json as transformers lays it out."""
    return json.dumps(values, indent=2) + "\n"


def with_fp8(values: dict) -> dict:
    """A config.json after the matrices of layers became FP8 blocks, as M2's says it."""
    rows, columns = fp8.BLOCK
    return values | {
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "float8_e4m3fn",
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
            "quant_method": "fp8",
            "weight_block_size": [rows, columns],
        }
    }


def _speaks(source: Description, format: str) -> bool:
    if source.prefix or format == _VL_01:
        return source.prefix == prefix(format)
    if source.model_type == "minimax_m2":
        # Both readers know both spellings.
        return source.json.get("model_type") == "minimax_m2"
    return (source.model_type == "minimax") == (format == "hf")


def _original_type(config: model.ModelConfig) -> str:
    """A model that was read from an M1 file is written as one; the two differ in nothing else."""
    return config.name if config.name in original.MODEL_TYPES else original.MODEL_TYPES[0]
