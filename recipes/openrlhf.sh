#!/usr/bin/env bash
# OpenRLHF's own training loop with the KL term you name: five algorithms, on a CPU, one GPU or eight.
#
# What:      `kl-plugins openrlhf` runs OpenRLHF's train_ppo_ray (Ray, DeepSpeed, vLLM) with its KL term replaced.
# Hardware:  cpu   2 CPU cores and 12 GiB, no GPU, no network: a 0.3M-parameter model learns two-digit additions
#            1gpu  one GPU, everything colocated; MODEL defaults to Qwen/Qwen3-0.6B
#            8gpu  eight GPUs of 80 GiB, everything colocated; MODEL defaults to Qwen/Qwen3-8B
# How long:  cpu: 2-2.5 min on cores shared with other work; 40 s are the 16 rollouts and 128 updates. The GPU variants
#            pass OpenRLHF's checks; none was run.
# Launch:    recipes/openrlhf.sh ALGO cpu|1gpu|8gpu [kl options] [-- OpenRLHF's flags]
#            recipes/openrlhf.sh grpo cpu
#            recipes/openrlhf.sh rloo 1gpu --kl k2_as_loss -- --algo.kl.init_coef 0.001
#            MODEL=Qwen/Qwen3-4B PROMPTS=my.jsonl REWARD=my_reward.py recipes/openrlhf.sh ppo 8gpu
#
# ALGO is grpo, reinforce++, reinforce++-baseline, rloo or ppo (with a critic). Flags after `--` come last and win.
# From the environment: MODEL, PROMPTS (a file or hub id), INPUT_KEY and LABEL_KEY of its columns, REWARD (a file with
# reward_func, or a URL), and OUT, the folder of the run (runs/openrlhf-ALGO).
set -euo pipefail

usage() { sed -n '/^# Launch/,/^# ALGO/s/^# \{0,1\}//p' "$0" >&2; exit 2; }

[ $# -ge 2 ] || usage
ALGO=$1 WHERE=$2
shift 2
KL=() MORE=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do KL+=("$1"); shift; done
[ $# -eq 0 ] || MORE=("${@:2}")

RECIPES=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Ray's workers need the environment's bin folder too: DeepSpeed looks for ninja there.
command -v kl-plugins >/dev/null || PATH=$RECIPES/../.venv/bin:$PATH
OUT=${OUT:-runs/openrlhf-$ALGO}

# The algorithm: where the advantage comes from, and so what reverse_kl picks, which is printed at the start. kl-plugins
# sets OpenRLHF's own --algo.kl.use_loss, .estimator and .unbiased_gradient.
case $ALGO in
  grpo)                 FLAGS=(--algo.advantage.estimator group_norm) ;;
  reinforce++)          FLAGS=(--algo.advantage.estimator reinforce) ;;
  reinforce++-baseline) FLAGS=(--algo.advantage.estimator reinforce_baseline) ;;
  rloo)                 FLAGS=(--algo.advantage.estimator rloo) ;;
  ppo)                  FLAGS=(--algo.advantage.estimator gae) ;;
  *)                    usage ;;
esac
case " ${KL[*]-} " in *" --kl "* | *" --kl="*) ;; *) KL=(--kl reverse_kl "${KL[@]}") ;; esac

# vLLM's own log-probs reach the loss only with this; the policy term is weighted by the ratio, truncated at 2.
FLAGS+=(
  --algo.advantage.is_correction_level token
  --algo.advantage.is_correction_mode clip
  --algo.advantage.is_correction_threshold 2
)

