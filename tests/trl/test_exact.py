"""The gradient that arrives in the parameters of a real trainer, by enumerating every completion of two tokens.

The rollout engine is another model, as a stale or quantized engine is: weighing the KL against the trainer's old
policy instead, as TRL does with its own KL, leaves a bias that these tests show.
"""

from __future__ import annotations

import pytest
import torch
from tiny_trl import loss_and_gradients, make_model
from transformers import AutoModelForCausalLM

from kl_plugins.core.fused_linear_kl import LMHead
from kl_plugins.patching import load_patches
from kl_plugins.patching.versions import installed_version
from kl_plugins.trl import GRPOTrainer, RLOOTrainer

CHARACTERS = "012+="
PROMPT = torch.tensor([[3, 5, 4, 6]])
V, EOS = 2 + len(CHARACTERS), 1
PAIRS = torch.tensor([(a, b) for a in range(V) for b in range(V) if a != EOS or b == 0])
MASK = torch.stack([torch.ones(len(PAIRS)), (PAIRS[:, 0] != EOS).float()], dim=1).long()
exactly = pytest.mark.skipif(
    installed_version("trl") not in load_patches("trl", "exact").tested, reason="this TRL gives no distributions"
)
EXACT = [
    ({"kl": "exact_in_reward", "kl_off_policy": "prefix", "kl_baseline": None}, "reverse_kl"),
    ({"kl": "exact_in_reward", "kl_off_policy": "sequence", "kl_baseline": None}, "reverse_kl"),
    ({"kl": "exact_as_loss"}, "local_reverse_kl"),
    ({"kl": "exact_as_loss", "kl_off_policy": "prefix"}, "local_reverse_kl on the policy's prefixes"),
]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """Of few tokens, whose pairs are all the completions there are."""
    return make_model(tmp_path_factory.mktemp("policy"), seed=0, spread=10.0, characters=CHARACTERS)


def distributions(model) -> torch.Tensor:
    """(N, 2, V) log-probabilities of what may follow; the graph reaches the model."""
    return model(torch.cat([PROMPT.expand(len(PAIRS), -1), PAIRS], dim=1)).logits[:, -3:-1].log_softmax(-1)


def token_logp(model) -> torch.Tensor:
    """(N, 2) log-probability of every completion's tokens; the graph reaches the model."""
    return distributions(model).gather(-1, PAIRS[..., None]).squeeze(-1)


@pytest.fixture(scope="module")
def others(model):
    """The log-probs of a reference and of a rollout engine that both differ from the policy."""
    found = {}
    for name, seed, scale in (("reference", 1, 0.06), ("engine", 2, 0.03)):
        other = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
            found[name] = token_logp(other)
            if name == "reference":
                ids = torch.cat([PROMPT.expand(len(PAIRS), -1), PAIRS], dim=1)
                found["reference_hidden"] = other.model(ids).last_hidden_state[:, -3:-1]
                found["reference_head"] = LMHead(weight=other.lm_head.weight, dtype=torch.float64)
    return found


def expected_gradient(trainer, others, *, engine_known: bool) -> torch.Tensor:
    """sum over completions of the engine's probability times the trainer's own gradient for that completion."""
    with torch.no_grad():
        old = token_logp(trainer.model)
    probability = (others["engine"] * MASK).sum(-1).exp()
    total = 0
    for i in range(len(PAIRS)):
        batch = {
            "prompt_ids": PROMPT,
            "prompt_mask": torch.ones_like(PROMPT),
            "completion_ids": PAIRS[i : i + 1],
            "completion_mask": MASK[i : i + 1],
            "advantages": torch.zeros(1),
            "num_items_in_batch": MASK[i].sum(),
            "old_per_token_logps": old[i : i + 1],
            "old_logps": (old * MASK)[i : i + 1].sum(-1),
            "ref_per_token_logps": others["reference"][i : i + 1],
        }
        if trainer.kl_spec.loss.exact:
            batch["kl_ref_hidden"] = others["reference_hidden"][i : i + 1]
            trainer._exact.reference_head = others["reference_head"]
        if engine_known:
            batch["sampling_per_token_logps"] = others["engine"][i : i + 1]
        total = total + probability[i] * loss_and_gradients(trainer, batch)[1]
    return total


