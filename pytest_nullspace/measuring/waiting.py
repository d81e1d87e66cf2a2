"""Forwards of one model that wait before each of its blocks, so that a block can run for all of them at once.

Each is the model's own forward, in a thread of its own of which one at a time goes on: what the model keeps from block
to block, be it a mask or what an earlier block left for a later one, stays where it is, on that thread's stack. What
runs there is all but the blocks; these, and the head, run where the forward is waited for.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context, copy_context
from typing import Any, NamedTuple

from torch import Tensor, nn

_here = threading.local()


class Call(NamedTuple):
    """A call of a module that a forward waits for.

    Attributes:
        module: The module.
        forward: Its own ``forward``.
        args: What it is given.
        kwargs: What it is given by name.
        context: In which context.
    """

    module: nn.Module
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: Context

    @property
    def nbytes(self) -> int:
        """Of all that the module is given, and once more of the first of it: what it gives is as large."""
        given = list(tensors_in([self.args, self.kwargs]))
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in given}
        return sum(held.values()) + (given[0].nbytes if given else 0)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All in it, whatever lists and dictionaries they lie in."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


class _LeftError(BaseException):
    """Ends a forward that nobody waits for any more."""


class Waiting:
    """One forward.

    Attributes:
        call: What it waits for; None before it began and after its end.
        given: What the module gave for which it waited before.
        output: What it gave, once it ended.
        ended: Whether it did.
    """

    def __init__(self, forward: Callable[[], Any]) -> None:
        """Begin nothing yet; ``forward`` is called in the thread."""
        self.call: Call | None = None
        self.given: Any = None
        self.output: Any = None
        self.ended = False
        self._forward: Callable[[], Any] | None = forward
        self._answer: Any = None
        self._raised: BaseException | None = None
        self._is_left = False
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="nullspace-forward", daemon=True)

    def go_on(self, answer: Any = None) -> None:
        """Let it run until it waits again or ends.

        Args:
            answer: What the module that it waited for gave.

        Raises:
            BaseException: What it raised.
        """
        self.call, self.given, self._answer = None, answer, answer
        if not self._thread.is_alive():
            self._thread.start()
        self._turn.release()
        self._back.acquire()
        if self._raised is not None:
            raise self._raised

    def leave(self) -> None:
        """End it where it is."""
        self.call = self.given = self.output = self._answer = None
        if self._thread.is_alive() and not self.ended:
            self._is_left = True
            self._turn.release()
            self._thread.join()

    def ask(self, call: Call) -> Any:
        """In its thread: wait for ``call``."""
        self.call = call
        del call
        self._back.release()
        self._turn.acquire()
        if self._is_left:
            raise _LeftError
        answer, self._answer = self._answer, None
        return answer

    def _run(self) -> None:
        _here.forward = self
        self._turn.acquire()
        forward, self._forward = self._forward, None
        try:
            if forward is not None:
                self.output = forward()
        except _LeftError:
            pass
        except BaseException as error:
            self._raised = error
        self.ended = True
        self._back.release()


@contextmanager
def asking(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within this context a `Waiting` forward that comes to one of ``modules`` waits for it."""

    def wait_for(module: nn.Module) -> Callable[..., Any]:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            waiting: Waiting | None = getattr(_here, "forward", None)
            if waiting is None:
                return own(*args, **kwargs)
            return waiting.ask(Call(module, own, args, kwargs, copy_context()))

        return forward

    were = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = wait_for(module)
    try:
        yield
    finally:
        for module, was in zip(modules, were, strict=True):
            del module.forward
            if was is not None:
                module.forward = was
