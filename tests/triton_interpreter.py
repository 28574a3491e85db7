"""Triton's interpreter in two thirds of its time."""

import inspect
from types import FunctionType

from triton import language
from triton.runtime import interpreter


def patch_once() -> None:
    """Let a launch patch `triton.language` once, not again for each function that its programs call.

    A called function finds the patches of its launch. Those of `triton.language.core`, which only Triton's
    own functions name, are never taken back: a call does not restore what it patched.
    """
    if not hasattr(interpreter, "_LangPatchScope"):  # another version of Triton: slower
        return
    patch, patched = interpreter._patch_lang, set[str]()
    modules: dict[FunctionType, frozenset[str]] = {}

    def patch_lang(function: FunctionType) -> object:
        if function not in modules:
            seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
            modules[function] = frozenset(m.__name__ for m in seen if m in (language, language.core))
        new = modules[function] - patched
        if modules[function] and not new:
            return interpreter._LangPatchScope()
        scope = patch(function)
        restore = scope.restore

        def restored() -> None:
            restore()
            patched.difference_update(new)

        scope.restore = restored
        patched.update(new)
        return scope

    interpreter._patch_lang = patch_lang
