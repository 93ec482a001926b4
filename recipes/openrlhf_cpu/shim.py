"""OpenRLHF 0.11.2 on a machine without a GPU: its real Ray actors, DeepSpeed and vLLM, without CUDA.

For trying it out and for tests, never for training: everything here trades speed for running at all.

Put this folder on PYTHONPATH; `sitecustomize.py` then installs it in every process (recipes/openrlhf.sh does so for
`cpu`). What it replaces is CUDA's part only: device calls, flash-attn, NCCL, and vLLM's way of taking new weights. No
KL, loss, advantage or experience code is touched. Each patch is applied when the module it concerns has been imported,
so that a Python process which imports none of them pays nothing.

OPENRLHF_CPU_FP32=1  float32 everywhere, so that numbers can be compared tightly. OpenRLHF itself offers bf16 and fp16
                     only, and hands bfloat16 to vLLM.
"""

import importlib.abc
import os
import sys
import threading
import types
from pathlib import Path

BEFORE, AFTER = {}, {}


def before_import(name):
    """Decorate a function of no argument to be run in each process right before the module `name` is executed."""
    return lambda patch: BEFORE.setdefault(name, []).append(patch)


def after_import(name):
    """Decorate a function of the module `name` to be run in each process right after it was executed."""
    return lambda patch: AFTER.setdefault(name, []).append(patch)


class Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it hands on what the other finders find, with the patches around its execution."""

    def __init__(self):
        self.searching = threading.local()

    def find_spec(self, name, path=None, target=None):
        """The other finders' spec of a module that has patches, None for any other module."""
        # The other finders may include one of the same kind, which asks this one in turn.
        if (name not in BEFORE and name not in AFTER) or name in vars(self.searching):
            return None
        vars(self.searching)[name] = True
        try:
            specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
            spec = next(filter(None, specs), None)
        finally:
            del vars(self.searching)[name]
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            for patch in BEFORE.get(name, ()):
                patch()
            execute(module)
            for patch in AFTER.get(name, ()):
                patch(module)

        spec.loader.exec_module = exec_module
        return spec


def install():
    """Install the patches in this process, once. Modules that were imported before stay as they are."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        sys.meta_path.insert(0, Finder())


# 0. Ray: its dashboard is eight more processes, which take longer to start than anything else here


@after_import("ray")
def patch_ray(ray):
    init = ray.init
    ray.init = lambda *args, **kwargs: init(*args, **{"include_dashboard": False, **kwargs})


# 1. Device calls of torch.cuda


class CpuDevice(str):
    """`tensor.to(d)` and `device=d` see "cpu"; `f"cuda:{d}"`, which OpenRLHF's replay buffer writes, gives cuda:0."""

    __slots__ = ()

    def __format__(self, spec):
        return "0"


@after_import("torch")
def patch_torch(torch):
    if torch.cuda.is_available():
        raise RuntimeError(f"there is a GPU here: take {Path(__file__).parent}, made for CPUs, off PYTHONPATH")
    torch.cuda.current_device = lambda: CpuDevice("cpu")
    torch.cuda.set_device = lambda *args: None
    torch.cuda.synchronize = lambda *args: None
    torch.cuda.current_stream = lambda *args: None


# 2. flash-attn: OpenRLHF imports four functions of it, and asks for it as the model's attention


FLASH_ATTN = ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed")


@before_import("openrlhf.models.ring_attn_utils")
def add_flash_attn():
    import einops
    from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input

    for name in FLASH_ATTN:
        sys.modules[name] = types.ModuleType(name)
    vars(sys.modules["flash_attn.bert_padding"]).update(
        index_first_axis=lambda x, indices: x[indices],
        rearrange=einops.rearrange,
        pad_input=_pad_input,
        unpad_input=_unpad_input,
    )
    sys.modules["flash_attn.utils.distributed"].all_gather = None  # for ring attention only


@after_import("openrlhf.models.ring_attn_utils")
def remove_flash_attn(_):
    """Transformers and vLLM probe for flash-attn later on, and must not find the stub."""
    for name in FLASH_ATTN:
        sys.modules.pop(name, None)


