"""Every configuration, for the table that a test run ends with (`tests/conftest.py`)."""

from __future__ import annotations

TRAINED = {
    "k1_in_reward to_go": {"kl": "k1_in_reward", "kl_credit": "to_go"},
    "k1_in_reward sequence": {"kl": "k1_in_reward", "kl_credit": "sequence"},
    "k1_in_reward token": {"kl": "k1_in_reward", "kl_credit": "token"},
    "k2_as_loss token": {"kl": "k2_as_loss"},
    "k2_as_loss sequence": {"kl": "k2_as_loss", "kl_credit": "sequence"},
    "k3_as_loss token": {"kl": "k3_as_loss"},
}
REFUSED = {name: {"kl": name} for name in ("k1_as_loss", "k2_in_reward", "k3_in_reward")}
CONFIGURATIONS = TRAINED | REFUSED
# Where a host gives the full next-token distributions (tests/trl/test_exact_kl.py).
EXACT = {
    "exact_as_loss token": {"kl": "exact_as_loss"},
    "exact_in_reward to_go": {"kl": "exact_in_reward"},
    "exact_forward_as_loss token": {"kl": "exact_forward_as_loss"},
}
COLUMNS = CONFIGURATIONS | EXACT
