"""The preference losses of the same names as TRL's, held to DPOTrainer's own loss.

The trainer is a real one, built by its own constructor around a language model of a few hundred random weights. Stubbed
are the two models when the loss is taken: each says one token's log-probability a completion, numbers that we choose.
"""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from mlcm_rl.equations.preference import implicit_accuracy, implicit_margin, preference_loss

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")

NUM_PAIRS = 5
BETA = 0.3
INPUTS = {  # a prompt of one token and a completion of one, chosen first
    "input_ids": torch.zeros(2 * NUM_PAIRS, 2, dtype=torch.long),
    "attention_mask": torch.ones(2 * NUM_PAIRS, 2, dtype=torch.long),
    "completion_mask": torch.tensor([[0, 1]]).repeat(2 * NUM_PAIRS, 1),
}


class OneToken(torch.nn.Module):
    """A model whose completions have the given log-probabilities (2 NUM_PAIRS,)."""

    def __init__(self, log_probs: torch.Tensor):
        super().__init__()
        self.log_probs = log_probs[:, None]

    def forward(self, **inputs) -> SimpleNamespace:
        blank = torch.zeros_like(self.log_probs)
        return SimpleNamespace(log_probs=self.log_probs, entropy=blank, mean_logits=blank, is_top1=blank.bool())


def tiny_language_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=4, **sizes))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> DPOTrainer:
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    settings = {"beta": BETA, "use_cpu": True, "bf16": False, "report_to": "none"}
    return DPOTrainer(
        model=tiny_language_model(),
        ref_model=tiny_language_model(),
        args=DPOConfig(str(tmp_path_factory.mktemp("trl")), **settings),
        train_dataset=Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["a"]}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
    )


def trls_loss(trainer: DPOTrainer, policy: torch.Tensor, reference: torch.Tensor, loss_type: str, smoothing: float):
    trainer.loss_types, trainer.label_smoothing, trainer.ref_model = [loss_type], smoothing, OneToken(reference)
    return trainer.compute_loss(OneToken(policy), INPUTS)


def log_probs() -> tuple[torch.Tensor, torch.Tensor]:
    """Of policy and reference, apart enough that margins of both signs and both sides of the hinge occur."""
    policy, reference = -12 * torch.rand(2, 2 * NUM_PAIRS, generator=torch.Generator().manual_seed(3))
    return policy.requires_grad_(), reference


def test_the_example_has_margins_of_every_kind():
    policy, reference = log_probs()
    margins = implicit_margin(*(policy - reference).chunk(2), BETA)
    assert margins.min() < 0 < 1 < margins.max()


@pytest.mark.parametrize(
    ("loss_type", "smoothing"),
    [("sigmoid", 0.0), ("hinge", 0.0), ("ipo", 0.0), ("robust", 0.0), ("robust", 0.1), ("robust", 0.4)],
)
def test_loss_and_gradient_are_dpo_trainers_own(trainer, loss_type, smoothing):
    """TRL's is the batch's mean; the gradient, a pair at a time, shows that every pair agrees."""
    policy, reference = log_probs()
    trls = trls_loss(trainer, policy, reference, loss_type, smoothing)
    ours = preference_loss(*(policy - reference).chunk(2), BETA, loss_type, smoothing)
    assert ours.shape == (NUM_PAIRS,)
    torch.testing.assert_close(ours.mean(), trls)
    torch.testing.assert_close(torch.autograd.grad(ours.mean(), policy), torch.autograd.grad(trls, policy))


def test_what_is_logged_is_what_trl_logs(trainer):
    policy, reference = log_probs()
    trls_loss(trainer, policy, reference, "sigmoid", 0.0)
    logged = trainer._metrics["train"]
    ratios = (policy - reference).detach().chunk(2)
    assert logged["rewards/margins"][-1] == pytest.approx(implicit_margin(*ratios, BETA).mean().item(), rel=1e-6)
    assert logged["rewards/accuracies"][-1] == pytest.approx(implicit_accuracy(*ratios).mean().item())


def test_trls_sigmoid_takes_no_label_smoothing(trainer):
    """Once it did, and was cDPO; now it is silent about it, and `conservative` is a loss of its own here."""
    policy, reference = log_probs()
    trls = trls_loss(trainer, policy, reference, "sigmoid", 0.1)
    ratios = (policy - reference).chunk(2)
    torch.testing.assert_close(trls, preference_loss(*ratios, BETA, "sigmoid").mean())
    assert abs(trls - preference_loss(*ratios, BETA, "conservative", 0.1).mean()) > 0.01
