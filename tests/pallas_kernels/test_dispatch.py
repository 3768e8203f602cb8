"""The choice of an implementation: obeyed, or automatic with every refusal reported."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch, target
from pallas_kernels.errors import Unsupported


def _accepts(x, *, scale):
    return x * scale


def _declines(x, *, scale):
    raise Unsupported(f"no x = {x}")


def _is_broken(x, *, scale):
    raise ValueError("a mistake")


_TABLE = {"declines": _declines, "accepts": _accepts, "broken": _is_broken}


def test_the_automatic_choice_skips_what_declines():
    assert dispatch.call("op", _TABLE, ("declines", "accepts", "broken"), 3, scale=2) == 6


def test_an_explicit_choice_is_obeyed_even_outside_the_order():
    assert dispatch.call("op", _TABLE, ("broken",), 3, scale=2, implementation="accepts") == 6


def test_an_explicit_choice_that_declines_fails_with_its_reason():
    with pytest.raises(Unsupported, match="no x = 3"):
        dispatch.call("op", _TABLE, ("accepts",), 3, scale=2, implementation="declines")


def test_all_refusals_are_collected():
    with pytest.raises(ExceptionGroup, match="no implementation of op") as caught:
        dispatch.call("op", _TABLE, ("declines", "declines"), 3, scale=2)
    assert [str(error) for error in caught.value.exceptions] == ["no x = 3"] * 2
    assert "'declines'" in caught.value.exceptions[0].__notes__[0]


def test_a_mistake_is_not_a_refusal():
    with pytest.raises(ValueError, match="a mistake"):
        dispatch.call("op", _TABLE, ("broken", "accepts"), 3, scale=2)


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match=r"'pallas_gpu'.*'declines', 'accepts', 'broken'"):
        dispatch.call("op", _TABLE, ("accepts",), 3, scale=2, implementation="pallas_gpu")


def test_every_target_has_a_choice_and_the_reasons_for_it():
    def on_tpu_only(target, x, *, scale):
        return None if target == "tpu" else f"no {target} for {x}"

    choices = dispatch.choose(("kernel", "fallback"), {"kernel": on_tpu_only}, 3, scale=2)
    assert set(choices) == set(target.TARGETS)
    assert choices["tpu"] == ("kernel", {})
    assert choices["hopper"] == ("fallback", {"kernel": "no hopper for 3"})
    with pytest.raises(ValueError, match=r"on hopper: .*no hopper"):
        dispatch.choose(("kernel",), {"kernel": on_tpu_only}, 3, scale=2)


_BRANCHES = {
    "tpu": jnp.sin, "hopper": jnp.cos, "blackwell": jnp.exp, "cuda": jnp.tanh, "cpu": jnp.floor,
}  # fmt: skip


def test_the_branch_of_the_target_is_taken_also_under_vmap():
    select = jax.vmap(lambda x: target.select(_BRANCHES, x))
    assert jax.jit(select)(jnp.full(3, 2.5)).tolist() == [2.0] * 3


# Without a device to name the generation of the GPU, the branch that runs on all of them.
@pytest.mark.parametrize("platform, op", [("tpu", "sine"), ("cuda", "tanh"), ("cpu", "floor")])
def test_the_choice_is_made_for_the_platform_compiled_for(platform, op):
    program = jax.jit(lambda x: target.select(_BRANCHES, x)).trace(jnp.zeros(3))
    text = program.lower(lowering_platforms=(platform,)).as_text()
    assert [name for name in ("sine", "tanh", "floor") if f"stablehlo.{name} " in text] == [op]
