"""Configured as OpenRLHF's own `k2` with `unbiased_gradient`, a float32 run ends where the unhooked host's does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from openrlhf_run import run, run_stock
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(1500)]

HOOK = "kl_plugins.openrlhf.driver.runtime_env_hook"
# Completions that depend on how many came before and nothing else: what vLLM draws depends on which requests meet in a
# batch, and OpenRLHF shuffles the prompts without a seed, so all are the same one.
AGENT = """
import hashlib
from openrlhf.utils.agent import AgentExecutorBase


class AgentExecutor(AgentExecutorBase):
    def __init__(self):
        self.asked = {}

    async def execute(self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None):
        asked = self.asked[prompt] = self.asked.get(prompt, -1) + 1
        digest = hashlib.sha256(f"{prompt} {asked}".encode()).digest()
        tokens = hf_tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
        action = [2 + byte % 10 for byte in digest[: 2 + digest[31] % 6]] + [1]
        reward = sum(action) / 64
        return {
            "prompt": prompt, "label": label, "images": None, "mm_train_inputs": None, "reward": reward,
            "scores": reward, "observation_tokens": tokens + action,
            "action_ranges": [(len(tokens), len(tokens) + len(action))], "rollout_log_probs": None,
            "truncated": False, "extra_logs": {},
        }
"""
DETERMINISTIC = (
    *("--rollout.batch_size", "1", "--rollout.n_samples_per_prompt", "8", "--train.batch_size", "8"),
    *("--data.max_samples", "4", "--train.max_epochs", "2", "--algo.advantage.is_correction_level", "off"),
    *("--algo.kl.init_coef", "0.5", "--actor.lr_warmup_ratio", "0", "--actor.adam.lr", "3e-4"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder):
    ours, theirs, seen = (tmp_path_factory.mktemp(name) for name in ("hooked", "stock", "watched"))
    for folder in (ours, theirs, seen):
        (folder / "agent.py").write_text(AGENT)
        (folder / "same.jsonl").write_text('{"input": "4+5=", "label": "9"}\n' * 4)

    def flags(folder):
        files = (
            "--train.agent_func_path",
            str(folder / "agent.py"),
            "--data.prompt_dataset",
            str(folder / "same.jsonl"),
        )
        return *DETERMINISTIC, *files

    hooked = run(ours, model_folder, "grpo", "--kl", "k2_as_loss", flags=flags(ours), OPENRLHF_CPU_FP32="1")
    own = ("--algo.kl.use_loss", "--algo.kl.estimator", "k2", "--algo.kl.unbiased_gradient")
    stock = run_stock(theirs, model_folder, "grpo", flags=(*flags(theirs), *own), OPENRLHF_CPU_FP32="1")
    hook = {"RAY_RUNTIME_ENV_HOOK": HOOK, "KL_PLUGINS_OPENRLHF": "--kl-monitor"}
    watched = run_stock(seen, model_folder, "grpo", flags=(*flags(seen), *own), OPENRLHF_CPU_FP32="1", **hook)
    return hooked, stock, watched


def weights(folder):
    state = load_file(next(folder.rglob("model.safetensors")))
    return torch.cat([state[name].float().flatten() for name in sorted(state)])


def test_the_parameters_are_those_of_the_unhooked_host(runs, model_folder):
    hooked, stock, _ = runs
    assert (hooked.returncode, stock.returncode) == (0, 0), (hooked.output + stock.output)[-3000:]
    assert len(hooked.proof()) > 0
    assert len(stock.proof()) == 0
    assert max(step["kl/weight_max"] for step in hooked.steps) > 1.001  # the second epoch is off-policy
    assert max(step["kl/weight_max"] for step in hooked.steps) < 10
    found, wanted = weights(hooked.folder / "model"), weights(stock.folder / "model")
    moved = (wanted - weights(Path(model_folder))).norm()
    assert moved > 0.01
    assert (found - wanted).norm() < 1e-5 * moved


def test_a_watched_run_is_the_unhooked_one_bit_for_bit(runs):
    _, stock, watched = runs
    assert watched.returncode == 0, watched.output[-3000:]
    assert torch.equal(weights(watched.folder / "model"), weights(stock.folder / "model"))
    assert len(watched.proof()) > 0
    assert len(watched.steps) == len(stock.steps) > 0
    for step, own in zip(watched.steps, stock.steps, strict=True):
        assert step["policy_loss"] == own["policy_loss"]
        assert {"kl/k1_se", "kl/position/0", "kl/class/text", "kl/dead", "kl/ratio_ess"} <= step.keys()
        assert step["kl/dead"] == 0  # unbiased_gradient has no clamp
