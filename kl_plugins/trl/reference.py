"""Which policy the KL of a TRL trainer is to: another model, an adapter, or one that follows the policy.

TRL scores its rollouts with `ref_model`, with PEFT with the adapter called "ref", or with all adapters disabled; what
is done here is to put the reference that was asked for in one of those places.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils as trl_utils
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kl_plugins.errors import ConfigError, refuse
from kl_plugins.integration.tokenizers import require_one_tokenizer
from kl_plugins.trl.host import OnlineTrainer

ADAPTER = "adapter:"
STATE_FILE = "kl_reference.safetensors"
CHOICE_FILE = "kl_reference.json"
_REF = "ref"  # TRL's name for the adapter that is the reference


@contextmanager
def without_hosts_reference(given: Collection[Any]) -> Iterator[None]:
    """Keep TRL from making a reference of its own, while a trainer is made of the arguments `given`.

    It makes none for a beta of 0, which the config has meanwhile if its `kl_reference` names another one.
    """
    args = next((each for each in given if hasattr(each, "kl_reference")), None)
    if args is None or args.kl is None or args.kl_reference is None:
        yield
        return
    beta, args.beta = args.beta, 0.0
    try:
        yield
    finally:
        args.beta = beta


def adapters_of(given: Collection[Any]) -> set[str]:
    """The names of the adapters of the models among the arguments `given`."""
    return {name for each in given if isinstance(each, torch.nn.Module) for name in getattr(each, "peft_config", ())}


def start_reference(trainer: OnlineTrainer, adapters: Collection[str]) -> MovingReference | None:
    """Give `trainer`, which TRL has just made of a model with these adapters, the reference of its config.

    Returns what moves it, None for one that stays where it is. Raises `ConfigError` for one that the model, its
    adapters or the way it is distributed don't allow.
    """
    args, peft = trainer.args, is_peft_model(trainer.model)
    asked, distributed = args.kl_reference, trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    problems = []
    if asked is not None and not peft and (asked == "base" or asked.startswith(ADAPTER)):
        problems.append(
            f"kl_reference={asked!r} is about adapters, and this model has none: leave it out, or name a model"
        )
    if distributed and (args.kl_reference_every is not None or (asked is not None and _is_model(asked))):
        problems.append(
            "kl_reference with DeepSpeed or FSDP can only be 'base' or an adapter that stays as it is: leave it out, "
            "or use TRL's sync_ref_model"
        )
    if args.kl_reference_every is not None and peft and asked is not None and _is_model(asked):
        problems.append(
            f"kl_reference={asked!r} with kl_reference_every: with PEFT an adapter moves; name 'adapter:NAME'"
        )
    if asked is not None and _REF in adapters:
        problems.append(
            f"kl_reference={asked!r} with a model that has an adapter called {_REF!r}, TRL's name for its own "
            "reference: save that adapter under another name"
        )
    refuse(problems)
    if asked is not None and peft and _REF in _unwrapped(trainer).peft_config:
        _unwrapped(trainer).delete_adapter(_REF)  # TRL's RLOO has copied the trained one, whatever beta was
    if asked is not None and _is_model(asked):
        trainer.ref_model = load_reference(trainer, asked)
    elif asked is not None and asked.startswith(ADAPTER):
        _use_adapter(_unwrapped(trainer), asked.removeprefix(ADAPTER))
    if args.kl_reference_every is None:
        return None
    moving = MovingReference(trainer)
    trainer.add_callback(moving)
    return moving


class MovingReference(TrainerCallback):
    """Every `kl_reference_every` optimizer steps: reference = decay * reference + (1 - decay) * policy.

    Elementwise, in float32 also where the reference is kept in half precision (else small steps round to none); with
    PEFT on the matrices of the adapter. The rollouts that follow are scored with it. It is in checkpoints.
    """

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.every, self.decay = trainer.args.kl_reference_every, trainer.args.kl_reference_decay
        self._pairs = dict(_pairs(trainer))
        self._exact = {
            name: reference.float() if self.decay and reference.dtype.itemsize < 4 else reference
            for name, (reference, _) in self._pairs.items()
        }

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the reference, if this is one of the steps after which it moves."""
        if state.global_step % self.every == 0:
            self.move()

    @torch.no_grad()
    def move(self) -> None:
        """Move the reference towards the policy once, as `decay` says."""
        for name, (reference, policy) in self._pairs.items():
            exact = self._exact[name]
            exact.lerp_(policy.to(exact.dtype), 1 - self.decay)
            if exact is not reference:
                reference.copy_(exact)

    def save(self, folder: Path) -> None:
        """Write the reference's parameters into the checkpoint `folder`."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self._exact.items()}
        save_file(state, folder / STATE_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read the reference's parameters from the checkpoint `folder`.

        Raises `ConfigError` if it holds none, or those of another model.
        """
        path = folder / STATE_FILE
        if not path.exists():
            raise ConfigError(
                f"kl_reference_every is set, but the checkpoint {folder} holds no {STATE_FILE}: resume one of a run "
                "with that option, or start without a checkpoint"
            )
        state = load_file(path)
        if {name: tuple(t.shape) for name, t in state.items()} != {n: tuple(t.shape) for n, t in self._exact.items()}:
            raise ConfigError(f"{path} holds the reference of another model: resume with the model it was saved with")
        for name, (reference, _) in self._pairs.items():
            self._exact[name].copy_(state[name])
            reference.copy_(state[name])


