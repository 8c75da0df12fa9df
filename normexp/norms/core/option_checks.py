"""Range checks of the layers' options; each raises ValueError naming the option."""


def check_positive(**values: float) -> None:
    """Every value must be a number greater than zero."""
    for name, value in values.items():
        if not _is_number(value) or not value > 0:
            raise ValueError(f"{name} must be greater than 0, got {value!r}")


def check_decay(**values: float) -> None:
    """Every value must lie in [0, 1): the share of the past that an average keeps."""
    for name, value in values.items():
        if not _is_number(value) or not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value!r}")


def check_share(**values: float) -> None:
    """Every value must lie in (0, 1]: the share of the present that an average takes."""
    for name, value in values.items():
        if not _is_number(value) or not 0 < value <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {value!r}")


def check_count(**values: int) -> None:
    """Every value must be an integer of at least zero."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")


def check_groups(num_features: int, num_groups: int) -> None:
    """num_groups must be an integer of at least 1 that divides the number of channels."""
    check_count(num_groups=num_groups)
    if num_groups == 0 or num_features % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide {num_features} channels")


def check_flag(**values: bool) -> None:
    """Every value must be True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")


def check_not_negative(**values: float) -> None:
    """Every value must be a number of at least zero."""
    for name, value in values.items():
        if not _is_number(value) or not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
