"""LatentSeek on a model that can say what it does not: the search finds it, noise seldom."""

from __future__ import annotations

import torch

from rlalign.models.random import init_model, small_config
from rlalign.models.tokenizer import build_tokenizer
from rlalign.rollout.search_hf import HFSearch
from rlalign.testtime.latent_seek import latent_seek
from rlalign.testtime.rewards import FunctionReward


def digit_model() -> HFSearch:
    """A small model that answers any letter with one of the digits 1 to 8, each as likely as the
    letter's last bits say, and a full stop."""
    tokenizer = build_tokenizer(32)
    config = small_config(
        "qwen2", vocab=len(tokenizer), hidden=32, layers=1, heads=2, kv_heads=1, mlp=64,
        max_positions=32, tied=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = init_model(config, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    eos = tokenizer.eos_token_id
    digits = [tokenizer(str(d))["input_ids"][0] for d in range(1, 9)]
    letters = [tokenizer(chr(97 + i))["input_ids"][0] for i in range(24)]
    for _ in range(150):
        letter_B = torch.randint(24, (64,), generator=generator)
        noise_B = torch.randint(8, (64,), generator=generator)
        sure_B = torch.rand(64, generator=generator) < 0.5
        digit_B = torch.where(sure_B, letter_B % 8, noise_B)
        ids_BT = torch.stack(
            [
                torch.tensor(letters)[letter_B],
                torch.tensor(digits)[digit_B],
                torch.full((64,), eos),
            ],
            1,
        )
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return HFSearch(model.eval(), tokenizer)


def test_it_finds_another_digit_than_the_model_would_say_and_more_often_than_noise():
    engine = digit_model()
    rows = [
        {"prompt": chr(97 + i), "id": f"{i}/{shift}", "answer": str((i + shift) % 8 + 1)}
        for i in range(24)
        for shift in range(1, 8)
    ]

    def oracle(prompts, completions, answer, **_):
        return [-float(a != c) for a, c in zip(answer, completions, strict=True)]

    options = {"rho": 0.5, "lr": 0.5, "max_steps": 40, "max_new_tokens": 4}
    with FunctionReward(oracle) as reward:
        start = latent_seek(engine, rows, reward, **options | {"max_steps": 0})
        found = latent_seek(engine, rows, reward, **options)
        noise = latent_seek(
            engine, rows, reward, **options | {"proposal": "random_signs", "max_steps": 1}
        )
    share = [sum(r.reward == 0 for r in results) / len(rows) for results in (start, found, noise)]
    assert share[0] == 0 and share[1] >= 0.9 and share[2] < share[1] - 0.3
