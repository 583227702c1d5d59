"""Options that are numbers or lists in the words of the field, such as ``1e6`` or ``0.05,0.3,1``."""

from __future__ import annotations

from piadm._checks import optional_int, positive_int

_LARGEST_SEED = 2**64 - 1
_MOST_THREADS = 1024  # more than any machine runs at once; OpenMP ends the process if it cannot start them


def check_seed(option: str, seed: int) -> None:
    """Check that a number can be a seed of the noise.

    Raises:
        ValueError: If not.
    """
    positive_int(option, seed, minimum=0, maximum=_LARGEST_SEED)


def check_threads(option: str, threads: int | None) -> None:
    """Check a number of CPU threads; None stands for torch's own choice.

    Raises:
        ValueError: If it is not positive, or so large that no machine starts them.
    """
    optional_int(option, threads, maximum=_MOST_THREADS)


def whole(option: str, text: str) -> int:
    """Return a whole number from 1 to 1e15, which may be written as ``1e6``.

    Raises:
        ValueError: If it is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = 0.5
    if not (1 <= number <= 1e15 and number == int(number)):
        raise ValueError(f"{option} must be a whole number from 1 to 1e15, such as 3072 or 1e6, got {text!r}")
    return int(number)


def words(text: str) -> tuple[str, ...]:
    """Return the words that are separated by commas, blanks or both."""
    return tuple(text.replace(",", " ").split())


def check_names(option: str, names: tuple[str, ...] | None, known: tuple[str, ...]) -> None:
    """Check that names are known, and that there are any; None stands for all.

    Raises:
        ValueError: If not.
    """
    unknown = [name for name in names or () if name not in known]
    if unknown or names == ():
        raise ValueError(f"{option} must be names among {', '.join(known)}, got {next(iter(unknown), '')!r}")


def positives(option: str, text: str) -> tuple[float, ...]:
    """Return positive numbers that are separated by commas.

    Raises:
        ValueError: If one is none, or there are none.
    """
    try:
        found = tuple(float(word) for word in words(text))
    except ValueError:
        found = ()
    if not found or not all(0 < number < float("inf") for number in found):
        raise ValueError(f"{option} must be positive numbers with commas, such as 0.05,0.3,1, got {text!r}")
    return found


def window_rows(option: str, text: str) -> int | str:
    """Return a window, as ``piadm.sample`` takes it.

    Raises:
        ValueError: If it is neither "all" nor "auto" nor a number of at least 2.
    """
    if text in ("all", "auto"):
        return text
    if not text.isdecimal() or int(text) < 2:
        raise ValueError(f"{option} must be all, auto or a number of at least 2, got {text!r}")
    return int(text)