def load_reference(trainer: OnlineTrainer, reference: str | torch.nn.Module) -> Any:
    """A model, from a path, a hub id or as it is, prepared as TRL prepares its own reference.

    Draws no random numbers. Raises `ConfigError` for a model whose tokens are others than the policy's.
    """
    args = trainer.args
    if getattr(args, "cast_lm_head_to_fp32", False):  # GRPO's
        raise ConfigError(
            f"a reference of one's own ({reference!r}) with cast_lm_head_to_fp32=True, without which it would be "
            "scored: set that to False"
        )
    model = reference if isinstance(reference, torch.nn.Module) else _loaded(trainer, reference)
    if hasattr(trl_utils, "add_fused_lm_head") and not hasattr(model, "kl_reference_head"):  # TRL from 1.15 on
        trl_utils.add_fused_lm_head(model, temperature=trainer.temperature)
        model.kl_reference_head = True  # it may be used again
    return trainer.accelerator.prepare_model(model.eval(), evaluation_mode=True)


def _loaded(trainer: OnlineTrainer, name: str) -> Any:
    processor = trainer.processing_class
    policy_name = trl_utils.get_config_model_id(trainer.model.config)
    same_tokens = require_one_tokenizer(getattr(processor, "tokenizer", processor), policy_name, name)
    options = dict(trainer.args.model_init_kwargs or {})
    if name != policy_name:
        options.pop("revision", None)
    if trainer.accelerator.num_processes > 1:
        options["device_map"] = None
    options.setdefault("dtype", trainer.model.dtype)
    options.setdefault("attn_implementation", trainer.model.config._attn_implementation)
    device = trainer.accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model = trl_utils.create_model_from_path(name, **options).requires_grad_(False)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the reference {name!r} can't be loaded ({str(error).splitlines()[0]}): give the path or hub id of a "
                f"causal language model; 'base' and '{ADAPTER}NAME' stand for what LoRA has"
            ) from None
    sizes = [m.get_output_embeddings().weight.shape[0] for m in (trainer.model, model)]
    spec = getattr(trainer, "kl_spec", None)  # TRL's own trainers, which may be watched, have none
    exact = spec is not None and spec.loss.exact
    if sizes[0] != sizes[1] and (exact or not same_tokens):
        why = "the KL is summed over all of them" if exact else "no tokenizer is saved with it"
        raise ConfigError(
            f"the policy has {sizes[0]} tokens and the reference {name!r} {sizes[1]}, and {why}: a KL needs the same "
            "tokens in both"
        )
    return model


def save_reference(trainer: OnlineTrainer, trial: Any, moving: MovingReference | None) -> None:
    """Write into the checkpoint that TRL has just saved which reference the run has, and where it has moved to."""
    if not trainer.args.should_save:
        return
    folder = Path(trainer._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")
    (folder / CHOICE_FILE).write_text(json.dumps(_choice(trainer.args)) + "\n")
    if moving is not None:
        moving.save(folder)


@contextmanager
def resumed_reference(trainer: OnlineTrainer, folder: Path, moving: MovingReference | None) -> Iterator[None]:
    """Around TRL's loading of the checkpoint `folder`: the run goes on with the reference that is saved there.

    Raises `ConfigError` if the run that wrote it had another reference, or none that moves.
    """
    _require_choice(trainer.args, folder)
    adapters = adapters_of([trainer.model])
    yield
    _load_trained_adapter(trainer, folder, adapters)
    if moving is not None:
        moving.load(folder)


def _require_choice(args: Any, folder: Path) -> None:
    """Raise `ConfigError` if the run that wrote this checkpoint had another reference; it may have said nothing."""
    path = folder / CHOICE_FILE
    saved = json.loads(path.read_text()) if path.exists() else _choice(args)
    if saved != _choice(args):
        raise ConfigError(
            f"the checkpoint {folder} is of a run with {_said(saved)}, this one has {_said(_choice(args))}: resume "
            "with the reference that it had, or start a new run from the model that is saved there"
        )


def _choice(args: Any) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("kl_reference", "kl_reference_every", "kl_reference_decay")}