@after_import("transformers.modeling_utils")
def patch_attention(module):
    """Torch's attention for flash-attn's: its mask, too, keeps packed sequences apart by their position ids."""
    model = module.PreTrainedModel
    check = model._check_and_adjust_attn_implementation

    def check_other(self, implementation, *args, **kwargs):
        other = "sdpa" if implementation == "flash_attention_2" else implementation
        return check(self, other, *args, **kwargs)

    model._check_and_adjust_attn_implementation = check_other


# 3. DeepSpeed: its device mesh, and what it would compile with g++ for two minutes, each time that a machine is new


@after_import("deepspeed.runtime.engine")
def patch_optimizer(module):
    """Torch's AdamW, which DeepSpeed's setting `torch_adam` asks for, in the place of the fused one."""
    engine = module.DeepSpeedEngine
    configure = engine.get_optimizer_configuration

    def with_torch_adam(self, parameters, *args, **kwargs):
        if not self.zero_use_cpu_optimizer():
            parameters.setdefault("torch_adam", True)
        return configure(self, parameters, *args, **kwargs)

    engine.get_optimizer_configuration = with_torch_adam


@after_import("deepspeed.comm.torch")
def patch_all_reduce(module):
    """Gloo alone: an all-reduce through shared memory is for large tensors."""
    module.build_shm_op = lambda: None


@after_import("openrlhf.utils.deepspeed.deepspeed")
def patch_mesh(module):
    init_device_mesh = module.init_device_mesh
    module.init_device_mesh = lambda device, *args, **kwargs: init_device_mesh("cpu", *args, **kwargs)


# 4. New weights for vLLM: gloo instead of NCCL


class GlooBroadcaster:
    """What OpenRLHF uses of vLLM's `PyNcclCommunicator`."""

    def __init__(self, host, port, rank, world_size, device):
        from vllm.distributed.utils import stateless_init_torch_distributed_process_group as init_group

        self.group = init_group(host, port, rank, world_size, backend="gloo")

    def broadcast(self, tensor, src=0, stream=None):
        """Broadcast a tensor in place, whatever its dtype."""
        import torch

        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        self.group.broadcast([tensor.detach().contiguous().flatten().view(torch.uint8)], options).wait()


@after_import("openrlhf.utils.distributed_util")
def patch_weight_sync_sender(module):
    module.stateless_init_process_group = GlooBroadcaster


@after_import("openrlhf.trainer.ray.vllm_worker_wrap")
def patch_weight_sync_receiver(module):
    def update_weight(self, name, dtype, shape, empty_cache=False):
        """As in `WorkerWrap`, but all weights are loaded at once, with the last one.

        vLLM packs linear weights for the CPU when it loads them, so they can only be loaded again as a whole.
        """
        import torch

        assert dtype == self.model_config.dtype, f"dtype mismatch: sent {dtype}, here {self.model_config.dtype}"
        weight = torch.empty(shape, dtype=dtype)
        self._model_update_group.broadcast(weight, src=0)
        pending = self.__dict__.setdefault("_pending_weights", [])
        pending.append((name, weight))
        if empty_cache:  # OpenRLHF sets it with the last parameter
            self.model_runner.reload_weights(weights_iterator=iter(pending))
            pending.clear()

    module.WorkerWrap.update_weight = update_weight


# 5. OPENRLHF_CPU_FP32=1

if os.environ.get("OPENRLHF_CPU_FP32") == "1":

    @after_import("openrlhf.utils.utils")
    def patch_model_dtype(module):
        import torch

        module.convert_to_torch_dtype = lambda param_dtype: torch.float32

    @after_import("openrlhf.utils.deepspeed.deepspeed")
    def patch_deepspeed_dtype(module):
        def in_float32(make):
            return lambda *args, **kwargs: make(*args, **{**kwargs, "param_dtype": "fp32"})

        module.get_train_ds_config = in_float32(module.get_train_ds_config)
        module.get_eval_ds_config = in_float32(module.get_eval_ds_config)

    @after_import("vllm.engine.arg_utils")
    def patch_vllm_dtype(module):
        init = module.AsyncEngineArgs.__init__

        def in_float32(self, *args, **kwargs):
            init(self, *args, **{**kwargs, "dtype": "float32"})

        module.AsyncEngineArgs.__init__ = in_float32
