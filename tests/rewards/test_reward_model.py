"""Against one forward pass of the model per text, without batches or padding."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rlalign.models.random import write_random_model
from rlalign.rewards.reward_model import reward_model
from rlalign.rewards.verdict import RewardError, VerdictKind

TEXTS = ["a", "abc", "12+3", "", "a longer completion than the others", "abd", "<answer>7</answer>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rm") / "base"
    write_random_model(path, "qwen2", hidden=16, layers=1, max_positions=64)
    return path


def classifier(base: Path, labels: int, pad: bool) -> Path:
    path = base.parent / f"rm_{labels}_{pad}"
    if not path.exists():
        config = AutoConfig.from_pretrained(base, num_labels=labels)
        tokenizer = AutoTokenizer.from_pretrained(base)
        config.pad_token_id = tokenizer.pad_token_id if pad else None
        if not pad:  # as in many published models: nothing to pad with but the end of sequence
            tokenizer.pad_token = tokenizer.eos_token
        torch.manual_seed(labels)
        model = AutoModelForSequenceClassification.from_config(config)
        torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


def alone(path: Path, text: str) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits[0]


@pytest.mark.parametrize("pad", [True, False])
def test_batches_give_each_text_the_score_it_has_alone(folder, pad):
    path = classifier(folder, 1, pad)
    reward = reward_model(str(path), device="cpu", batch_tokens=40)
    reward.load()
    verdicts = reward(prompts=["q: "] * len(TEXTS), completions=TEXTS)
    expected = [alone(path, "q: " + text)[0].item() for text in TEXTS]
    assert [v.value for v in verdicts] == pytest.approx(expected, abs=1e-5)


def test_the_index_chooses_a_label_and_is_required_when_there_are_several(folder):
    path = classifier(folder, 3, True)
    reward = reward_model(str(path), index=2, device="cpu")
    reward.load()
    (verdict,) = reward(prompts=["q"], completions=["a"])
    assert verdict.value == pytest.approx(alone(path, "qa")[2].item(), abs=1e-5)
    with pytest.raises(RewardError, match="has 3 labels"):
        reward_model(str(path)).load()


def test_chat_prompts_go_through_the_template(folder):
    path = classifier(folder, 1, True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(path.parent / "chat")
    AutoModelForSequenceClassification.from_pretrained(path).save_pretrained(path.parent / "chat")
    reward = reward_model(str(path.parent / "chat"), device="cpu")
    reward.load()
    messages = [{"role": "user", "content": "q"}]
    (verdict,) = reward(prompts=[messages], completions=[[{"role": "assistant", "content": "a"}]])
    assert verdict.value == pytest.approx(alone(path, "[user]q[assistant]a")[0].item(), abs=1e-5)


def test_a_text_too_long_for_the_model_is_invalid_and_not_cut(folder):
    reward = reward_model(str(classifier(folder, 1, True)), device="cpu")
    reward.load()
    verdicts = reward(prompts=["q", "q"], completions=["x" * 100, "y"])
    assert [v.kind for v in verdicts] == [VerdictKind.INVALID, VerdictKind.OK]


def test_a_language_model_is_not_a_reward_model(folder):
    with pytest.raises(RewardError, match=r"no reward model.*score\.weight"):
        reward_model(str(folder), device="cpu").load()


def test_a_missing_folder_is_found_before_anything_loads(tmp_path):
    with pytest.raises(RewardError, match="no such folder"):
        reward_model(str(tmp_path / "nowhere"))
    with pytest.raises(RewardError, match=r"no config\.json"):
        reward_model(str(tmp_path))
