"""`HostBeta`: where TRL multiplies its `beta` with its own KL, it gets the term that was asked for instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from kl_plugins.errors import PatchError


class HostBeta(float):
    """A `beta` that the host reads, compares and logs as the number it is, but `beta * tensor` is `term(tensor)`.

    TRL adds its KL as `self.beta * per_token_kl` (GRPO, to the per-token loss) and `self.beta * kl` (RLOO, to the
    reward). Answering that product leaves the host's own reduction, scaling and metrics exactly as they are, and its
    own KL out of the graph. `calls` counts the products, so that a host that stopped asking is noticed.
    """

    term: Callable[[Tensor], Tensor]
    calls: int

    def __new__(cls, beta: float, term: Callable[[Tensor], Tensor]) -> HostBeta:
        """A float of value `beta` that answers a product with `term(other)`."""
        self = super().__new__(cls, beta)
        self.term, self.calls = term, 0
        return self

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, Tensor):
            return float(self) * other
        self.calls += 1
        term = self.term(other)
        if term.shape != other.shape:
            raise PatchError(
                f"a KL term of shape {tuple(term.shape)} was to take the place of the host's of {tuple(other.shape)}: "
                "this trainer reduces its KL in a way of its own; use one that was tested, or kl=None"
            )
        return term

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer `tensor * beta` as `beta * tensor`; any other function of torch gets the number."""
        if function.__name__ in ("mul", "__mul__", "multiply") and len(args) == 2 and not kwargs:
            beta = next(arg for arg in args if isinstance(arg, cls))
            return beta * next(arg for arg in args if arg is not beta)
        args = [float(arg) if isinstance(arg, cls) else arg for arg in args]
        return function(*args, **{k: float(v) if isinstance(v, cls) else v for k, v in (kwargs or {}).items()})

    def __reduce__(self) -> tuple[Any, ...]:  # a copied or saved config is guarded as the original is
        return guarded_beta, (float(self),)


@contextmanager
def host_kl_replaced(trainer: Any, term: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While active, what `trainer` computes as `self.beta * its_own_kl` is `term(its_own_kl)`.

    Raises `PatchError` if the host never asked for it, or asked more than once.
    """
    beta = trainer.beta
    trainer.beta = replaced = HostBeta(beta, term)
    try:
        yield
    finally:
        trainer.beta = beta
    if replaced.calls != 1:
        raise PatchError(
            f"{type(trainer).__name__} was expected to add its KL term once as beta * kl, but did so "
            f"{replaced.calls} times: this TRL computes it elsewhere; install a tested version or set kl=None"
        )


def guarded_beta(beta: float) -> float:
    """The `beta` of a config or trainer with `kl` set, for the time in which no code of ours is running.

    It is the number in all else, but multiplied with a tensor, as TRL does with its own KL, it raises `PatchError`.
    """

    def guarded(_host_kl: Tensor) -> Tensor:
        raise PatchError(
            "kl is set in the config, but TRL's own KL was about to be used: use the trainer of the same name from "
            "kl_plugins.trl, or apply_to_trl (a subclass must call its _compute_loss), or set kl=None"
        )

    return HostBeta(beta, guarded)
