"""A conformance kit: what gradient does a KL term have, on-policy and off, and where does it break?

For the KL function of any framework, whatever it is used with:

    pytest --pyargs kl_plugins.conformance --kl-function mypkg.losses:my_kl --kl-claims local_reverse_kl
    pytest --pyargs kl_plugins.conformance --kl-function mypkg.losses:my_kl          # claim nothing, only learn it

`my_kl(logp, ref_logp, mask, old_logp)` gets (B, T) tensors and returns a (B, T) loss or a scalar; see `from_function`
for what it may leave out. The expected gradients are exact: every sequence of a small vocabulary is enumerated, on
nine policies on which the local and the sequence gradient differ. In Python the same is
`log_ratio_range(from_function(my_kl))` and so on. Needs torch and pytest only.
"""

from kl_plugins.conformance.judge import CLAIMS, Learned, learn, problems
from kl_plugins.conformance.measure import identify, masking
from kl_plugins.conformance.shapes import log_ratio_range
from kl_plugins.conformance.subject import Scored, Subject, from_function, from_spec, load

__all__ = [
    "CLAIMS",
    "Learned",
    "Scored",
    "Subject",
    "from_function",
    "from_spec",
    "identify",
    "learn",
    "load",
    "log_ratio_range",
    "masking",
    "problems",
]
