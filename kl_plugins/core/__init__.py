"""The mathematics of KL regularization: tensors and floats in, tensors and floats out. Needs torch and nothing else.

Notation, used in code, documents and logs alike; B sequences of up to T tokens, natural logarithms (nats):

| symbol | name | shape | meaning |
|---|---|---|---|
| log pi(y_t) | `logp` | (B, T) | the current policy, live in the autograd graph |
| log ref(y_t) | `ref_logp` | (B, T) | the frozen reference policy |
| log mu(y_t) | `behavior_logp` | (B, T) or None | the policy that sampled the tokens; None: the current one |
| m_t | `mask` | (B, T) | 1 = the token counts, 0 = it does not |
| u_t | `log_ratio` | (B, T) | `logp - ref_logp`, always in this order |
| rho_t | `ratio` | (B, T) | `exp(detach(logp) - behavior_logp)` |
| c_t | `coefficient` | (B, T) | detached, what multiplies the score grad log pi(y_t) |
| w_t | `weight` | (B, T) | detached importance weight |
| v_t | `value` | (B, T) | detached KL estimate of the token, for logging |

The way of a configuration: `registry` names it, `spec` checks its options, `terms` computes its loss.
Nothing is imported here, so that what needs no tensors (`controllers`, `spec`) loads no torch.
"""
