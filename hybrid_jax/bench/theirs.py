"""The other side of the comparison: transformers at its best setting on a CPU."""

import numpy as np

from hybrid_jax.bench.tasks import Clock, Result


class Transformers:
    """The same weights in `AutoModelForCausalLM`, float32, grouped_mm experts, SDPA attention."""

    def __init__(self, directory: str, threads: int):
        try:
            import torch
            import transformers
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"bench --against transformers needs {error.name}: pip install torch==2.13.0 "
                "transformers (a CPU build of torch), or scripts/test.sh once."
            ) from error
        torch.set_num_threads(threads)
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            experts_implementation="grouped_mm",
            attn_implementation="sdpa",
        )
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=1e-8, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def train(self, tokens_BT, steps: int) -> Result:
        tokens = self._torch.from_numpy(tokens_BT).long()
        self._model.train()
        with Clock() as clock:
            losses = [self._update(tokens) for _ in range(steps)]
        self._model.eval()
        return Result(clock.seconds, np.array(losses, np.float64))

    def _update(self, tokens) -> float:
        torch = self._torch
        logits = self._model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def prefill(self, tokens_BT) -> Result:
        with Clock() as clock, self._torch.inference_mode():
            out = self._forward(tokens_BT)
        return Result(clock.seconds, out.logits[:, -1].numpy())

    def decode(self, tokens_BT, new_tokens: int) -> Result:
        torch = self._torch
        context = tokens_BT.shape[1]
        tokens = []
        with torch.inference_mode():
            out = self._forward(tokens_BT)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            with Clock() as clock:
                for idx in range(new_tokens):
                    tokens.append(token)
                    position = torch.full_like(token, context + idx)
                    out = self._model(
                        input_ids=token,
                        past_key_values=out.past_key_values,
                        position_ids=position,
                        use_cache=True,
                    )
                    token = out.logits[:, -1].argmax(-1, keepdim=True)
        return Result(clock.seconds, torch.cat(tokens, 1).numpy())

    def _forward(self, tokens_BT):
        tokens = self._torch.from_numpy(tokens_BT).long()
        return self._model(input_ids=tokens, use_cache=True, logits_to_keep=1)