case $WHERE in
  cpu)
    [ -n "${MODEL:-}" ] || DS_ACCELERATOR=cpu python "$RECIPES/openrlhf_math.py" runs/openrlhf_math >&2
    : "${MODEL:=runs/openrlhf_math/model}" "${PROMPTS:=runs/openrlhf_math/prompts.jsonl}"
    : "${INPUT_KEY:=input}" "${LABEL_KEY:=label}"
    export PYTHONPATH=$RECIPES/openrlhf_cpu${PYTHONPATH:+:$PYTHONPATH}
    # Ray hands these GPUs out; nothing uses them. With too few of them it waits for more, and doesn't say so.
    export RAY_OVERRIDE_RESOURCES='{"CPU": 32, "GPU": 16}'
    export RAY_prestart_worker_first_driver=0  # no process for each of these CPUs in advance
    export RAY_worker_niceness=0  # else every other process on these cores comes first
    export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 RAY_USAGE_STATS_ENABLED=0
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
    # For a model this small neither compiling nor a second thread pays.
    export TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    FLAGS+=(
      --actor.num_gpus_per_node 1 --ref.num_gpus_per_node 1 --critic.num_gpus_per_node 1
      --vllm.num_engines 1 --vllm.sync_backend gloo --vllm.enforce_eager --vllm.gpu_memory_utilization 0.1
      --ds.zero_stage 2
      --data.max_samples 1024 --data.max_len 32 --rollout.max_new_tokens 8
      --rollout.batch_size 64 --rollout.n_samples_per_prompt 8 --rollout.micro_batch_size 128
      # 16 rollouts, 8 updates on each: from the second one on it is off-policy, and the KL is brought up to date
      --train.batch_size 128 --train.micro_batch_size 64 --train.max_epochs 2
      --actor.adam.lr 3e-4 --actor.lr_warmup_ratio 0.1 --critic.adam.lr 1e-3
      --algo.kl.init_coef 0.02
    )
    ;;
  1gpu | 8gpu)
    python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("flash_attn") is None)' || {
      echo "error: OpenRLHF needs flash-attn: pip install flash-attn==2.8.3 --no-build-isolation" >&2; exit 1; }
    GPUS=${WHERE%gpu}
    if [ "$GPUS" = 1 ]; then
      : "${MODEL:=Qwen/Qwen3-0.6B}"
      FLAGS+=(--ds.zero_stage 2 --data.max_len 4096 --rollout.max_new_tokens 3072)
    else
      : "${MODEL:=Qwen/Qwen3-8B}"
      FLAGS+=(--ds.zero_stage 3 --data.max_len 9216 --rollout.max_new_tokens 8192)
    fi
    : "${PROMPTS:=OpenRLHF/dapo-math-17k}" "${INPUT_KEY:=prompt}" "${LABEL_KEY:=label}"
    FLAGS+=(
      # Everything shares the GPUs; what isn't at work sleeps in the CPU's memory.
      --actor.num_gpus_per_node "$GPUS" --ref.num_gpus_per_node "$GPUS" --critic.num_gpus_per_node "$GPUS"
      --train.colocate_all --vllm.enable_sleep --ds.enable_sleep
      --vllm.num_engines "$GPUS" --vllm.sync_backend nccl --vllm.enforce_eager --vllm.gpu_memory_utilization 0.5
      --ds.param_dtype bf16 --ds.packing_samples --actor.gradient_checkpointing_enable
      --data.apply_chat_template --data.max_samples 12800
      # 100 rollouts, 4 updates on each; micro-batches are cut by tokens
      --rollout.batch_size 128 --rollout.n_samples_per_prompt 8
      --train.batch_size 256 --train.dynamic_batch_enable
      --train.max_tokens_per_gpu 16384 --rollout.max_tokens_per_gpu 32768
      --actor.adam.lr 1e-6 --critic.adam.lr 9e-6
      --algo.kl.init_coef 0.01
    )
    ;;
  *) usage ;;
esac

FLAGS+=(
  --actor.model_name_or_path "$MODEL" --reward.remote_url "${REWARD:-$RECIPES/openrlhf_math.py}"
  --data.prompt_dataset "$PROMPTS" --data.input_key "$INPUT_KEY" --data.label_key "$LABEL_KEY"
  --ckpt.output_dir "$OUT/model" --ckpt.path "$OUT/checkpoints"
  --logger.tensorboard_dir "$OUT" --logger.wandb.run_name tensorboard  # the name of its folder
)

exec kl-plugins openrlhf "${KL[@]}" -- "${FLAGS[@]}" "${MORE[@]}"
