"""The one exception for what a user can put right, whose sentence the command line prints, and the check of numbers."""

from sys import float_info

LARGEST = 2**31 - 1  # of whole numbers
LARGEST_SEED = 2**63 - 1
LARGEST_FLOAT = float_info.max  # any but infinity


class InputError(ValueError):
    """Bad input. The message is one sentence that names the value, what is wrong with it, and the way out."""


def check_range(low: float, high: float = LARGEST, *, above: bool = False, **numbers: float | None) -> None:
    """Refuse numbers, by their names, that are not from `low` to `high`; None, which stands for a default, passes.

    Args:
        above: `low` itself, which is 0 then, is refused, too.

    Raises:
        InputError: a number is outside, or not a number at all (nan).
    """
    for name, number in numbers.items():
        if number is None or (low < number <= high if above else low <= number <= high):
            continue
        if number > high:
            raise InputError(f"{name}={number} must be at most {high:,}")
        must = f"at least {low}" if low else "positive" if above else "no less than 0"
        raise InputError(f"{name}={number} must be {must}")