def _said(choice: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in choice.items())


def _load_trained_adapter(trainer: OnlineTrainer, folder: Path, adapters: Collection[str]) -> None:
    """Load the adapter that is trained from a checkpoint that holds the reference's, too.

    transformers (5.15) then loads the adapters in subfolders only, and would go on from an untrained one. A reference
    that the model, which had these `adapters`, didn't have is taken away again.
    """
    model = _unwrapped(trainer)
    if not is_peft_model(model) or _REF not in model.peft_config:
        return
    if Path(folder, "adapter_config.json").exists():
        model.load_adapter(str(folder), adapter_name=_active(model), is_trainable=True)
    if _REF not in adapters:
        model.delete_adapter(_REF)


def _active(model: Any) -> str:
    active = model.active_adapter
    return str(active if isinstance(active, str) else active[0])


def _is_model(asked: str) -> bool:
    return asked != "base" and not asked.startswith(ADAPTER)


def _unwrapped(trainer: OnlineTrainer) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model)


def _use_adapter(model: Any, name: str) -> None:
    """Put a frozen copy of the adapter `name`, or of the one saved there, where TRL looks for it."""
    if name in model.peft_config:
        _copy_adapter(model, name)
        return
    try:
        model.load_adapter(name, adapter_name=_REF, is_trainable=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"kl_reference='{ADAPTER}{name}': the model has the adapters {', '.join(model.peft_config)}, and none can "
            f"be loaded from {name!r} ({str(error).splitlines()[0]})"
        ) from error


def _copy_adapter(model: Any, name: str) -> None:
    model.add_adapter(_REF, model.peft_config[name])
    with torch.no_grad():
        for theirs, own in _adapter_names(model, name):
            parameter = model.get_parameter(own)
            parameter.copy_(model.get_parameter(theirs))
            parameter.requires_grad_(False)


def _adapter_names(model: Any, name: str) -> list[tuple[str, str]]:
    """The parameters of the adapter `name`, and those of the adapter that is the reference."""
    prefix, found = getattr(model.base_model, "prefix", "lora_"), []
    for path, _ in model.named_parameters():
        parts = path.split(".")
        for i in range(1, len(parts)):
            if parts[i] == name and (parts[i - 1].startswith(prefix) or parts[i - 1] == "modules_to_save"):
                found.append((path, ".".join([*parts[:i], _REF, *parts[i + 1 :]])))
    return found


def _pairs(trainer: OnlineTrainer) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Name, parameter of the reference and parameter of the policy that it follows."""
    model = _unwrapped(trainer)
    if not is_peft_model(model):
        references = dict(trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters())
        policies = dict(model.named_parameters())
        shapes = [{name: tuple(p.shape) for name, p in found.items()} for found in (policies, references)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                "kl_reference_every with a reference of another architecture than the policy's, whose parameters it "
                "would have to follow: leave one of the two out"
            )
        yield from ((name, (references[name], policies[name])) for name in policies)
        return
    active = _active(model)
    if _REF not in model.peft_config:
        _copy_adapter(model, active)
    names = _adapter_names(model, active)
    parameters = dict(model.named_parameters())
    lost = {n for n, p in parameters.items() if p.requires_grad} - {theirs for theirs, _ in names}
    differ = [
        own for theirs, own in names if own not in parameters or parameters[own].shape != parameters[theirs].shape
    ]
    if lost or differ or len(names) != len(_adapter_names(model, _REF)):
        raise ConfigError(
            f"kl_reference_every: the reference can't follow the adapter {active!r}: "
            f"{'these parameters are trained outside of it' if lost else 'their matrices differ'} "
            f"({', '.join(sorted(lost or differ)[:3])}); use an adapter of the same configuration, or leave it out"
        )
    yield from ((own, (parameters[own], parameters[theirs])) for theirs, own in names)