def true_gradient_without(trainer, others, left_out: int) -> torch.Tensor:
    """Of the generalized KL of whole completions over all tokens but one: sum (p log(p / r) - p + r) at each state."""
    model = trainer.model
    model.zero_grad()
    logp, reference = token_logp(model), others["reference"]
    kept = (PAIRS != left_out) * (logp.exp() * (logp - reference) - logp.exp() + reference.exp())
    first = kept[:, 0][PAIRS[:, 1] == 0].sum()  # each first token once
    (0.1 * (first + (logp[:, 0].exp() * kept[:, 1] * MASK[:, 1]).sum())).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def true_gradient(trainer, others, of: str) -> torch.Tensor:
    """Of the KL of whole completions, or of the next-token KLs on the engine's prefixes."""
    model = trainer.model
    model.zero_grad()
    logp = token_logp(model) * MASK
    gap = logp - others["reference"] * MASK
    if of == "reverse_kl":
        kl = (logp.sum(-1).exp() * gap.sum(-1)).sum()
    else:
        engine = (logp.detach() if "policy" in of else others["engine"]).exp()
        first = torch.where(PAIRS[:, 1] == 0, logp[:, 0].exp() * gap[:, 0], 0.0)  # each first token once
        second = engine[:, 0] * logp[:, 1].exp() * gap[:, 1] * MASK[:, 1]
        kl = first.sum() + second.sum()
    (0.1 * kl).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def relative_error(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
@pytest.mark.parametrize(
    ("options", "of"),
    [
        ({"kl": "k2_as_loss"}, "local_reverse_kl"),
        ({"kl": "k1_in_reward", "kl_off_policy": "prefix", "kl_baseline": None}, "reverse_kl"),
        ({"kl": "k1_in_reward", "kl_off_policy": "sequence", "kl_baseline": None}, "reverse_kl"),
        ({"kl": "k2_as_loss", "kl_credit": "sequence", "kl_off_policy": "sequence"}, "reverse_kl"),
        *(pytest.param(*each, marks=exactly) for each in EXACT),
    ],
)
def test_expected_gradient_in_the_parameters(make_trainer, others, cls, options, of):
    if cls is GRPOTrainer:
        options = options | {"loss_type": "luspo"}  # sums over tokens and averages over sequences, as RLOO does
    unbounded = {} if options["kl"] == "exact_as_loss" else {"kl_weight_clip": [0.0, 1e6]}  # whose weight is 1
    trainer = make_trainer(cls, **unbounded, **options)
    trainer.model.double()
    wanted = true_gradient(trainer, others, of)
    assert relative_error(expected_gradient(trainer, others, engine_known=True), wanted) < 1e-6
    if options["kl"] == "exact_as_loss" and of == "local_reverse_kl":
        return  # no ratio in it: an exact KL on the engine's prefixes needs none
    ignored = relative_error(expected_gradient(trainer, others, engine_known=False), wanted)
    assert ignored > 0.02  # the bias of not weighing the KL by the engine's probabilities


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
@pytest.mark.parametrize(("words", "token"), [(["eos"], EOS), (["id:4"], 4), (["+"], 5)])
def test_expected_gradient_with_a_token_left_out(make_trainer, others, cls, words, token):
    options = {"kl": "k1_in_reward", "kl_off_policy": "prefix", "kl_baseline": None, "kl_weight_clip": [0.0, 1e6]}
    if cls is GRPOTrainer:
        options["loss_type"] = "luspo"
    trainer = make_trainer(cls, kl_leave_out=words, **options)
    trainer.model.double()
    found = expected_gradient(trainer, others, engine_known=True)
    assert relative_error(found, true_gradient_without(trainer, others, token)) < 1e-6
    assert relative_error(found, true_gradient(trainer, others, "reverse_kl")) > 0.02


def test_a_reduction_by_length_is_biased_whatever_the_kl(make_trainer, others):
    """docs/limits.md: loss_type grpo divides each completion's term by its length, which depends on what was drawn."""
    trainer = make_trainer(GRPOTrainer, kl="k2_as_loss", kl_weight_clip=[0.0, 1e6], loss_type="grpo")
    trainer.model.double()
    wanted = true_gradient(trainer, others, "local_reverse_kl")
    found = expected_gradient(trainer, others, engine_known=True)
    scaled = found * (found @ wanted) / (found @ found)  # a mere scale is beta's business
    assert relative_error(scaled, wanted) > 1e-3  # of an expectation that is exact to 1e-6 otherwise
