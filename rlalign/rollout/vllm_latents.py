"""What the language-model head reads, taken out of a running vLLM; and the head itself.

vLLM's runner has the hidden states of a whole batch, after the final norm, at the place where it
scores prompts. A tap there copies the rows of the sequences that asked for them; a prompt that is
read in several pieces gives them in several. vLLM 0.32 has two runners, and the tap fits both.

Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlalign.algos.latent import Head
from rlalign.rollout.engine import EngineError
from rlalign.rollout.hf import NOT_FINITE


@dataclass(eq=False)
class Kept:
    """Of one sequence: the hidden states of tokens `first` to `stop` - 1, in pieces."""

    request_id: str  # vLLM's own name of it
    first: int
    stop: int
    parts: list[Tensor] = field(default_factory=list)

    def take_in(self, position: int, hidden_ND: Tensor) -> None:
        """Those of the tokens from `position` on. A sequence that lost its cache begins again."""
        if position <= self.first:
            self.parts = []
        # A copy: the runner uses its memory again.
        self.parts.append(hidden_ND[max(0, self.first - position) : self.stop - position].clone())


class LatentTap:
    """Hidden states of the sequences that want them, by the sequence's name."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}

    def install(self, runner: Any) -> None:
        """Read what `runner` computes, for as long as it lives."""
        worker = getattr(runner, "prompt_logprobs_worker", None)
        if worker is None:
            runner._get_prompt_logprobs_dict = self._read_first(runner)
        else:
            worker.compute_prompt_logprobs = self._read_second(worker)

    def follow(self, name: str, request_id: str, first: int, stop: int) -> None:
        self._kept[name] = Kept(request_id, first, stop)

    def take(self, name: str) -> Tensor:
        """Float32 [N, D] on the CPU, given up here. Raises EngineError where they are not
        finite."""
        latent_ND = torch.cat(self._kept.pop(name).parts).float().cpu()
        if not bool(latent_ND.isfinite().all()):
            raise EngineError(NOT_FINITE)
        return latent_ND

    def forget(self, name: str) -> None:
        self._kept.pop(name, None)

    def _read_first(self, runner: Any) -> Any:
        theirs = runner._get_prompt_logprobs_dict

        def read(hidden_states: Tensor, num_scheduled: dict[str, int]) -> Any:
            for kept in self._kept.values():
                if (count := num_scheduled.get(kept.request_id)) is not None:
                    row = runner.input_batch.req_id_to_index[kept.request_id]
                    begin = int(runner.query_start_loc.np[row])
                    position = runner.requests[kept.request_id].num_computed_tokens
                    kept.take_in(position, hidden_states[begin : begin + count])
            return theirs(hidden_states, num_scheduled)

        return read

    def _read_second(self, worker: Any) -> Any:
        theirs = worker.compute_prompt_logprobs

        def read(logits_fn: Any, hidden_states: Tensor, batch: Any, *args: Any, **kwargs: Any):
            row_of = {name: i for i, name in enumerate(batch.req_ids)} if self._kept else {}
            for kept in self._kept.values():
                if (row := row_of.get(kept.request_id)) is not None:
                    begin, count = int(batch.query_start_loc_np[row]), batch.num_scheduled_tokens
                    position = int(batch.num_computed_prefill_tokens_np[row])
                    kept.take_in(position, hidden_states[begin : begin + int(count[row])])
            return theirs(logits_fn, hidden_states, batch, *args, **kwargs)

        return read


class _Found(Exception):
    """Carries what a model gives to its logits processor."""


@torch.inference_mode()
def read_head(runner: Any, adapter: int = 0) -> Head:
    """The head of the model that `runner` runs, on its memory: current until the next update. Where
    the LoRA adapter of that number (0: none) acts on it, a copy with the adapter merged.

    Raises EngineError where the logits are not linear in the hidden states, but for a factor and a
    cap.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    model, width = runner.get_model(), runner.model_config.get_hidden_size()
    probe_1D = torch.ones(1, width, dtype=runner.model_config.dtype, device=runner.device)

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        lm_head = getattr(args[0], "base_layer", args[0]) if args else None
        if isinstance(lm_head, VocabParallelEmbedding):
            raise _Found(module, lm_head, *args[1:])

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        model.compute_logits(probe_1D)
    except _Found as found:
        processor, lm_head, read_1D, *bias = found.args
    else:
        raise _not_linear(model)
    finally:
        hook.remove()
    scale, softcap = processor.scale, processor.soft_cap or 0.0
    # Where there are both, vLLM caps before it scales.
    if not torch.equal(read_1D, probe_1D) or (softcap and scale != 1.0):
        raise _not_linear(model)
    bias_V = bias[0] if bias else None
    vocab = processor.org_vocab_size
    weight_VD = lm_head.weight[:vocab].detach()
    return Head(
        weight_VD if not adapter else _adapted(weight_VD, runner, adapter),
        None if bias_V is None else bias_V[:vocab].detach(),
        float(scale),
        float(softcap),
    )


def _adapted(weight_VD: Tensor, runner: Any, adapter: int) -> Tensor:
    loras = runner.lora_manager._adapter_manager.get_adapter(adapter).loras
    for name, lora in loras.items():
        if name.rsplit(".")[-1] == "lm_head":
            change_VD = lora.lora_b.float() @ lora.lora_a.float()  # vLLM has put the scale into b
            return (weight_VD.float() + change_VD.to(weight_VD.device)).to(weight_VD.dtype)
    return weight_VD


def _not_linear(model: nn.Module) -> EngineError:
    return EngineError(
        f"vLLM's {type(model).__name__} makes its logits in a way of its own, so its latents "
        "cannot climb: use backend=hf"
    )
